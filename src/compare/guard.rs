//! Two processes, so that whichever is killed, the other cleans up.
//!
//! The first, which the user started, waits. The second compares. What either leaves
//! becomes the other's child or, if both are killed, is found by the next comparison.

#![allow(unsafe_code, reason = "fork")]

use std::cell::OnceCell;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::StatVfsMountFlags;
use rustix::process::{
    Pid, Signal, WaitOptions, geteuid, getpid, kill_process, set_child_subreaper, setpgid, waitpid,
};

use super::processes::kill_descendants;
use super::undo::undo;
use crate::failure::{Failure, OrFail};
use crate::machine::Signals;

/// Names what is to be undone.
const JOURNAL: &str = "undo.json";
const LOCK: &str = "lock";
const PREFIX: &str = "mayfly-compare-";
/// Where files lie that are not to be in memory.
const DISK: &str = "/var/tmp";
/// The status of a comparison that was ended by Ctrl-C.
pub const INTERRUPTED: u8 = 130;

/// A folder for one comparison, which its end removes with all that belongs to it.
#[derive(Debug)]
pub struct Scene {
    /// Where it is.
    pub folder: PathBuf,
    _lock: File,
    disk: OnceCell<File>,
}

/// What removes an instance: commands.
pub type Undo = Vec<Vec<std::ffi::OsString>>;

impl Scene {
    /// Makes one, and removes those of comparisons that were killed.
    pub fn create() -> Result<Self, Failure> {
        let mut places = places();
        places.iter().for_each(|place| sweep(place));
        sweep(Path::new(DISK));
        places.retain(|place| may_execute(place));
        let above = places.first().ok_or_else(|| {
            Failure::host("there is no folder for temporary files whose programs may run")
        })?;
        let folder = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(above)
            .or_host(above.display())?
            .keep();
        Ok(Scene {
            _lock: lock(&folder).or_host(folder.display())?,
            folder,
            disk: OnceCell::new(),
        })
    }

    /// A folder on a disk, that is removed with this.
    pub fn on_disk(&self) -> Result<PathBuf, Failure> {
        let folder = on_disk(&self.folder);
        let what = || folder.display().to_string();
        if !may_execute(Path::new(DISK)) {
            return Err(Failure::host(format!("{DISK}: its programs may not run")));
        }
        let mut builder = DirBuilder::new();
        builder.mode(0o700).create(&folder).or_host(what())?;
        let lock = lock(&folder).or_host(what())?;
        self.disk.get_or_init(|| lock);
        Ok(folder)
    }

    /// Notes what removes the instances that are about to be launched.
    pub fn note(&self, commands: &Undo) -> Result<(), Failure> {
        let words: Vec<Vec<String>> = commands
            .iter()
            .map(|command| {
                let text = |word: &std::ffi::OsString| word.to_string_lossy().into_owned();
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
        kill_descendants(&[]);
        clear(&self.folder);
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
    let found = rustix::fs::statvfs(folder);
    found.is_ok_and(|it| !it.f_flag.contains(StatVfsMountFlags::NOEXEC))
}

/// The file system is no other than the host's memory.
pub fn in_memory(path: &Path) -> bool {
    const MAGIC: [i64; 2] = [libc::TMPFS_MAGIC, 0x8584_58f6]; // the second is ramfs
    rustix::fs::statfs(path).is_ok_and(|found| MAGIC.contains(&found.f_type))
}

/// Locks a folder, which has the lock's name only then.
fn lock(folder: &Path) -> io::Result<File> {
    let unnamed = folder.join("lock.new");
    let lock = File::create(&unnamed)?;
    lock.lock()?;
    fs::rename(unnamed, folder.join(LOCK))?;
    Ok(lock)
}

/// Others may write beside it, too, and what is undone are commands.
fn is_own(folder: &Path) -> bool {
    fs::symlink_metadata(folder).is_ok_and(|found| {
        found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0
    })
}

/// Removes what comparisons left that were killed.
fn sweep(above: &Path) {
    for entry in fs::read_dir(above).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(PREFIX.as_bytes())
            && is_own(&entry.path())
            && let Ok(lock) = File::open(entry.path().join(LOCK))
            && lock.try_lock().is_ok()
        {
            clear(&entry.path());
        }
    }
}

/// What belongs to a folder, and lies on a disk.
fn on_disk(folder: &Path) -> PathBuf {
    Path::new(DISK).join(folder.file_name().unwrap_or_default())
}

fn clear(folder: &Path) {
    let journal = fs::read(folder.join(JOURNAL)).unwrap_or_default();
    let commands: Vec<Vec<String>> = serde_json::from_slice(&journal).unwrap_or_default();
    let words = |command: Vec<String>| command.into_iter().map(Into::into).collect();
    undo(&commands.into_iter().map(words).collect::<Vec<_>>());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let inside = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    for mount in inside.filter(|mount| Path::new(mount).starts_with(folder)) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        let _ = rustix::mount::unmount(mount, flags);
    }
    let disk = on_disk(folder);
    if is_own(&disk) {
        remove_folder(&disk);
    }
    remove_folder(folder);
}

/// Removes a folder, whatever its folders' modes.
pub fn remove_folder(folder: &Path) {
    if fs::remove_dir_all(folder).is_err() {
        // Overlays keep one that nobody may read.
        make_removable(folder);
        let _ = fs::remove_dir_all(folder);
    }
}

fn make_removable(folder: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let _ = fs::set_permissions(folder, fs::Permissions::from_mode(0o700));
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            make_removable(&entry.path());
        }
    }
}

/// Divides the process, while it has one thread. The second gets a descriptor that is closed
/// when the first is gone, and goes on; the first returns the second's status.
pub fn divide() -> Result<Result<OwnedFd, u8>, Failure> {
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
            kill_descendants(&[]);
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
    let signals = Signals::of_children();
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
        while let Some(signal) = signals.next() {
            if signal != libc::SIGCHLD {
                // Who asks again does not want to wait; what is left is removed anyway.
                let how = if asked { Signal::KILL } else { Signal::TERM };
                let _ = kill_process(child, how);
                asked = true;
            }
        }
    }
}
