//! A pair of queues, and the host's end of it.

use std::collections::VecDeque;

use super::backend::Backend;
use super::packet::{HEADER, Incoming, NUM_BUFFERS, PACKET_MAX};
use crate::virtio::chain::Chain;
use crate::virtio::device::NeedsReset;
use crate::virtio::queues::Queues;

/// What came of a try to receive.
pub enum Received {
    /// The guest has a packet, of this size in bytes.
    Packet(u64),
    /// It did not fit the guest's buffers, or was none.
    Lost,
    /// There is no packet, or the guest has no room; it will be told.
    Nothing,
}

/// Buffers of the guest's for packets, which were taken from the ring.
#[derive(Default)]
pub struct Held {
    chains: VecDeque<Chain>,
    /// How many bytes they have.
    room: usize,
}

impl Held {
    /// Takes buffers until there is as much room as asked for; if they are not mergeable,
    /// one, as a packet goes to one. False if the guest has no more.
    fn fill(
        &mut self,
        len: usize,
        queue: usize,
        mergeable: bool,
        queues: &mut Queues,
    ) -> Result<bool, NeedsReset> {
        while self.room < len && (mergeable || self.chains.is_empty()) {
            let Some(chain) = queues.pop(queue)? else {
                return Ok(false);
            };
            if !chain.readable.is_empty() || chain.writable.len() < HEADER {
                return Err(NeedsReset(
                    "a receive buffer must be writable and hold a header",
                ));
            }
            self.room += chain.writable.len();
            self.chains.push_back(chain);
        }
        Ok(true)
    }

    fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// Copies bytes to where they are in a packet; they have room.
    fn write(&self, offset: usize, data: &[u8]) {
        let (mut skip, mut rest) = (offset, data);
        for chain in &self.chains {
            if rest.is_empty() {
                break;
            }
            let len = chain.writable.write_at(skip, rest);
            rest = rest.get(len..).unwrap_or_default();
            skip = skip.saturating_sub(chain.writable.len());
        }
    }

    /// Copies the first bytes of a packet from them.
    fn read(&self, data: &mut [u8]) {
        let mut rest = data;
        for chain in &self.chains {
            let len = chain.writable.read(rest);
            rest = rest.get_mut(len..).unwrap_or_default();
        }
    }

    /// Gives the guest a packet that lies in the buffers but for its number of buffers. It
    /// sees none of them before it can see all.
    fn give(&mut self, len: usize, queue: usize, queues: &mut Queues) -> Result<(), NeedsReset> {
        let mut rest = len;
        let used = |chain: &Chain| {
            let used = chain.writable.len().min(rest);
            rest -= used;
            (used > 0).then_some((chain.head, used))
        };
        let count = self.chains.iter().map_while(used).count();
        let bytes = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        self.write(NUM_BUFFERS, &bytes);
        let (mut rest, room) = (len, &mut self.room);
        let used = self.chains.drain(..count).map(|chain| {
            let used = chain.writable.len().min(rest);
            rest -= used;
            *room -= chain.writable.len();
            (chain.head, used)
        });
        queues.complete_together(queue, used)
    }
}

/// The host's side of a pair.
pub struct Pair {
    pub end: Backend,
    /// Buffers that wait for a packet.
    held: Held,
}

impl Pair {
    pub fn new(end: Backend) -> Self {
        Pair {
            end,
            held: Held::default(),
        }
    }

    /// Forgets the guest's buffers, and what it did not get.
    pub fn reset(&mut self) {
        self.held = Held::default();
        self.end.reset();
    }

    /// Leaves the guest's buffers in the ring. They were taken last. A packet of which a
    /// part lies in them waits on, whole.
    pub fn put_back(&mut self, queue: usize, queues: &mut Queues) {
        self.end.take_back(|placed| self.held.read(placed));
        for _ in self.held.chains.drain(..) {
            queues.unpop(queue);
        }
        self.held.room = 0;
    }

    /// Passes one packet to the guest.
    pub fn receive(
        &mut self,
        queue: usize,
        mergeable: bool,
        queues: &mut Queues,
    ) -> Result<Received, NeedsReset> {
        if self.end.places() && !self.end.is_waiting() {
            // A packet is read where it belongs, so that there must be room first.
            self.held.fill(PACKET_MAX, queue, mergeable, queues)?;
            if self.held.is_empty() {
                return Ok(Received::Nothing);
            }
        }
        let buffers = self.held.chains.iter().map(|chain| &chain.writable);
        match self.end.poll(buffers) {
            Incoming::Packet => {}
            Incoming::Lost => return Ok(Received::Lost),
            Incoming::Nothing => return Ok(Received::Nothing),
        }
        let (len, placed) = self.end.waiting();
        let more = self.held.fill(len, queue, mergeable, queues)?;
        if !more {
            // It waits for buffers.
            return Ok(Received::Nothing);
        }
        let fits = len <= self.held.room;
        if fits {
            self.held.write(placed, self.end.rest());
            self.held.give(len, queue, queues)?;
        }
        self.end.forget();
        match fits {
            true => Ok(Received::Packet(len.saturating_sub(HEADER) as u64)),
            false => Ok(Received::Lost),
        }
    }
}
