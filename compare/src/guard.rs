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

/// A directory for one comparison, which its end removes with all that belongs to it.
#[derive(Debug)]
pub struct Workspace {
    /// Its path.
    pub directory: PathBuf,
    /// The directory itself: once it is removed, another user may make one of that name.
    handle: OwnedFd,
    /// Who was below the first half before: a shell that executed it may have left some.
    others: Vec<Pid>,
    _lock: File,
    /// The lock of what belongs to it on a disk.
    disk: OnceCell<File>,
}

/// What removes an instance: commands.
pub type Undo = Vec<Vec<OsString>>;

impl Workspace {
    /// Makes one, and removes those of comparisons that were killed.
    pub fn create() -> Result<Self, Error> {
        let mut places = places();
        places.iter().for_each(|place| sweep(place));
        sweep(Path::new(DISK));
        places.retain(|place| may_execute(place));
        let above = places.first().ok_or_else(|| {
            Error::host("there is no directory for temporary files whose programs may run")
        })?;
        let what = || above.display().to_string();
        let directory = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(above)
            .or_host(what())?
            .keep();
        let handle = open(&directory).or_host(what())?;
        let lock = lock(&directory).or_host(what())?;
        Ok(Workspace {
            directory,
            handle,
            others: descendants(getpid()),
            _lock: lock,
            disk: OnceCell::new(),
        })
    }

    /// A directory on a disk that is removed with this, and has room for `bytes`.
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

    /// A directory that is removed with this, and has room for `bytes`: in memory or, so
    /// that they do not fill it, on a disk.
    pub fn directory_for(&self, bytes: u64) -> Result<PathBuf, Error> {
        if bytes <= room(&self.directory) {
            return Ok(self.directory.clone());
        }
        self.disk_for(bytes)
    }

    fn on_disk(&self) -> Result<PathBuf, Error> {
        let directory = on_disk(&self.directory);
        let what = || directory.display().to_string();
        if !may_execute(Path::new(DISK)) {
            return Err(Error::host(format!("{DISK}: its programs may not run")));
        }
        let mut builder = DirBuilder::new();
        builder.mode(0o700).create(&directory).or_host(what())?;
        let lock = lock(&directory).or_host(what())?;
        self.disk.get_or_init(|| lock);
        Ok(directory)
    }

    /// The variable by which what is launched is found.
    pub fn mark(&self) -> (String, OsString) {
        (MARK.into(), name(&self.directory).into())
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
        let unnamed = self.directory.join("undo.new");
        fs::write(&unnamed, text)
            .and_then(|()| fs::rename(unnamed, self.directory.join(JOURNAL)))
            .or_host(self.directory.display())
    }

    /// Ends and removes all.
    pub fn clear(&self) {
        kill_descendants(&self.others);
        clear(&self.directory, &self.handle);
    }
}

/// Where such directories may lie, best first: in memory, as overlays need a file system that
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
fn may_execute(directory: &Path) -> bool {
    let found = statvfs(directory);
    found.is_ok_and(|it| !it.f_flag.contains(StatVfsMountFlags::NOEXEC))
}

/// The file system is no other than the host's memory.
pub fn in_memory(path: &Path) -> bool {
    const MAGIC: [i64; 2] = [libc::TMPFS_MAGIC, 0x8584_58f6]; // the second is ramfs
    statfs(path).is_ok_and(|found| MAGIC.contains(&found.f_type))
}

/// How many bytes may be put there: half of what is free, as others need some, too.
fn room(directory: &Path) -> u64 {
    let found = statvfs(directory);
    found.map_or(0, |it| it.f_bavail.saturating_mul(it.f_frsize) / 2)
}

/// Locks a directory, which has the lock's name only then.
fn lock(directory: &Path) -> io::Result<File> {
    let unnamed = directory.join("lock.new");
    let lock = File::create(&unnamed)?;
    lock.lock()?;
    fs::rename(unnamed, directory.join(LOCK))?;
    Ok(lock)
}

/// Removes what comparisons left that were killed.
fn sweep(above: &Path) {
    for entry in fs::read_dir(above).into_iter().flatten().flatten() {
        let path = entry.path();
        if name(&path).starts_with(PREFIX)
            && let Ok(directory) = open(&path)
            && is_own(&directory)
            && let Ok(lock) = open_in(&directory, LOCK)
            && lock.try_lock().is_ok()
        {
            kill_marked(MARK, &name(&path));
            clear(&path, &directory);
        }
    }
}

/// What belongs to a directory, and lies on a disk.
fn on_disk(directory: &Path) -> PathBuf {
    Path::new(DISK).join(name(directory))
}

fn name(directory: &Path) -> String {
    let name = directory.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Others may write beside it, and what is undone are commands.
fn is_own(directory: &OwnedFd) -> bool {
    fstat(directory)
        .is_ok_and(|found| found.st_uid == geteuid().as_raw() && found.st_mode & 0o022 == 0)
}

fn open_in(directory: &OwnedFd, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(directory, name, flags, Mode::empty())?.into())
}

/// Removes what is left of a comparison: `handle` is its directory, `directory` where that was.
fn clear(directory: &Path, handle: &OwnedFd) {
    let journal = open_in(handle, JOURNAL).and_then(io::read_to_string);
    let commands = journal.map(|journal| serde_json::from_str(&journal));
    let commands: Vec<Vec<String>> = commands.ok().and_then(Result::ok).unwrap_or_default();
    let words = |command: Vec<String>| command.into_iter().map(Into::into).collect();
    undo(&commands.into_iter().map(words).collect::<Vec<_>>());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let inside = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    for mount in inside.filter(|mount| Path::new(mount).starts_with(directory)) {
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        let _ = unmount(mount, flags);
    }
    // One of that name and owner can only be ours.
    let disk = on_disk(directory);
    if disk != directory
        && let Ok(handle) = open(&disk)
        && is_own(&handle)
    {
        let _ = empty(handle.as_fd());
        let _ = fs::remove_dir(disk);
    }
    let _ = empty(handle.as_fd());
    let still = open(directory).is_ok_and(|there| identity(&there) == identity(handle));
    if still {
        let _ = fs::remove_dir(directory);
    }
}

fn identity(directory: &OwnedFd) -> Option<(u64, u64)> {
    let found = fstat(directory).ok()?;
    Some((found.st_dev, found.st_ino))
}

/// Has the kernel keep the ends of children, should who started us have ignored them.
pub fn await_children() {
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Divides the process, while it has one thread. The second gets a descriptor that is closed
/// when the first is gone, and goes on; the first returns the second's status.
pub fn divide(workspace: &Workspace) -> Result<Result<OwnedFd, u8>, Error> {
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
            kill_descendants(&workspace.others);
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
