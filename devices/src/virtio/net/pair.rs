//! A pair of queues, and the host's end of it.

use std::collections::VecDeque;

use super::backend::{Backend, Incoming};
use super::{HEADER, NUM_BUFFERS};
use crate::virtio::chain::Chain;
use crate::virtio::device::NeedsReset;
use crate::virtio::queues::Queues;

/// What came of a try to receive.
pub enum Received {
    /// The guest has a packet of so many bytes.
    Packet(u64),
    /// It did not fit the guest's buffers, or was none.
    Lost,
    /// There is no packet, or the guest has no room; it will be told.
    Nothing,
}

/// The host's side of a pair.
pub struct Pair {
    pub end: Backend,
    /// Buffers that were taken, and wait for a packet.
    held: VecDeque<Chain>,
}

impl Pair {
    pub fn new(end: Backend) -> Self {
        Pair {
            end,
            held: VecDeque::new(),
        }
    }

    /// Forgets the guest's buffers, and what it did not get.
    pub fn reset(&mut self) {
        self.held.clear();
        self.end.reset();
    }

    /// Leaves the guest's buffers in the ring. They were taken last.
    pub fn put_back(&mut self, queue: usize, queues: &mut Queues) {
        for _ in self.held.drain(..) {
            queues.unpop(queue);
        }
    }

    /// Passes one packet to the guest.
    pub fn receive(
        &mut self,
        queue: usize,
        mergeable: bool,
        queues: &mut Queues,
    ) -> Result<Received, NeedsReset> {
        match self.end.poll() {
            Incoming::Packet => {}
            Incoming::Lost => return Ok(Received::Lost),
            Incoming::Nothing => return Ok(Received::Nothing),
        }
        let received = self.deliver(queue, mergeable, queues)?;
        if !matches!(received, Received::Nothing) {
            self.end.forget();
        }
        Ok(received)
    }

    /// Puts the waiting packet into the guest's buffers, if it has enough.
    fn deliver(
        &mut self,
        queue: usize,
        mergeable: bool,
        queues: &mut Queues,
    ) -> Result<Received, NeedsReset> {
        let packet = self.end.packet();
        let len = packet.len();
        let mut room: usize = self.held.iter().map(|chain| chain.writable.len()).sum();
        while room < len && (mergeable || self.held.is_empty()) {
            let Some(chain) = queues.pop(queue)? else {
                return Ok(Received::Nothing);
            };
            if !chain.readable.is_empty() || chain.writable.len() < HEADER {
                return Err(NeedsReset(
                    "a receive buffer must be writable and hold a header",
                ));
            }
            room += chain.writable.len();
            self.held.push_back(chain);
        }
        if room < len {
            return Ok(Received::Lost);
        }
        let mut rest = len;
        let count = self
            .held
            .iter()
            .take_while(|chain| {
                let more = rest > 0;
                rest = rest.saturating_sub(chain.writable.len());
                more
            })
            .count();
        let count_bytes = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        if let Some(field) = packet.get_mut(NUM_BUFFERS..HEADER) {
            field.copy_from_slice(&count_bytes);
        }
        let mut rest = &*packet;
        for chain in self.held.drain(..count) {
            let len = chain.writable.write(rest);
            rest = rest.get(len..).unwrap_or_default();
            queues.complete(queue, chain.head, len)?;
        }
        Ok(Received::Packet(len.saturating_sub(HEADER) as u64))
    }
}
