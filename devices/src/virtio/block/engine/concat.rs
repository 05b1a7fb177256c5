//! Several files, one after the other, that are only read: many images' layers
//! in one disk, whose pages the host shares between VMs.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::operation::{Kind, retry};
use super::page_cache::read_cached;
use super::threads::Worker;
use crate::virtio::block::request::SECTOR;

/// The files.
#[derive(Debug, Default)]
pub struct Concat {
    parts: Vec<Part>,
    len: u64,
}

#[derive(Debug)]
struct Part {
    end: u64,
    start: u64,
    file: File,
}

impl Concat {
    /// Appends a file of a length, which must be one of whole sectors.
    pub fn push(&mut self, file: File, len: u64) -> io::Result<()> {
        let end = self.len.checked_add(len);
        match end.filter(|_| len > 0 && len.is_multiple_of(SECTOR)) {
            Some(end) => {
                let start = std::mem::replace(&mut self.len, end);
                self.parts.push(Part { end, start, file });
                Ok(())
            }
            None => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "its length is not one of whole sectors",
            )),
        }
    }

    /// The length of all of them.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// The part that has a byte.
    fn at(&self, offset: u64) -> Option<&Part> {
        let index = self.parts.partition_point(|part| part.end <= offset);
        self.parts.get(index)
    }
}

impl Worker for Concat {
    unsafe fn run(
        &self,
        kind: Kind,
        offset: u64,
        iovecs: *const libc::iovec,
        count: usize,
    ) -> io::Result<usize> {
        match kind {
            Kind::Flush => return Ok(0),
            Kind::Read => {}
            _ => return Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        }
        let Some(part) = self.at(offset) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        // SAFETY: the caller's promise.
        let buffers = unsafe { std::slice::from_raw_parts(iovecs, count) };
        // What lies behind the part's end is asked for again.
        let mut room = usize::try_from(part.end - offset).unwrap_or(usize::MAX);
        let mut clipped = Vec::with_capacity(count);
        for buffer in buffers {
            let len = buffer.iov_len.min(room);
            room -= len;
            clipped.push(libc::iovec {
                iov_base: buffer.iov_base,
                iov_len: len,
            });
            if room == 0 {
                break;
            }
        }
        let at = i64::try_from(offset - part.start).map_err(io::Error::other)?;
        let count = libc::c_int::try_from(clipped.len()).map_err(io::Error::other)?;
        let mut read = 0;
        retry(|| {
            // SAFETY: the buffers are valid, as the caller promises, and lie within
            // what was passed; there are as many as the queue has descriptors at most.
            match unsafe { libc::preadv(part.file.as_raw_fd(), clipped.as_ptr(), count, at) } {
                -1 => Err(io::Error::last_os_error()),
                len => {
                    read = len.cast_unsigned();
                    Ok(())
                }
            }
        })?;
        Ok(read)
    }

    unsafe fn try_at_once(
        &self,
        kind: Kind,
        offset: u64,
        iovecs: &[libc::iovec],
    ) -> Option<io::Result<usize>> {
        let part = self.at(offset).filter(|_| kind == Kind::Read)?;
        let len = iovecs.iter().fold(0, |sum: u64, iovec| {
            sum.saturating_add(iovec.iov_len as u64)
        });
        if len > part.end - offset {
            return None;
        }
        // SAFETY: the caller's promise.
        unsafe { read_cached(&part.file, offset - part.start, iovecs) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(byte: u8, len: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![byte; len]).unwrap();
        file
    }

    fn read(parts: &Concat, offset: u64, lens: &[usize]) -> io::Result<Vec<u8>> {
        let mut buffers: Vec<_> = lens.iter().map(|&len| vec![0xee; len]).collect();
        let iovecs: Vec<_> = buffers
            .iter_mut()
            .map(|buffer| libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            })
            .collect();
        // SAFETY: the buffers live until the call returns.
        let len = unsafe { parts.run(Kind::Read, offset, iovecs.as_ptr(), iovecs.len()) }?;
        let mut all = buffers.concat();
        assert!(all[len..].iter().all(|&byte| byte == 0xee));
        all.truncate(len);
        Ok(all)
    }

    #[test]
    fn a_read_ends_with_its_part_and_goes_on_in_the_next() {
        let mut parts = Concat::default();
        for (byte, sectors) in [(1, 1), (2, 2), (3, 1)] {
            let len = sectors * SECTOR as usize;
            parts.push(file(byte, len), len as u64).unwrap();
        }
        assert_eq!(parts.size(), 4 * SECTOR);
        assert_eq!(read(&parts, 0, &[512]).unwrap(), [1; 512]);
        assert_eq!(read(&parts, 0, &[300, 300]).unwrap(), [1; 512]);
        assert_eq!(read(&parts, 512, &[100, 200, 4000]).unwrap(), [2; 1024]);
        assert_eq!(read(&parts, 1024, &[512, 512]).unwrap(), [2; 512]);
        assert_eq!(read(&parts, 1536, &[512]).unwrap(), [3; 512]);
        assert!(read(&parts, 2048, &[512]).is_err());
        assert!(read(&parts, u64::MAX, &[512]).is_err());
    }

    #[test]
    fn only_whole_sectors_follow_each_other_and_nothing_is_written() {
        let mut parts = Concat::default();
        assert!(parts.push(file(1, 100), 100).is_err());
        assert!(parts.push(file(1, 0), 0).is_err());
        parts.push(file(1, 512), 512).unwrap();
        assert!(parts.push(file(1, 512), u64::MAX - 511).is_err());
        for kind in [Kind::Write { durable: false }, Kind::Discard { len: 512 }] {
            // SAFETY: there are no buffers.
            let result = unsafe { parts.run(kind, 0, std::ptr::null(), 0) };
            assert!(result.is_err());
        }
        // SAFETY: as above.
        assert!(unsafe { parts.run(Kind::Flush, 0, std::ptr::null(), 0) }.is_ok());
    }
}
