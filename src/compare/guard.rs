//! Two processes, so that whichever is killed, the other cleans up.
//!
//! The first, which the user started, waits. The second compares. What either leaves
//! becomes the other's child or, if both are killed, is found by the next comparison.

#![allow(unsafe_code, reason = "fork")]

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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
/// The status of a comparison that was ended by Ctrl-C.
pub const INTERRUPTED: u8 = 130;

/// A folder for one comparison, which its end removes with all that belongs to it.
#[derive(Debug)]
pub struct Scene {
    /// Where it is.
    pub folder: PathBuf,
    _lock: File,
}

/// What removes an instance: commands.
pub type Undo = Vec<Vec<std::ffi::OsString>>;

impl Scene {
    /// Makes one, and removes those of comparisons that were killed.
    pub fn create() -> Result<Self, Failure> {
        let above = above();
        for entry in fs::read_dir(&above).into_iter().flatten().flatten() {
            let named = entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(PREFIX.as_bytes());
            // Others may write here, too, and what is undone are commands.
            let own = entry.metadata().is_ok_and(|found| {
                found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0
            });
            if named
                && own
                && let Ok(lock) = File::open(entry.path().join(LOCK))
                && lock.try_lock().is_ok()
            {
                clear(&entry.path());
            }
        }
        let what = || above.display().to_string();
        let folder = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(&above)
            .or_host(what())?
            .keep();
        // It has its name when it is locked.
        let unnamed = folder.join("lock.new");
        let lock = File::create(&unnamed).or_host(what())?;
        lock.lock().or_host(what())?;
        fs::rename(unnamed, folder.join(LOCK)).or_host(what())?;
        Ok(Scene {
            folder,
            _lock: lock,
        })
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

/// Where such folders lie: in memory, as overlays need a file system that holds them.
fn above() -> PathBuf {
    let run = match geteuid().is_root() {
        true => Some(PathBuf::from("/run")),
        false => std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from),
    };
    run.filter(|path| path.is_dir())
        .unwrap_or_else(std::env::temp_dir)
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
