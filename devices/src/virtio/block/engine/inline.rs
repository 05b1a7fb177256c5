//! Transfers from and to the page cache, which are done at once.
//!
//! What the page cache has is read without blocking (`RWF_NOWAIT`), by the caller itself. Several
//! file systems (ext4 among them) refuse buffered writes that must not block, and so a ring
//! hands each of them to a thread of the kernel's: two wake-ups for a copy that takes
//! microseconds. Here such a write is made by the caller. It may block, when the host has too
//! many dirty pages; so one that took long is followed by a pause, in which writes are the
//! ring's again. A caller thus spends a hundredth of its time in writes that block, at most.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::time::{Duration, Instant};

use super::operation::{Kind, Operation};
use super::threads::Worker;

/// How much is moved at once in a turn of the device, so that others have theirs.
const TURN_MAX: usize = 1 << 20;
/// A transfer that takes longer has blocked.
const LONG: Duration = Duration::from_millis(2);
/// The pause after it, in times of what it took.
const PAUSE: u32 = 100;

/// The file systems whose writes are made at once: those that are local, and refuse to be
/// asked not to block. (`linux/magic.h`)
const EXT4: libc::c_long = 0xef53;
const TMPFS: libc::c_long = 0x0102_1994;

/// Decides which transfers are made at once.
#[derive(Debug, Default)]
pub struct Inline {
    /// How much may still be moved in this turn.
    left: usize,
    /// The end of the pause after a transfer that blocked.
    paused: Option<Instant>,
}

impl Inline {
    /// A turn begins.
    pub fn begin(&mut self) {
        self.left = TURN_MAX;
    }

    /// Makes a transfer, if it is one to make at once, and if that can be.
    pub fn run(
        &mut self,
        operation: &Operation,
        transfer: impl FnOnce() -> Option<io::Result<usize>>,
    ) -> Option<io::Result<usize>> {
        if !matches!(operation.kind, Kind::Read | Kind::Write { durable: false }) {
            return None;
        }
        let len = operation.len();
        if len > self.left {
            return None;
        }
        let start = Instant::now();
        if self.paused.is_some_and(|end| start < end) {
            return None;
        }
        let moved = transfer();
        self.took(start, start.elapsed());
        self.left = match &moved {
            Some(Ok(count)) => self.left.saturating_sub(*count),
            // What follows is probably as this one.
            _ => 0,
        };
        match moved {
            Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => None,
            moved => moved,
        }
    }

    /// A transfer began, and took a time.
    fn took(&mut self, start: Instant, time: Duration) {
        self.paused = (time > LONG)
            .then(|| start.checked_add(time.saturating_mul(PAUSE)))
            .flatten();
    }
}

/// What can be done with a file's pages at once.
#[derive(Clone, Copy, Debug)]
pub struct PageCache {
    /// Writes are copies into the page cache, and do not block but for want of memory.
    writes: bool,
}

impl PageCache {
    pub fn new(file: &File) -> io::Result<Self> {
        Ok(PageCache {
            writes: is_suitable(file)?,
        })
    }

    /// Reads what the page cache has, if that is all that is asked for, or writes to it; none
    /// if that cannot be done at once.
    ///
    /// # Safety
    ///
    /// As of [`Worker::run`].
    pub unsafe fn transfer(
        self,
        file: &File,
        kind: Kind,
        offset: u64,
        iovecs: &[libc::iovec],
    ) -> Option<io::Result<usize>> {
        match kind {
            // SAFETY: the caller's promise.
            Kind::Read => unsafe { read_cached(file, offset, iovecs) },
            Kind::Write { durable: false } if self.writes => {
                // SAFETY: the caller's promise.
                Some(unsafe { file.run(kind, offset, iovecs.as_ptr(), iovecs.len()) })
            }
            _ => None,
        }
    }
}

/// Reads all of a range that the page cache has; none if a part is missing, or if the file
/// system cannot tell.
///
/// # Safety
///
/// As of [`Worker::run`].
pub unsafe fn read_cached(
    file: &File,
    offset: u64,
    iovecs: &[libc::iovec],
) -> Option<io::Result<usize>> {
    let offset = libc::off_t::try_from(offset).ok()?;
    let count = libc::c_int::try_from(iovecs.len()).ok()?;
    let asked = iovecs
        .iter()
        .fold(0, |sum: usize, iovec| sum.saturating_add(iovec.iov_len));
    let (fd, flags) = (file.as_raw_fd(), libc::RWF_NOWAIT);
    // SAFETY: the caller's promise.
    let read = unsafe { libc::preadv2(fd, iovecs.as_ptr(), count, offset, flags) };
    let read = usize::try_from(read).ok()?;
    (read == asked).then_some(Ok(read))
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

    fn inline() -> Inline {
        let mut inline = Inline::default();
        inline.begin();
        inline
    }

    fn moves(inline: &mut Inline, kind: Kind, data: &mut [u8]) -> bool {
        let operation = Operation {
            kind,
            offset: 0,
            iovecs: vec![libc::iovec {
                iov_base: data.as_mut_ptr().cast(),
                iov_len: data.len(),
            }],
        };
        let done = inline.run(&operation, || Some(Ok(data.len())));
        done.is_some_and(|moved| moved.unwrap() == data.len())
    }

    const PIECE: usize = 64 << 10;
    const WRITE: Kind = Kind::Write { durable: false };

    #[test]
    fn a_turn_moves_so_much_at_once() {
        let mut inline = inline();
        let mut large = vec![1; PIECE];
        for _ in 0..TURN_MAX / PIECE {
            assert!(moves(&mut inline, WRITE, &mut large));
        }
        assert!(!moves(&mut inline, WRITE, &mut large[..512]));
        inline.begin();
        assert!(moves(&mut inline, Kind::Read, &mut large[..512]));
        // What cannot be done at once is the last that is tried in its turn.
        let read = Operation {
            kind: Kind::Read,
            offset: 0,
            iovecs: Vec::new(),
        };
        assert!(inline.run(&read, || None).is_none());
        assert!(!moves(&mut inline, Kind::Read, &mut large[..512]));
    }

    #[test]
    fn only_transfers_are_made_at_once() {
        let mut inline = inline();
        let durable = Kind::Write { durable: true };
        for kind in [durable, Kind::Flush, Kind::Discard { len: 512 }] {
            assert!(!moves(&mut inline, kind, &mut [1; 512]), "{kind:?}");
        }
        assert!(moves(&mut inline, WRITE, &mut [1; 512]));
    }

    #[test]
    fn after_a_write_that_blocked_there_is_a_pause() {
        let mut inline = inline();
        let now = Instant::now();
        inline.took(now, Duration::from_secs(1));
        assert!(!moves(&mut inline, WRITE, &mut [1; 512]));
        assert_eq!(inline.paused, Some(now + Duration::from_secs(100)));
        inline.took(now, LONG);
        assert!(moves(&mut inline, WRITE, &mut [1; 512]));
    }

    #[test]
    fn what_is_read_at_once_is_whole() {
        use std::io::Write;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 1024]).unwrap();
        let mut data = [0u8; 1024];
        let vector = libc::iovec {
            iov_base: data.as_mut_ptr().cast(),
            iov_len: data.len(),
        };
        // SAFETY: the buffer lives until the calls return.
        let read = |offset| unsafe { read_cached(&file, offset, &[vector]) };
        let behind_the_end = read(512);
        // A file system may not be able to tell.
        if let Some(read) = read(0) {
            assert_eq!(read.unwrap(), 1024);
            assert_eq!(data, [7; 1024]);
        }
        assert!(behind_the_end.is_none());
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
