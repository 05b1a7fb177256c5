//! The queues of an active device: the only place that touches rings.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::GuestMemory;
use super::chain::Chain;
use super::interrupt::Interrupter;
use super::needs_reset::NeedsReset;
use crate::number;

struct Active {
    queue: Queue,
    /// How many chains the device may still take before others get a turn.
    share: u16,
    /// The device found no more chains in this turn: the driver is to tell of the next one.
    emptied: bool,
    /// The used ring's index when it was last decided whether to interrupt the guest.
    decided: u16,
}

// The split ring (virtio 1.2, 2.7.6 and 2.7.8).
/// Where an index and, behind it, the entries of a ring are.
const INDEX: u64 = 2;
const ENTRIES: u64 = 4;
/// The sizes of an entry of the ring that the driver writes, and of the other.
const AVAILABLE_ENTRY: u64 = 2;
const USED_ENTRY: usize = 8;
/// A flag of the driver's: it need not be interrupted.
const NO_INTERRUPT: u16 = 1;

impl Active {
    /// Gives chains back, with how many bytes were written to each. The driver sees all of
    /// them at once.
    fn complete(
        &mut self,
        memory: &GuestMemory,
        chains: impl Iterator<Item = (u16, usize)>,
    ) -> Result<(), NeedsReset> {
        let failed = NeedsReset("the used ring cannot be written");
        let ring = self.queue.used_ring();
        let size = self.queue.size();
        let mut next = self.queue.next_used();
        // Looked up once for all of them.
        let len = usize::from(size) * USED_ENTRY;
        let entries = memory.get_slice(GuestAddress(ring.wrapping_add(ENTRIES)), len);
        let entries = entries.map_err(|_| failed)?;
        for (head, len) in chains {
            if head >= size {
                return Err(NeedsReset("a chain is none of the queue's"));
            }
            let slot = usize::from(next % size);
            let used = u64::from(number::length(len)) << 32 | u64::from(head);
            let entry = entries.write_obj(used.to_le(), slot * USED_ENTRY);
            entry.map_err(|_| failed)?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        let index = GuestAddress(ring.wrapping_add(INDEX));
        memory
            .store(next.to_le(), index, Ordering::Release)
            .map_err(|_| failed)
    }

    /// Asks the driver to tell of the next chain. If there is one already, it returns true,
    /// and the driver need not tell.
    fn enable_notifications(&mut self, memory: &GuestMemory) -> Result<bool, NeedsReset> {
        let more = self.queue.enable_notification(memory);
        more.map_err(|_| NeedsReset("a ring cannot be written"))
    }

    /// How many chains were used since it was last decided whether to interrupt.
    fn undecided(&self) -> u64 {
        self.queue.next_used().wrapping_sub(self.decided).into()
    }

    /// Whether the guest wants to be interrupted for what was used since this was last
    /// asked (virtio 1.2, 2.7.7.2).
    fn wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, NeedsReset> {
        let (used, before) = (self.queue.next_used(), self.decided);
        if used == before {
            return Ok(false);
        }
        self.decided = used;
        // What was used is seen before it is looked whether the guest waits for that.
        fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        let load = |offset: u64| {
            let field = memory.load(GuestAddress(ring.wrapping_add(offset)), Ordering::Relaxed);
            let field = field.map_err(|_| NeedsReset("a ring cannot be read"))?;
            Ok(u16::from_le(field))
        };
        if !self.queue.event_idx_enabled() {
            return Ok(load(0)? & NO_INTERRUPT == 0);
        }
        let event = load(ENTRIES + AVAILABLE_ENTRY * u64::from(self.queue.size()))?;
        let behind = used.wrapping_sub(event).wrapping_sub(1);
        Ok(behind < used.wrapping_sub(before))
    }
}

/// A queue for another process: its parts' addresses in this process, each in one
/// piece of the guest's memory.
pub struct Ring<'a> {
    /// The number of descriptors (virtio 1.2, 2.6).
    pub size: u16,
    /// The table of descriptors.
    pub descriptors: u64,
    /// The ring that the driver writes.
    pub available: u64,
    /// The ring that the device writes.
    pub used: u64,
    /// Signalled when there are chains.
    pub kick: &'a EventFd,
}

