//! I/O on a raw image by io_uring.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, opcode, types};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Completion, DEPTH, Kind, Operation, retry};

/// The file's index among those that the kernel keeps for the ring: it need not
/// look the descriptor up each time.
const FILE: types::Fixed = types::Fixed(0);

/// A ring, and the file that its operations are on.
pub struct Uring {
    ring: IoUring,
    _file: File,
    event: EventFd,
}

impl Uring {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let ring = IoUring::new(DEPTH as u32)?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Uring {
            ring,
            _file: file,
            event,
        })
    }

    /// # Safety
    ///
    /// The buffers must stay valid until the operation is completed.
    pub(super) unsafe fn submit(&mut self, token: u64, operation: &Operation) -> io::Result<()> {
        let (iovecs, count) = (operation.iovecs.as_ptr(), operation.iovecs.len() as u32);
        let entry = match (operation.kind, operation.kind.allocation()) {
            (_, Some((mode, len))) => opcode::Fallocate::new(FILE, len)
                .offset(operation.offset)
                .mode(mode)
                .build(),
            // One buffer needs no copy of a list.
            (Kind::Read, _) => match single(operation) {
                Some((buffer, len)) => opcode::Read::new(FILE, buffer, len)
                    .offset(operation.offset)
                    .build(),
                None => opcode::Readv::new(FILE, iovecs, count)
                    .offset(operation.offset)
                    .build(),
            },
            (Kind::Write { durable }, _) => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                match single(operation) {
                    Some((buffer, len)) => opcode::Write::new(FILE, buffer, len)
                        .offset(operation.offset)
                        .rw_flags(flags)
                        .build(),
                    None => opcode::Writev::new(FILE, iovecs, count)
                        .offset(operation.offset)
                        .rw_flags(flags)
                        .build(),
                }
            }
            _ => opcode::Fsync::new(FILE)
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
        // The event is not read: it is watched on edges, and each completion is one.
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

/// The buffer of an operation that has one.
fn single(operation: &Operation) -> Option<(*mut u8, u32)> {
    match operation.iovecs.as_slice() {
        [buffer] => Some((buffer.iov_base.cast(), u32::try_from(buffer.iov_len).ok()?)),
        _ => None,
    }
}
