//! Operations on an image.

use std::io;

/// How many operations may be in flight.
pub const DEPTH: u16 = 256;

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
    pub fn allocation(self) -> Option<(libc::c_int, u64)> {
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

impl Operation {
    /// How many bytes the buffers have.
    pub fn len(&self) -> usize {
        self.iovecs
            .iter()
            .fold(0, |sum, iovec| sum.saturating_add(iovec.iov_len))
    }
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

/// Does something again that a signal has interrupted.
pub fn retry(mut operation: impl FnMut() -> io::Result<()>) -> io::Result<()> {
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
