//! Two processes, so that whichever is killed, the other cleans up.
//!
//! The first, which the user started, waits. The second compares. What either leaves
//! becomes the other's child or, if both are killed, is found by the next comparison.

#![allow(unsafe_code, reason = "fork, and what goes before")]

use std::cell::OnceCell;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, StatVfsMountFlags, fstat, openat, statfs, statvfs};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{
    Pid, Signal, WaitOptions, geteuid, getpid, kill_process, set_child_subreaper, setpgid, waitpid,
};

use super::processes::{descendants, kill_descendants, kill_marked, take_signals};
use super::removal::{empty, open};
use super::undo::undo;
use crate::error::{Context, Error};

/// Names what is to be undone.
const JOURNAL: &str = "undo.json";
const LOCK: &str = "lock";
/// Where files lie that are too many for memory.
const DISK: &str = "/var/tmp";
const MIB: u32 = 20;
const PREFIX: &str = "mayfly-compare-";
/// The status of a comparison that was ended by Ctrl-C.
pub const INTERRUPTED: u8 = 130;
/// A variable of all that is launched, so that it is found when nobody is left who knows it.
const MARK: &str = "MAYFLY_COMPARISON";

/// A folder for one comparison, which its end removes with all that belongs to it.
#[derive(Debug)]
pub struct Scene {
    /// Where it is.
    pub folder: PathBuf,
    /// The folder itself: once it is removed, another user may make one of that name.
    handle: OwnedFd,
    /// Who was below the first half before: a shell that executed it may have left some.
    others: Vec<Pid>,
    _lock: File,
    /// The lock of what belongs to it on a disk.
    disk: OnceCell<File>,
}

/// What removes an instance: commands.
pub type Undo = Vec<Vec<OsString>>;

impl Scene {
    /// Makes one, and removes those of comparisons that were killed.
    pub fn create() -> Result<Self, Error> {
        let mut places = places();
        places.iter().for_each(|place| sweep(place));
        sweep(Path::new(DISK));
        places.retain(|place| may_execute(place));
        let above = places.first().ok_or_else(|| {
            Error::host("there is no folder for temporary files whose programs may run")
        })?;
        let what = || above.display().to_string();
        let folder = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(above)
            .or_host(what())?
            .keep();
        let handle = open(&folder).or_host(what())?;
        let lock = lock(&folder).or_host(what())?;
        Ok(Scene {
            folder,
            handle,
            others: descendants(getpid()),
            _lock: lock,
            disk: OnceCell::new(),
        })
    }

    /// A folder on a disk that is removed with this, and has room for so many bytes.
    pub fn disk_for(&self, bytes: u64) -> Result<PathBuf, Error> {
        let spare = room(Path::new(DISK));
        if bytes > spare {
            return Err(Error::host(format!(
                "the image may need {} MiB, and {DISK} has {} to spare",
                bytes >> MIB,
                spare >> MIB
            )));
        }
        self.on_disk()
    }

    /// A folder that is removed with this, and has room for so many bytes: in memory or, so
    /// that they do not fill it, on a disk.
    pub fn folder_for(&self, bytes: u64) -> Result<PathBuf, Error> {
        if bytes <= room(&self.folder) {
            return Ok(self.folder.clone());
        }
        self.disk_for(bytes)
    }

    fn on_disk(&self) -> Result<PathBuf, Error> {
        let folder = on_disk(&self.folder);
        let what = || folder.display().to_string();
        if !may_execute(Path::new(DISK)) {
            return Err(Error::host(format!("{DISK}: its programs may not run")));
        }
        let mut builder = DirBuilder::new();
        builder.mode(0o700).create(&folder).or_host(what())?;
        let lock = lock(&folder).or_host(what())?;
        self.disk.get_or_init(|| lock);
        Ok(folder)
    }

    /// The variable by which what is launched is found.
    pub fn mark(&self) -> (String, OsString) {
        (MARK.into(), name(&self.folder).into())
    }

    /// Notes what removes the instances that are about to be launched.
    pub fn note(&self, commands: &Undo) -> Result<(), Error> {
        let words: Vec<Vec<String>> = commands
            .iter()
            .map(|command| {
                let text = |word: &OsString| word.to_string_lossy().into_owned();
                command.iter().map(text).collect()
            })
            .collect();
        let text = serde_json::to_vec(&words).or_internal("the journal")?;
        let unnamed = self.folder.join("undo.new");
        fs::write(&unnamed, text)
            .and_then(|()| fs::rename(unnamed, self.folder.join(JOURNAL)))
            .or_host(self.folder.display())
    }

    /// Ends and removes all.
    pub fn clear(&self) {
        kill_descendants(&self.others);
        clear(&self.folder, &self.handle);
    }
}

/// Where such folders may lie, best first: in memory, as overlays need a file system that
/// holds them.
fn places() -> Vec<PathBuf> {
    let run = match geteuid().is_root() {
        true => Some(PathBuf::from("/run")),
        false => std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from),
    };
    let others = ["/dev/shm".into(), std::env::temp_dir()];
    let places = run.into_iter().chain(others);
    places.filter(|path| path.is_dir()).collect()
}

/// Debian mounts `/run` so that nothing there is executed.
fn may_execute(folder: &Path) -> bool {
    let found = statvfs(folder);
    found.is_ok_and(|it| !it.f_flag.contains(StatVfsMountFlags::NOEXEC))
}