/// The queues of a device. Those that the driver left out are always empty.
pub struct Queues {
    memory: Arc<GuestMemory>,
    interrupter: Arc<Interrupter>,
    queues: Vec<Option<Active>>,
    exhausted: bool,
    interrupt: bool,
    config_changed: bool,
    chains: u64,
    /// Chains that were given back since the guest was last interrupted.
    given: u64,
}

impl Queues {
    /// Checks the queues and takes them over.
    pub(super) fn new(
        memory: &Arc<GuestMemory>,
        states: &[QueueState],
        interrupter: &Arc<Interrupter>,
    ) -> Result<Self, NeedsReset> {
        let activate = |state: &QueueState| {
            if !state.ready {
                return Ok(None);
            }
            let queue = Queue::try_from(*state).map_err(|_| NeedsReset("a queue is malformed"))?;
            if !queue.is_valid(&**memory) {
                return Err(NeedsReset("a queue lies outside of memory"));
            }
            Ok(Some(Active {
                decided: queue.next_used(),
                queue,
                share: 0,
                emptied: false,
            }))
        };
        Ok(Queues {
            memory: memory.clone(),
            interrupter: interrupter.clone(),
            queues: states.iter().map(activate).collect::<Result<_, _>>()?,
            exhausted: false,
            interrupt: false,
            config_changed: false,
            chains: 0,
            given: 0,
        })
    }

    pub(super) fn states(&self) -> impl Iterator<Item = Option<QueueState>> {
        self.queues
            .iter()
            .map(|queue| queue.as_ref().map(|active| active.queue.state()))
    }

