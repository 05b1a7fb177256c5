//! Locks on files and folders: what a process holds is let go when it ends,
//! however it ends.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::Duration;

/// How often, and after which time each, a lock is tried that is held for a moment.
const LOOKS: u32 = 10;
const LOOK_TIME: Duration = Duration::from_millis(20);

/// Opens a lock file.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)
}

/// True if a path still names what was opened.
fn in_place(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Keeps something where it is, beside others who do. None if it is not there.
pub fn hold(path: &Path) -> io::Result<Option<File>> {
    loop {
        let file = match open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        file.lock_shared()?;
        // Between the two it may have been removed, and come again.
        if in_place(&file, path)? {
            return Ok(Some(file));
        }
    }
}

/// Takes something that nobody holds. None if somebody does, or it is not there.
pub fn take(path: &Path) -> io::Result<Option<File>> {
    let file = match open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    match file.try_lock() {
        Ok(()) => Ok(in_place(&file, path)?.then_some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Takes something as [`take`] does, but waits for those who only look at it: they are done
/// in a moment.
pub fn take_patiently(path: &Path) -> io::Result<Option<File>> {
    for _ in 0..LOOKS {
        if let Some(taken) = take(path)? {
            return Ok(Some(taken));
        }
        thread::sleep(LOOK_TIME);
    }
    Ok(None)
}

/// Opens a file for writing, makes it if it is missing, and waits until nobody
/// else has it. What `waits` makes lives as long as that takes.
pub fn take_file<T>(path: &Path, waits: impl FnOnce() -> T) -> io::Result<File> {
    let mut waits = Some(waits);
    let mut waiting = None;
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                if let Some(waits) = waits.take() {
                    waiting = Some(waits());
                }
                file.lock()?;
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        if in_place(&file, path)? {
            drop(waiting);
            return Ok(file);
        }
    }
}
