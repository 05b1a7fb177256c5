//! I/O on a raw image by io_uring.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, opcode, types};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Completion, DEPTH, Kind, Operation, retry};

/// A ring, and the file that its operations are on.
pub struct Uring {
    ring: IoUring,
    file: File,
    event: EventFd,
}

impl Uring {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let ring = IoUring::new(DEPTH as u32)?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Uring { ring, file, event })
    }

    /// # Safety
    ///
    /// The buffers must stay valid until the operation is completed.
    pub(super) unsafe fn submit(&mut self, token: u64, operation: &Operation) -> io::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        let (iovecs, count) = (operation.iovecs.as_ptr(), operation.iovecs.len() as u32);
        let entry = match (operation.kind, operation.kind.allocation()) {
            (_, Some((mode, len))) => opcode::Fallocate::new(fd, len)
                .offset(operation.offset)
                .mode(mode)
                .build(),
            (Kind::Read, _) => opcode::Readv::new(fd, iovecs, count)
                .offset(operation.offset)
                .build(),
            (Kind::Write { durable }, _) => opcode::Writev::new(fd, iovecs, count)
                .offset(operation.offset)
                .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            _ => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        };
        // SAFETY: the caller keeps the buffers valid until the completion.
        unsafe { self.ring.submission().push(&entry.user_data(token)) }
            .map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))
    }

    pub(super) fn commit(&mut self) -> io::Result<()> {
        retry(|| self.ring.submit().map(drop))
    }

    pub(super) fn wait(&mut self) -> io::Result<()> {
        retry(|| self.ring.submit_and_wait(1).map(drop))
    }

    pub(super) fn completions(&mut self) -> Vec<Completion> {
        let _ = self.event.read();
        let result =
            |value: i32| usize::try_from(value).map_err(|_| io::Error::from_raw_os_error(-value));
        self.ring
            .completion()
            .map(|entry| (entry.user_data(), result(entry.result())))
            .collect()
    }

    pub(super) fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}
