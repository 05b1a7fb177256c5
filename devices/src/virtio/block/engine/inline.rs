//! Small writes into the page cache, which are done at once.
//!
//! Several file systems (ext4 among them) refuse buffered writes that must not block
//! (`RWF_NOWAIT`), and so a ring hands each of them to a thread of the kernel's: two wake-ups
//! for a copy that takes microseconds. Here such a write is made by the caller. It may block,
//! when the host has too many dirty pages; so one that took long is followed by a pause, in
//! which writes are the ring's again. A caller thus spends a hundredth of its time in writes
//! that block, at most.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::time::{Duration, Instant};

use super::operation::{Kind, Operation};
use super::threads::Worker;

/// The largest write that is made at once. Larger ones are copied beside the caller.
const WRITE_MAX: usize = 32 << 10;
/// How much is written at once in a turn of the device, so that others have theirs.
const TURN_MAX: usize = 512 << 10;
/// A write that takes longer has blocked.
const LONG: Duration = Duration::from_millis(2);
/// The pause after it, in times of what it took.
const PAUSE: u32 = 100;

/// The file systems whose writes are made at once: those that are local, and refuse to be
/// asked not to block. (`linux/magic.h`)
const EXT4: libc::c_long = 0xef53;
const TMPFS: libc::c_long = 0x0102_1994;

/// What decides whether a write is made at once.
#[derive(Debug)]
pub struct InlineWrites {
    suitable: bool,
    /// How much may still be written in this turn.
    left: usize,
    /// The end of the pause after a write that blocked.
    paused: Option<Instant>,
}

impl InlineWrites {
    pub fn new(file: &File) -> io::Result<Self> {
        Ok(InlineWrites {
            suitable: is_suitable(file)?,
            left: 0,
            paused: None,
        })
    }

    /// A turn begins, in which writes are made at once, or none.
    pub fn begin(&mut self, at_once: bool) {
        self.left = if at_once { TURN_MAX } else { 0 };
    }

    /// Makes a write, if it is one to make at once.
    ///
    /// # Safety
    ///
    /// The operation's buffers must be valid.
    pub unsafe fn write(
        &mut self,
        file: &File,
        operation: &Operation,
    ) -> Option<io::Result<usize>> {
        let kind = Kind::Write { durable: false };
        if !self.suitable || operation.kind != kind {
            return None;
        }
        let len: usize = operation.iovecs.iter().map(|iovec| iovec.iov_len).sum();
        if len > WRITE_MAX.min(self.left) {
            return None;
        }
        let start = Instant::now();
        if self.paused.is_some_and(|end| start < end) {
            return None;
        }
        let (iovecs, count) = (operation.iovecs.as_ptr(), operation.iovecs.len());
        // SAFETY: the caller's promise.
        let written = unsafe { file.run(kind, operation.offset, iovecs, count) };
        self.took(start, start.elapsed());
        self.left = match &written {
            Ok(count) if *count == len => self.left - len,
            // The rest is the ring's.
            _ => 0,
        };
        match written {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            written => Some(written),
        }
    }

    /// A write began, and took a time.
    fn took(&mut self, start: Instant, time: Duration) {
        self.paused = (time > LONG)
            .then(|| start.checked_add(time.saturating_mul(PAUSE)))
            .flatten();
    }
}

/// A file, or block device, that the page cache is before, on a local file system that is
/// not asked to go on without blocking.
fn is_suitable(file: &File) -> io::Result<bool> {
    // SAFETY: an open descriptor, and a number.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if flags & (libc::O_DIRECT | libc::O_SYNC | libc::O_DSYNC) != 0 {
        return Ok(false);
    }
    if file.metadata()?.file_type().is_block_device() {
        return Ok(true);
    }
    // SAFETY: plain numbers, for which zeroes are a value.
    let mut system: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: writes to a live structure.
    match unsafe { libc::fstatfs(file.as_raw_fd(), &mut system) } {
        0 => Ok([EXT4, TMPFS].contains(&system.f_type)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writes() -> InlineWrites {
        InlineWrites {
            suitable: true,
            left: TURN_MAX,
            paused: None,
        }
    }

    fn write(writes: &mut InlineWrites, file: &File, data: &mut [u8]) -> bool {
        let operation = Operation {
            kind: Kind::Write { durable: false },
            offset: 0,
            iovecs: vec![libc::iovec {
                iov_base: data.as_mut_ptr().cast(),
                iov_len: data.len(),
            }],
        };
        // SAFETY: the buffer lives until the call returns.
        match unsafe { writes.write(file, &operation) } {
            Some(written) => written.unwrap() == data.len(),
            None => false,
        }
    }

    #[test]
    fn a_turn_writes_so_much_at_once_and_no_large_pieces() {
        let file = tempfile::tempfile().unwrap();
        let mut writes = writes();
        let mut large = vec![1; WRITE_MAX + 1];
        assert!(!write(&mut writes, &file, &mut large));
        let piece = &mut large[..WRITE_MAX];
        for _ in 0..TURN_MAX / WRITE_MAX {
            assert!(write(&mut writes, &file, piece));
        }
        assert!(!write(&mut writes, &file, &mut piece[..512]));
        writes.begin(false);
        assert!(!write(&mut writes, &file, &mut piece[..512]));
        writes.begin(true);
        assert!(write(&mut writes, &file, &mut piece[..512]));
        writes.suitable = false;
        assert!(!write(&mut writes, &file, &mut piece[..512]));
    }

    #[test]
    fn after_a_write_that_blocked_there_is_a_pause() {
        let file = tempfile::tempfile().unwrap();
        let mut writes = writes();
        let now = Instant::now();
        writes.took(now, Duration::from_secs(1));
        assert!(!write(&mut writes, &file, &mut [1; 512]));
        assert_eq!(writes.paused, Some(now + Duration::from_secs(100)));
        writes.took(now, LONG);
        assert!(write(&mut writes, &file, &mut [1; 512]));
    }

    #[test]
    fn files_that_bypass_the_page_cache_are_not_written_to_at_once() {
        use std::os::unix::fs::OpenOptionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mut options = File::options();
        options.write(true).create(true);
        for (flags, suitable) in [(0, true), (libc::O_DSYNC, false), (libc::O_SYNC, false)] {
            let path = folder.path().join("image");
            let file = options.custom_flags(flags).open(path).unwrap();
            // Some other file system may be the temporary folder's.
            assert!(suitable || !is_suitable(&file).unwrap(), "{flags:#x}");
        }
    }
}
