//! What the guest sent and the host's peer does not take yet.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use crate::virtio::chain::Buffer;

/// A ring, that has memory only while it holds any bytes.
pub struct Backlog {
    capacity: usize,
    ring: Box<[u8]>,
    start: usize,
    len: usize,
}

impl Backlog {
    /// One that can hold so many bytes.
    pub fn new(capacity: usize) -> Self {
        Backlog {
            capacity,
            ring: Box::default(),
            start: 0,
            len: 0,
        }
    }

    /// How many bytes it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many bytes it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// It holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many more it can hold.
    pub fn room(&self) -> usize {
        self.capacity - self.len
    }

    /// Copies a range of a buffer, which must have room.
    pub fn push(&mut self, from: &Buffer, offset: usize, len: usize) {
        if self.ring.is_empty() {
            self.ring = vec![0; self.capacity].into_boxed_slice();
        }
        let len = len.min(self.room());
        let end = (self.start + self.len) % self.capacity;
        let first = len.min(self.capacity - end);
        for (at, offset, len) in [(end, offset, first), (0, offset + first, len - first)] {
            from.read_at(offset, self.ring.get_mut(at..at + len).unwrap_or_default());
        }
        self.len += len;
    }

    /// Sends what the peer takes; returns how much that was.
    pub fn send(&mut self, peer: &impl AsRawFd) -> io::Result<usize> {
        let first = self.len.min(self.capacity - self.start);
        let part = |bytes: &[u8]| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let parts = [
            part(self.ring.get(self.start..self.start + first).unwrap_or(&[])),
            part(self.ring.get(..self.len - first).unwrap_or(&[])),
        ];
        // SAFETY: the parts lie in the ring, which is borrowed until the end.
        let sent = unsafe { send(peer.as_raw_fd(), &parts) }?;
        self.len -= sent;
        self.start = (self.start + sent) % self.capacity;
        if self.len == 0 {
            self.clear();
        }
        Ok(sent)
    }

    /// Forgets what it holds.
    pub fn clear(&mut self) {
        *self = Backlog::new(self.capacity);
    }
}

/// Sends to a socket, without blocking and without a signal.
///
/// # Safety
///
/// The vectors must point to memory that can be read until the call returns.
pub unsafe fn send(socket: RawFd, vectors: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: a structure of numbers and pointers that may be null.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_ptr().cast_mut();
    message.msg_iovlen = vectors.len();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    loop {
        // SAFETY: the vectors are live, and what they point to is as the caller says.
        let sent = unsafe { libc::sendmsg(socket, &message, flags) };
        match usize::try_from(sent) {
            Ok(sent) => return Ok(sent),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
