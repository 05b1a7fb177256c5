//! What the guest sent and the host's peer does not take yet.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;

use rustix::io::retry_on_intr;
use rustix::net::{SendFlags, sendmsg};

use crate::virtio::chain::Buffer;

/// A ring, that has memory only while it holds any bytes.
pub struct Backlog {
    capacity: usize,
    ring: Box<[u8]>,
    start: usize,
    len: usize,
}

impl Backlog {
    /// One that can hold the given number of bytes.
    pub fn new(capacity: usize) -> Self {
        Backlog {
            capacity,
            ring: Box::default(),
            start: 0,
            len: 0,
        }
    }

    /// The most bytes that it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The number of bytes that it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// It holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number of bytes that it can still take.
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
    pub fn send(&mut self, peer: &impl AsFd) -> io::Result<usize> {
        let first = self.len.min(self.capacity - self.start);
        let parts = [
            IoSlice::new(self.ring.get(self.start..self.start + first).unwrap_or(&[])),
            IoSlice::new(self.ring.get(..self.len - first).unwrap_or(&[])),
        ];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = retry_on_intr(|| sendmsg(peer, &parts, &mut Default::default(), flags))?;
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
