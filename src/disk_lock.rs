//! Locks on disks' images: one VM writes to an image, or several read it.

use std::fs::{File, TryLockError};
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// How long a lock is waited for. A process that was killed had its images open in
/// io_uring, too: Linux takes rings down in a work queue, some milliseconds after the
/// process has ended, and until then the image stays locked.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Locks an image: shared if it is only read. Fails with [`TryLockError::WouldBlock`]
/// if another VM has it for longer than a VM takes to end.
pub fn take(file: &File, read_only: bool) -> Result<(), TryLockError> {
    take_within(file, read_only, RELEASE_TIMEOUT)
}

fn take_within(file: &File, read_only: bool, timeout: Duration) -> Result<(), TryLockError> {
    let started = Instant::now();
    loop {
        let locked = match read_only {
            true => file.try_lock_shared(),
            false => file.try_lock(),
        };
        match locked {
            Err(TryLockError::WouldBlock) if started.elapsed() < timeout => {
                thread::sleep(RETRY_INTERVAL);
            }
            result => return result,
        }
    }
}

/// The locks of a VM's disks, which its supervisor shares with the VMM process: it gives
/// them back when that process has ended, whatever the kernel still does with its files.
#[derive(Debug, Default)]
pub struct DiskLocks(Vec<File>);

impl DiskLocks {
    /// Adds the lock that a file has.
    pub fn add(&mut self, file: &File) -> io::Result<()> {
        self.0.push(file.try_clone()?);
        Ok(())
    }

    /// Gives all of them back.
    pub fn release(&mut self) {
        for file in self.0.drain(..) {
            // One that cannot be unlocked is so when it is closed.
            let _ = file.unlock();
        }
    }
}

impl Drop for DiskLocks {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(file: &tempfile::NamedTempFile) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(file.path())
            .unwrap()
    }

    #[test]
    fn an_image_is_free_when_its_locks_are_released_though_it_is_still_open() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (of_vmm, other) = (open(&image), open(&image));
        take(&of_vmm, false).unwrap();
        let mut locks = DiskLocks::default();
        locks.add(&of_vmm).unwrap();
        let now = Duration::ZERO;
        assert!(take_within(&other, true, now).is_err());
        locks.release();
        take_within(&other, false, now).unwrap();
        drop(of_vmm);
    }

    #[test]
    fn an_image_that_is_let_go_of_soon_is_waited_for() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (held, other) = (open(&image), open(&image));
        take(&held, true).unwrap();
        take(&other, true).unwrap();
        drop(other);
        let other = open(&image);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| take_within(&other, false, Duration::MAX));
            thread::sleep(10 * RETRY_INTERVAL);
            assert!(!waiting.is_finished());
            drop(held);
            waiting.join().unwrap().unwrap();
        });
    }
}