/// The file system is no other than the host's memory.
pub fn in_memory(path: &Path) -> bool {
    const MAGIC: [i64; 2] = [libc::TMPFS_MAGIC, 0x8584_58f6]; // the second is ramfs
    statfs(path).is_ok_and(|found| MAGIC.contains(&found.f_type))
}

/// How many bytes may be put there: half of what is free, as others need some, too.
fn room(folder: &Path) -> u64 {
    let found = statvfs(folder);
    found.map_or(0, |it| it.f_bavail.saturating_mul(it.f_frsize) / 2)
}

/// Locks a folder, which has the lock's name only then.
fn lock(folder: &Path) -> io::Result<File> {
    let unnamed = folder.join("lock.new");
    let lock = File::create(&unnamed)?;
    lock.lock()?;
    fs::rename(unnamed, folder.join(LOCK))?;
    Ok(lock)
}

/// Removes what comparisons left that were killed.
fn sweep(above: &Path) {
    for entry in fs::read_dir(above).into_iter().flatten().flatten() {
        let path = entry.path();
        if name(&path).starts_with(PREFIX)
            && let Ok(folder) = open(&path)
            && is_own(&folder)
            && let Ok(lock) = open_in(&folder, LOCK)
            && lock.try_lock().is_ok()
        {
            kill_marked(MARK, &name(&path));
            clear(&path, &folder);
        }
    }
}

/// What belongs to a folder, and lies on a disk.
fn on_disk(folder: &Path) -> PathBuf {
    Path::new(DISK).join(name(folder))
}

fn name(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Others may write beside it, and what is undone are commands.
fn is_own(folder: &OwnedFd) -> bool {
    fstat(folder)
        .is_ok_and(|found| found.st_uid == geteuid().as_raw() && found.st_mode & 0o022 == 0)
}

fn open_in(folder: &OwnedFd, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(folder, name, flags, Mode::empty())?.into())
}

/// Removes what is left of a comparison: `handle` is its folder, `folder` where that was.
fn clear(folder: &Path, handle: &OwnedFd) {
    let journal = open_in(handle, JOURNAL).and_then(io::read_to_string);
    let commands = journal.map(|journal| serde_json::from_str(&journal));
    let commands: Vec<Vec<String>> = commands.ok().and_then(Result::ok).unwrap_or_default();
    let words = |command: Vec<String>| command.into_iter().map(Into::into).collect();
    undo(&commands.into_iter().map(words).collect::<Vec<_>>());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let inside = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    for mount in inside.filter(|mount| Path::new(mount).starts_with(folder)) {
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        let _ = unmount(mount, flags);
    }
    // One of that name and owner can only be ours.
    let disk = on_disk(folder);
    if disk != folder
        && let Ok(handle) = open(&disk)
        && is_own(&handle)
    {
        let _ = empty(handle.as_fd());
        let _ = fs::remove_dir(disk);
    }
    let _ = empty(handle.as_fd());
    let still = open(folder).is_ok_and(|there| identity(&there) == identity(handle));
    if still {
        let _ = fs::remove_dir(folder);
    }
}

fn identity(folder: &OwnedFd) -> Option<(u64, u64)> {
    let found = fstat(folder).ok()?;
    Some((found.st_dev, found.st_ino))
}

/// Has the kernel keep the ends of children, should who started us have ignored them.
pub fn await_children() {
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Divides the process, while it has one thread. The second gets a descriptor that is closed
/// when the first is gone, and goes on; the first returns the second's status.
pub fn divide(scene: &Scene) -> Result<Result<OwnedFd, u8>, Error> {
    let what = "starting the comparison";
    let (theirs, ours) = io::pipe().or_host(what)?;
    set_child_subreaper(Some(getpid())).or_host(what)?;
    // SAFETY: there is one thread, so that no lock is held by another.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()).or_host(what),
        0 => {
            drop(ours);
            set_child_subreaper(Some(getpid())).or_host(what)?;
            // A terminal's Ctrl-C comes once, by the first.
            let _ = setpgid(None, None);
            Ok(Ok(theirs.into()))
        }
        child => {
            drop(theirs);
            let status = follow(child);
            // What it left, if it was killed, is ours.
            kill_descendants(&scene.others);
            drop(ours);
            Ok(Err(status))
        }
    }
}

/// Waits for the second process, and passes signals on to it.
fn follow(child: i32) -> u8 {
    let Some(child) = Pid::from_raw(child) else {
        return 1;
    };
    let signals = take_signals();
    let mut asked = false;
    loop {
        if let Ok(Some((_, status))) = waitpid(Some(child), WaitOptions::NOHANG) {
            let signal = status.terminating_signal();
            if asked && signal == Some(libc::SIGTERM) {
                // It had not begun, and has nothing to show.
                return INTERRUPTED;
            }
            let code = status
                .exit_status()
                .or_else(|| signal.map(|signal| 128 + signal));
            return code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
        }
        let Ok(signals) = &signals else {
            continue;
        };
        let mut polls = [rustix::event::PollFd::new(
            signals,
            rustix::event::PollFlags::IN,
        )];
        let _ = rustix::event::poll(&mut polls, None);
        while let Some(signal) = signals.next_signal() {
            if signal != libc::SIGCHLD {
                // Who asks again does not want to wait; what is left is removed anyway.
                let how = if asked { Signal::KILL } else { Signal::TERM };
                let _ = kill_process(child, how);
                asked = true;
            }
        }
    }
}