    /// The queues, to be run by another process.
    pub(super) fn rings<'a>(
        &self,
        kicks: &'a [EventFd],
    ) -> Result<Vec<Option<Ring<'a>>>, NeedsReset> {
        /// Lengths of the parts: of one entry, and of what else there is (virtio
        /// 1.2, 2.7).
        const DESCRIPTORS: (usize, usize) = (16, 0);
        const AVAILABLE: (usize, usize) = (2, 6);
        const USED: (usize, usize) = (8, 6);
        let ring = |active: &Active, kick: &'a EventFd| {
            let queue = &active.queue;
            let address = |part: u64, (entry, rest): (usize, usize)| {
                let len = entry * usize::from(queue.size()) + rest;
                let slice = self.memory.get_slice(GuestAddress(part), len);
                let slice =
                    slice.map_err(|_| NeedsReset("a queue is not in one piece of memory"))?;
                Ok(slice.ptr_guard().as_ptr() as u64)
            };
            Ok(Ring {
                size: queue.size(),
                descriptors: address(queue.desc_table(), DESCRIPTORS)?,
                available: address(queue.avail_ring(), AVAILABLE)?,
                used: address(queue.used_ring(), USED)?,
                kick,
            })
        };
        let all = self.queues.iter().zip(kicks);
        all.map(|(active, kick)| active.as_ref().map(|active| ring(active, kick)).transpose())
            .collect()
    }

    /// Begins a turn of the device.
    pub(super) fn begin(&mut self) {
        self.exhausted = false;
        for active in self.queues.iter_mut().flatten() {
            active.share = active.queue.size();
            active.emptied = false;
        }
    }

    /// Ends a turn: interrupts the guest if it waits for what it was given back, and has it
    /// tell of new chains in queues that are empty.
    ///
    /// That is asked for so late because a driver that adds chains while the device is at
    /// work need not leave the guest to tell of them.
    pub(super) fn end(&mut self) -> Result<(), NeedsReset> {
        let mut interrupt = std::mem::take(&mut self.interrupt);
        for active in self.queues.iter_mut().flatten() {
            self.given += active.undecided();
            interrupt |= active.wants_interrupt(&self.memory)?;
        }
        if interrupt {
            let given = std::mem::take(&mut self.given);
            self.interrupter.raise_for_chains(given);
        }
        for active in self.queues.iter_mut().flatten() {
            if active.emptied && active.enable_notifications(&self.memory)? {
                self.exhausted = true;
            }
        }
        Ok(())
    }

    /// Who runs the queues has used chains: the guest is notified when this turn ends.
    pub fn interrupt(&mut self) {
        self.interrupt = true;
    }

    /// The device's configuration changed: the guest is notified when this turn ends.
    pub fn config_changed(&mut self) {
        self.config_changed = true;
    }

    pub(super) fn take_config_changed(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    /// How many chains were taken since this was last asked.
    pub(super) fn take_chains(&mut self) -> u64 {
        std::mem::take(&mut self.chains)
    }

    /// The device stops here, though there is more to do: it is called again
    /// for all its queues once others had their turn.
    pub fn reschedule(&mut self) {
        self.exhausted = true;
    }

    /// The device had its share, and there may be more.
    pub(super) fn exhausted(&self) -> bool {
        self.exhausted
    }

    /// Do not tell when chains are added: the device looks by itself.
    pub(super) fn suppress_notifications(&mut self, queue: usize) -> Result<(), NeedsReset> {
        match self.queues.get_mut(queue) {
            Some(Some(active)) => active
                .queue
                .disable_notification(&*self.memory)
                .map_err(|_| NeedsReset("a ring cannot be written")),
            _ => Ok(()),
        }
    }

    /// Takes the next chain. When there is none, the driver will tell of the next one once
    /// this turn has ended; the device may also look again before.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, NeedsReset> {
        let Some(Some(active)) = self.queues.get_mut(queue) else {
            return Ok(None);
        };
        if active.share == 0 {
            self.exhausted = true;
            return Ok(None);
        }
        let unreadable = NeedsReset("the available ring cannot be read");
        // The second time there must be a chain, unless the ring lies.
        for _ in 0..2 {
            let ahead = NeedsReset("the available index is ahead by more than the queue's size");
            let mut chains = active.queue.iter(&*self.memory).map_err(|_| ahead)?;
            if let Some(descriptors) = chains.next() {
                active.emptied = false;
                active.share -= 1;
                self.chains += 1;
                let limit = active.queue.size();
                return Chain::parse(&self.memory, descriptors, limit).map(Some);
            }
            let index = active.queue.avail_idx(&*self.memory, Ordering::Acquire);
            if index.map_err(|_| unreadable)?.0 == active.queue.next_avail() {
                active.emptied = true;
                return Ok(None);
            }
        }
        Err(unreadable)
    }

    /// Leaves the chain that was taken last, and not completed, to be taken again. Called
    /// several times, it leaves as many, the last first.
    pub fn unpop(&mut self, queue: usize) {
        if let Some(Some(active)) = self.queues.get_mut(queue) {
            active.queue.go_to_previous_position();
            active.share = active.share.saturating_add(1);
            // There is a chain, whatever was found behind it.
            active.emptied = false;
            self.chains = self.chains.saturating_sub(1);
        }
    }

    /// Gives a chain back, with `len` bytes written to it.
    pub fn complete(&mut self, queue: usize, head: u16, len: usize) -> Result<(), NeedsReset> {
        self.complete_together(queue, std::iter::once((head, len)))
    }

    /// Gives chains back, with how many bytes were written to each. The driver sees all of
    /// them at once.
    pub fn complete_together(
        &mut self,
        queue: usize,
        chains: impl Iterator<Item = (u16, usize)>,
    ) -> Result<(), NeedsReset> {
        match self.queues.get_mut(queue) {
            Some(Some(active)) => active.complete(&self.memory, chains),
            _ => Ok(()),
        }
    }

    /// Interrupts the guest now for what it was given back, if it waits for that, so that
    /// it works while the device goes on.
    pub fn interrupt_early(&mut self, queue: usize) -> Result<(), NeedsReset> {
        if let Some(Some(active)) = self.queues.get_mut(queue) {
            self.given += active.undecided();
            if active.wants_interrupt(&self.memory)? {
                let given = std::mem::take(&mut self.given);
                self.interrupter.raise_for_chains(given);
            }
        }
        Ok(())
    }
}
