//! A descriptor chain, read once and checked (virtio 1.2, 2.7.5).
//!
//! The descriptors lie in memory that the guest may change at any time: they
//! are copied here before anything is believed. What a chain points to is
//! guest memory all right, but its content may still change under our eyes.

use std::ptr;
use std::sync::Arc;

use smallvec::SmallVec;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::GuestMemory;
use super::needs_reset::NeedsReset;

/// A part of guest memory, known to lie in one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    addr: GuestAddress,
    len: usize,
    /// Where it lies in this process: looked up once, as a buffer for packets has many parts
    /// in little time.
    host: usize,
}

impl Part {
    /// What is behind its first `skip` bytes; it is no shorter than that.
    fn behind(self, skip: usize) -> Part {
        Part {
            addr: self.addr.unchecked_add(skip as u64),
            len: self.len - skip,
            host: self.host + skip,
        }
    }

    fn iovec(self) -> libc::iovec {
        libc::iovec {
            iov_base: ptr::with_exposed_provenance_mut(self.host),
            iov_len: self.len,
        }
    }
}

/// One half of a chain: what the device reads, or what it writes.
#[derive(Clone, Debug)]
pub struct Buffer {
    memory: Arc<GuestMemory>,
    /// Mostly one: it needs no allocation then.
    parts: SmallVec<[Part; 1]>,
    len: usize,
}

/// A chain whose descriptors were checked.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Where it starts, which names it in the used ring.
    pub head: u16,
    /// The device-readable part.
    pub readable: Buffer,
    /// The device-writable part.
    pub writable: Buffer,
}

impl Chain {
    /// Reads and checks a chain of at most `limit` descriptors.
    pub(super) fn parse(
        memory: &Arc<GuestMemory>,
        descriptors: DescriptorChain<&GuestMemory>,
        limit: u16,
    ) -> Result<Self, NeedsReset> {
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: Buffer::empty(memory),
            writable: Buffer::empty(memory),
        };
        let mut last: Option<Descriptor> = None;
        for (count, descriptor) in (1..).zip(descriptors) {
            if count > u32::from(limit) {
                return Err(NeedsReset("a chain is longer than its queue"));
            }
            if !descriptor.is_write_only() && !chain.writable.parts.is_empty() {
                return Err(NeedsReset("a chain is readable behind what is writable"));
            }
            let half = if descriptor.is_write_only() {
                &mut chain.writable
            } else {
                &mut chain.readable
            };
            half.push(&descriptor)?;
            last = Some(descriptor);
        }
        // The iterator just ends where it finds a chain malformed.
        match last {
            Some(last) if !last.has_next() => Ok(chain),
            Some(_) => Err(NeedsReset("a chain does not end, or leaves its table")),
            None => Err(NeedsReset("a chain has no descriptor")),
        }
    }
}

impl Buffer {
    fn empty(memory: &Arc<GuestMemory>) -> Self {
        Buffer {
            memory: memory.clone(),
            parts: SmallVec::new(),
            len: 0,
        }
    }

    fn push(&mut self, descriptor: &Descriptor) -> Result<(), NeedsReset> {
        let (addr, len) = (descriptor.addr(), descriptor.len() as usize);
        if len == 0 {
            return Ok(());
        }
        let slice = self.memory.get_slice(addr, len);
        let slice = slice.map_err(|_| NeedsReset("a descriptor points outside of memory"))?;
        let host = slice.ptr_guard_mut().as_ptr().expose_provenance();
        // The iterator keeps the sum below 4 GiB.
        self.len += len;
        self.parts.push(Part { addr, len, host });
        Ok(())
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// It has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Splits it in two at an offset, which may lie beyond its end.
    pub fn split_at(&self, offset: usize) -> (Buffer, Buffer) {
        let (mut head, mut tail) = (Buffer::empty(&self.memory), Buffer::empty(&self.memory));
        for part in &self.parts {
            let len = part.len.min(offset.saturating_sub(head.len));
            if len > 0 {
                head.len += len;
                head.parts.push(Part { len, ..*part });
            }
            if len < part.len {
                tail.len += part.len - len;
                tail.parts.push(part.behind(len));
            }
        }
        (head, tail)
    }

    /// Its parts from an offset on, at most `len` bytes of them.
    fn range(&self, offset: usize, len: usize) -> impl Iterator<Item = Part> {
        let (mut skip, mut rest) = (offset, len);
        self.parts.iter().filter_map(move |part| {
            let before = skip.min(part.len);
            skip -= before;
            let len = (part.len - before).min(rest);
            rest -= len;
            (len > 0).then(|| Part {
                len,
                ..part.behind(before)
            })
        })
    }

    /// Copies its first bytes to `data`; returns how many there were.
    pub fn read(&self, data: &mut [u8]) -> usize {
        self.read_at(0, data)
    }

    /// Copies its bytes from an offset on to `data`; returns how many there were.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for part in self.range(offset, data.len()) {
            let Some(target) = data.get_mut(done..done + part.len) else {
                break;
            };
            if self.memory.read_slice(target, part.addr).is_err() {
                break;
            }
            done += part.len;
        }
        done
    }

    /// Copies `data` to its first bytes; returns how many had room.
    pub fn write(&self, data: &[u8]) -> usize {
        self.write_at(0, data)
    }

    /// Copies `data` to its bytes from an offset on; returns how many had room.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> usize {
        let mut rest = data;
        for part in self.range(offset, data.len()) {
            let (source, behind) = rest.split_at_checked(part.len).unwrap_or((rest, &[]));
            if self.memory.write_slice(source, part.addr).is_err() {
                break;
            }
            rest = behind;
        }
        data.len() - rest.len()
    }

    /// Where it lies in guest memory: start and length of each part.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.parts
            .iter()
            .map(|part| (part.addr.raw_value(), part.len as u64))
    }

    /// The buffer for a system call. The pointers are valid while this, or a
    /// clone of it, lives: it holds the memory.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        self.parts.iter().map(|part| part.iovec()).collect()
    }

    /// A range of the buffer for a system call, without allocating: as much of
    /// it as `room` takes. The pointers are valid while this lives.
    pub fn vectors<'a>(
        &self,
        offset: usize,
        len: usize,
        room: &'a mut [libc::iovec],
    ) -> &'a [libc::iovec] {
        let mut count = 0;
        for (vector, part) in room.iter_mut().zip(self.range(offset, len)) {
            *vector = part.iovec();
            count += 1;
        }
        room.get(..count).unwrap_or_default()
    }
}
