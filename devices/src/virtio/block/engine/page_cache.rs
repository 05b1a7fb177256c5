//! Reads and writes of a file that the page cache answers at once.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

use super::operation::Kind;
use super::threads::Worker;

/// The file systems whose writes are made at once: those that are local, and refuse to be
/// asked not to block. (`linux/magic.h`)
const EXT4: libc::c_long = 0xef53;
const TMPFS: libc::c_long = 0x0102_1994;

/// What can be done with a file's pages at once.
#[derive(Clone, Copy, Debug)]
pub struct PageCache {
    /// Writes are copies into the page cache. They block for want of memory, or to read the rest
    /// of a page.
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
