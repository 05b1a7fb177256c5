//! I/O on a raw image by io_uring.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::{IoUring, opcode, types};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::inline::Inline;
use super::operation::{Completion, DEPTH, Kind, Operation, Submitted, retry};
use super::page_cache::PageCache;
use super::threads::{Prepare, Threads};

/// The file's index among those that the kernel keeps for the ring: it need not
/// look the descriptor up each time.
const FILE: types::Fixed = types::Fixed(0);

/// A ring, and the file that its operations are on.
pub struct Uring {
    ring: IoUring,
    file: File,
    cache: PageCache,
    inline: Inline,
    event: EventFd,
    /// A thread that frees and zeroes ranges, if the file may be written to: a ring's
    /// `fallocate` would take any mode.
    allocator: Option<Threads>,
    /// How many operations it has.
    allocating: usize,
}

/// Tells whether the host lets us have a ring.
pub fn try_ring() -> io::Result<()> {
    IoUring::new(1).map(drop)
}

/// A ring that does I/O on one file, and can never do more: what it does is seen by no
/// filter of system calls. `fallocate` is not part of it, as its mode cannot be restricted,
/// and some modes allocate beyond all limits. Kernels before 5.10 refuse it.
pub fn restricted_ring(entries: u32, file: RawFd, event: RawFd) -> io::Result<IoUring> {
    let ring = IoUring::builder().setup_r_disabled().build(entries)?;
    let submitter = ring.submitter();
    submitter.register_eventfd(event)?;
    submitter.register_files(&[file])?;
    let operations = [
        opcode::Read::CODE,
        opcode::Readv::CODE,
        opcode::Write::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
    ];
    let mut restrictions = Vec::from(operations.map(Restriction::sqe_op));
    // Without a word of them, nothing more can be registered.
    restrictions.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
    submitter.register_restrictions(&mut restrictions)?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

impl Uring {
    pub(super) fn new(file: File, prepare: &Arc<dyn Prepare>) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let ring = restricted_ring(DEPTH.into(), file.as_raw_fd(), event.as_raw_fd())?;
        let writable = is_writable(&file)?;
        let allocator = writable.then(|| {
            let file = Arc::new(file.try_clone()?);
            Threads::signalling(&event, 1, file, prepare)
        });
        Ok(Uring {
            ring,
            cache: PageCache::new(&file)?,
            inline: Inline::default(),
            file,
            allocator: allocator.transpose()?,
            allocating: 0,
            event,
        })
    }

    /// A turn of the device begins.
    pub(super) fn begin(&mut self) {
        self.inline.begin();
    }

    /// # Safety
    ///
    /// The buffers must stay valid until the operation is completed.
    pub(super) unsafe fn submit(
        &mut self,
        token: u64,
        operation: &Operation,
    ) -> io::Result<Submitted> {
        let Operation {
            kind,
            offset,
            iovecs,
        } = operation;
        let (cache, file) = (self.cache, &self.file);
        // SAFETY: the caller's promise.
        let transfer = || unsafe { cache.transfer(file, *kind, *offset, iovecs) };
        // A write waits for the inode's lock, which punching a hole keeps all the time.
        let waits = self.allocating > 0 && matches!(kind, Kind::Write { .. });
        if !waits && let Some(moved) = self.inline.run(operation, transfer) {
            return Ok(Submitted::Done(moved));
        }
        let iovecs = operation.iovecs.as_ptr();
        let count = u32::try_from(operation.iovecs.len()).map_err(io::Error::other)?;
        if operation.kind.allocation().is_some() {
            let allocator = self.allocator.as_mut();
            let allocator = allocator.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
            // SAFETY: the caller's promise.
            unsafe { allocator.submit(token, operation) };
            self.allocating += 1;
            return Ok(Submitted::Started);
        }
        let entry = match operation.kind {
            // One buffer needs no copy of a list.
            Kind::Read => match single(operation) {
                Some((buffer, len)) => opcode::Read::new(FILE, buffer, len)
                    .offset(operation.offset)
                    .build(),
                None => opcode::Readv::new(FILE, iovecs, count)
                    .offset(operation.offset)
                    .build(),
            },
            Kind::Write { durable } => {
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
            .map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
        Ok(Submitted::Started)
    }

    pub(super) fn commit(&mut self) -> io::Result<()> {
        retry(|| self.ring.submit().map(drop))
    }

    /// May return early if something is allocated: the event tells of both then, and also of
    /// what is taken already.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        match &self.allocator {
            Some(allocator) if self.allocating > 0 => {
                retry(|| self.ring.submit().map(drop))?;
                allocator.wait()
            }
            _ => retry(|| self.ring.submit_and_wait(1).map(drop)),
        }
    }

    pub(super) fn completions(&mut self) -> Vec<Completion> {
        // The event is read only for the allocator's sake, and before what it tells of is
        // taken: it is watched on edges, and each completion is one.
        let mut done = match &mut self.allocator {
            Some(allocator) if self.allocating > 0 => allocator.completions(),
            _ => Vec::new(),
        };
        self.allocating = self.allocating.saturating_sub(done.len());
        let result =
            |value: i32| usize::try_from(value).map_err(|_| io::Error::from_raw_os_error(-value));
        let by_ring = self.ring.completion();
        done.extend(by_ring.map(|entry| (entry.user_data(), result(entry.result()))));
        done
    }

    pub(super) fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// Whether a file was opened for writing.
fn is_writable(file: &File) -> io::Result<bool> {
    // SAFETY: an open descriptor, and a number.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) } {
        -1 => Err(io::Error::last_os_error()),
        flags => Ok(flags & libc::O_ACCMODE != libc::O_RDONLY),
    }
}

/// The buffer of an operation that has one.
fn single(operation: &Operation) -> Option<(*mut u8, u32)> {
    match operation.iovecs.as_slice() {
        [buffer] => Some((buffer.iov_base.cast(), u32::try_from(buffer.iov_len).ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(ring: &mut IoUring, entry: &io_uring::squeue::Entry) -> i32 {
        // SAFETY: what the entries below point to lives to the test's end.
        unsafe { ring.submission().push(entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    #[test]
    fn a_ring_is_for_one_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let other = tempfile::tempfile().unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut ring = restricted_ring(4, file.as_raw_fd(), event.as_raw_fd()).unwrap();
        let mut buffer = [1; 16];
        let (start, len) = (buffer.as_mut_ptr(), 16);
        let read = opcode::Read::new(FILE, start, len).build();
        assert_eq!(result(&mut ring, &read), 16);

        let nowhere = types::Fd(libc::AT_FDCWD);
        let open = opcode::OpenAt::new(nowhere, c"/etc/passwd".as_ptr()).build();
        assert_eq!(result(&mut ring, &open), -libc::EACCES);
        for mode in 0..0x80 {
            let allocate = opcode::Fallocate::new(FILE, 4096).mode(mode).build();
            assert_eq!(result(&mut ring, &allocate), -libc::EACCES, "{mode:#x}");
        }
        let other = types::Fd(other.as_raw_fd());
        let read = opcode::Read::new(other, start, len).build();
        assert_eq!(result(&mut ring, &read), -libc::EACCES);
        let more = ring.submitter().register_files_update(0, &[other.0]);
        assert_eq!(more.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}
