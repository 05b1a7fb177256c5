//! Doing I/O without blocking: raw images by io_uring, or by threads where it
//! is refused; other formats by threads.

mod concat;
mod inline;
mod qcow2;
mod threads;
mod uring;

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use self::threads::Threads;
use self::uring::Uring;

pub use self::concat::Concat;
pub use self::qcow2::{ImageError, Qcow2, qcow2_size};
#[cfg(test)]
pub use self::threads::Worker;
pub use self::threads::{Prepare, unprepared};
pub use self::uring::{restricted_ring, try_ring};

/// How many operations may be in flight.
pub const DEPTH: u16 = 256;

/// An opened disk image, in the format that its owner says it has.
#[derive(Debug)]
pub enum Image {
    /// The disk's bytes, whatever they are; or a host's block device.
    Raw(File),
    /// QEMU's format.
    Qcow2(Box<Qcow2>),
    /// Files one after the other.
    Concat(Concat),
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads to the buffers.
    Read,
    /// Writes from the buffers; durable at its end if so asked.
    Write { durable: bool },
    /// Makes what was written durable.
    Flush,
    /// The range's content does not matter any more.
    Discard { len: u64 },
    /// The range shall read as zeroes, and may give its room back.
    Zero { len: u64, unmap: bool },
}

impl Kind {
    /// The mode and length for `fallocate`, if it is what a raw image needs.
    fn allocation(self) -> Option<(libc::c_int, u64)> {
        match self {
            Kind::Discard { len } | Kind::Zero { len, unmap: true } => {
                Some((libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, len))
            }
            // Not FALLOC_FL_KEEP_SIZE: with it the kernel allocates beyond the file's end
            // whatever its limit of size is, and so the sandbox forbids that. The disk ends
            // where its file does, so that this changes no size.
            Kind::Zero { len, unmap: false } => Some((libc::FALLOC_FL_ZERO_RANGE, len)),
            Kind::Read | Kind::Write { .. } | Kind::Flush => None,
        }
    }
}

/// An operation. Its owner keeps it, unmoved, and what its buffers point to,
/// until it is completed.
#[derive(Debug)]
pub struct Operation {
    /// What to do.
    pub kind: Kind,
    /// Where on the disk.
    pub offset: u64,
    /// The buffers of a read or write.
    pub iovecs: Vec<libc::iovec>,
}

/// A completed operation: its token, and how many bytes or which error.
pub type Completion = (u64, io::Result<usize>);

/// What became of an operation that was to be started.
#[derive(Debug)]
pub enum Submitted {
    /// It is under way, and will be among the completions.
    Started,
    /// It is done: how many bytes, or which error.
    Done(io::Result<usize>),
}

/// Does I/O on one image.
pub enum Engine {
    /// By the kernel.
    Uring(Box<Uring>),
    /// By threads.
    Threads(Threads),
}

impl Engine {
    /// What suits the image and this host best.
    pub fn new(image: Image, prepare: &Arc<dyn Prepare>) -> io::Result<Self> {
        let file = match image {
            Image::Raw(file) => file,
            Image::Qcow2(_) | Image::Concat(_) => return Engine::threads(image, prepare),
        };
        match Uring::new(file.try_clone()?, prepare) {
            Ok(uring) => Ok(Engine::Uring(Box::new(uring))),
            Err(error) => {
                log::info!("io_uring is not available ({error}); using threads");
                Engine::threads(Image::Raw(file), prepare)
            }
        }
    }

    /// Threads, whatever the host allows.
    pub fn threads(image: Image, prepare: &Arc<dyn Prepare>) -> io::Result<Self> {
        let threads = match image {
            Image::Raw(file) => Threads::new(Arc::new(file), prepare),
            Image::Qcow2(qcow2) => Threads::new(Arc::new(*qcow2), prepare),
            Image::Concat(parts) => Threads::new(Arc::new(parts), prepare),
        };
        threads.map(Engine::Threads)
    }

    /// A turn of the device begins. What is quick may be done at once, if the guest waits for
    /// each request by itself: beside several, it is better started and given back together.
    pub fn begin(&mut self, one_by_one: bool) {
        if let Engine::Uring(uring) = self {
            uring.begin(one_by_one);
        }
    }

    /// Starts an operation, or does it at once.
    ///
    /// # Safety
    ///
    /// The buffers must stay valid until the operation is completed.
    pub unsafe fn submit(&mut self, token: u64, operation: &Operation) -> io::Result<Submitted> {
        match self {
            // SAFETY: the caller's promise.
            Engine::Uring(uring) => unsafe { uring.submit(token, operation) },
            Engine::Threads(threads) => {
                // SAFETY: the caller's promise.
                unsafe { threads.submit(token, operation) };
                Ok(Submitted::Started)
            }
        }
    }

    /// Makes sure that what was submitted is under way.
    pub fn commit(&mut self) -> io::Result<()> {
        match self {
            Engine::Uring(uring) => uring.commit(),
            Engine::Threads(_) => Ok(()),
        }
    }

    /// Takes what is completed.
    pub fn completions(&mut self) -> Vec<Completion> {
        match self {
            Engine::Uring(uring) => uring.completions(),
            Engine::Threads(threads) => threads.completions(),
        }
    }

    /// Waits until something is completed. Something must be in flight.
    pub fn wait(&mut self) -> io::Result<()> {
        match self {
            Engine::Uring(uring) => uring.wait(),
            Engine::Threads(threads) => threads.wait(),
        }
    }

    /// Signalled when something is completed: to be watched on edges.
    pub fn event(&self) -> RawFd {
        match self {
            Engine::Uring(uring) => uring.event(),
            Engine::Threads(threads) => threads.event(),
        }
    }
}

fn retry(mut operation: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match operation() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sandbox knows two modes (`resources/seccomp/io.json`): of the others, some allocate
    /// beyond the limit of the file's size.
    #[test]
    fn only_two_modes_of_fallocate_are_asked_for() {
        let free = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let zero = libc::FALLOC_FL_ZERO_RANGE;
        let len = 512;
        for (kind, mode) in [
            (Kind::Discard { len }, Some(free)),
            (Kind::Zero { len, unmap: true }, Some(free)),
            (Kind::Zero { len, unmap: false }, Some(zero)),
            (Kind::Write { durable: true }, None),
            (Kind::Flush, None),
        ] {
            assert_eq!(kind.allocation(), mode.map(|mode| (mode, len)));
        }
    }
}
