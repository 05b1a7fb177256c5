//! The network device (virtio 1.2, 5.1), on a TAP device of the host or on a
//! socket.
//!
//! A TAP speaks the same packet header as the guest, so checksums and
//! segmentation are passed through untouched. What the guest sends goes to the
//! host straight from its memory, and what a TAP has for it straight to its
//! buffers; what these have no room for goes to a buffer behind them, as only the
//! packet itself tells how long it is. Each pair of queues has a descriptor of the
//! TAP of its own.

mod backend;
mod control;
mod filter;
mod packet;
mod pair;
mod stream;
#[cfg(test)]
mod stream_tests;
mod tap;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_net as spec;

pub use self::backend::Backend;
pub use self::filter::{FrameFilter, Verdict};
pub use self::packet::HEADER;
use self::packet::PACKET_MAX;
use self::pair::{Pair, Received};
use super::device::{DeviceId, NeedsReset, Token, VirtioDevice};
use super::queues::Queues;
use super::round_robin::RoundRobin;
use super::state::{DeviceState, NetState, RestoreError, SaveError};
use super::{GuestMemory, feature};
use crate::rate_limiter::{LimitHandle, Limits, RateLimiter};

const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// Bytes after which the guest begins to work on what it received, while more comes.
const EARLY: u64 = if cfg!(test) { 32 << 10 } else { 256 << 10 };
/// Packets of the guest's in a round after which there is another in the same turn …
const SEVERAL_PACKETS: u64 = 2;
/// … but for the last.
const ROUNDS: usize = 16;
const STATUS_LINK_UP: u16 = 1;
/// Where the status is in the configuration space.
const STATUS: std::ops::Range<usize> = 6..8;

// Sources; those below are of the pairs' packets.
const RECEIVE_BUDGET: Token = 1 << 16;
const TRANSMIT_BUDGET: Token = RECEIVE_BUDGET + 1;
const NEW_LIMITS: Token = RECEIVE_BUDGET + 2;
/// From here on, of the pairs' room for packets.
const ROOM: Token = 1 << 17;
/// And from here on, of the timers of their filters.
const TIMER: Token = 1 << 18;

/// What each offers; the host's end adds some.
const FEATURES: [u32; 3] = [
    spec::VIRTIO_NET_F_MAC,
    spec::VIRTIO_NET_F_STATUS,
    spec::VIRTIO_NET_F_MRG_RXBUF,
];
/// What it needs to use several pairs of queues.
const SEVERAL: [u32; 2] = [spec::VIRTIO_NET_F_CTRL_VQ, spec::VIRTIO_NET_F_MQ];

/// The role of a queue (virtio 1.2, 5.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(usize),
    Transmit(usize),
    Control,
}

/// What passed, or did not, since the device was made.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    packets: u64,
    bytes: u64,
    drops: u64,
}

impl Counters {
    fn passed(&mut self, bytes: u64) {
        self.packets += 1;
        self.bytes += bytes;
    }
}

/// One way through the device.
struct Direction {
    /// Pairs that may have packets which did not pass yet.
    turns: RoundRobin,
    limiter: RateLimiter,
    counters: Counters,
}

impl Direction {
    fn new(limits: Limits) -> io::Result<Self> {
        Ok(Direction {
            turns: RoundRobin::default(),
            limiter: RateLimiter::new(limits)?,
            counters: Counters::default(),
        })
    }
}

/// The device.
pub struct Net {
    /// One or more.
    pairs: Vec<Pair>,
    /// How many of them the guest uses.
    used_pairs: usize,
    queue_sizes: Vec<u16>,
    config: Vec<u8>,
    mergeable: bool,
    /// Where the control queue is, if the guest has one.
    control: Option<usize>,
    receive: Direction,
    transmit: Direction,
    new_limits: LimitHandle,
    /// The guest is to be told that its link has changed.
    link_changed: bool,
}

impl Net {
    /// A device with a MAC address, on an end of the host's for each pair of
    /// queues. Each direction is limited by itself.
    pub fn new(ends: Vec<Backend>, mac: [u8; 6], limits: Limits) -> io::Result<Self> {
        let count = ends.len();
        let mut config = mac.to_vec();
        config.extend(STATUS_LINK_UP.to_le_bytes());
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * count];
        if count > 1 {
            let pairs = u16::try_from(count).map_err(io::Error::other)?;
            config.extend(pairs.to_le_bytes()); // max_virtqueue_pairs
            queue_sizes.push(CONTROL_SIZE);
        }
        Ok(Net {
            pairs: ends.into_iter().map(Pair::new).collect(),
            used_pairs: 1,
            queue_sizes,
            config,
            mergeable: false,
            control: None,
            receive: Direction::new(limits)?,
            transmit: Direction::new(limits)?,
            new_limits: LimitHandle::new(limits)?,
            link_changed: false,
        })
    }

    /// Changes the limits of both directions while the device runs.
    pub fn limit_handle(&self) -> LimitHandle {
        self.new_limits.clone()
    }

    fn role(&self, queue: usize) -> Role {
        match queue {
            queue if Some(queue) == self.control => Role::Control,
            queue if queue % 2 == 0 => Role::Receive(queue / 2),
            queue => Role::Transmit(queue / 2),
        }
    }

    /// The guest uses `count` pairs; false if it cannot. The TAP must not give
    /// packets to the others.
    fn use_pairs(&mut self, count: usize) -> bool {
        let attached = self
            .pairs
            .iter_mut()
            .enumerate()
            .try_for_each(|(index, pair)| pair.end.attach(index < count));
        if let Err(error) = &attached {
            log::warn!("network: attaching queues: {error}");
        }
        self.used_pairs = count;
        for index in 0..count {
            self.receive.turns.add(index);
            self.transmit.turns.add(index);
        }
        attached.is_ok()
    }

    fn take_limits(&mut self) {
        if let Some(limits) = self.new_limits.take() {
            self.receive.limiter.set(limits);
            self.transmit.limiter.set(limits);
        }
    }

    fn link_is_up(&self) -> bool {
        let status = self.config.get(STATUS);
        status.is_some_and(|status| *status != [0; 2])
    }

    /// Passes packets to the guest until there are none, or it has no room.
    fn receive(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        let (mut lost, mut given) = (0, 0);
        while let Some(index) = self.receive.turns.next() {
            let Some(pair) = self
                .pairs
                .get_mut(index)
                .filter(|_| index < self.used_pairs)
            else {
                self.receive.turns.remove(index);
                continue;
            };
            if !self.receive.limiter.admits() {
                break;
            }
            match pair.receive(2 * index, self.mergeable, queues)? {
                Received::Packet(bytes) => {
                    self.receive.limiter.charge(bytes);
                    self.receive.counters.passed(bytes);
                    given += bytes;
                    if given >= EARLY {
                        queues.interrupt_early(2 * index)?;
                        given = 0;
                    }
                }
                Received::Lost => {
                    self.receive.counters.drops += 1;
                    // These take no chain, whose number has a limit.
                    lost += 1;
                    if lost == QUEUE_SIZE {
                        queues.reschedule();
                        break;
                    }
                }
                Received::Nothing => self.receive.turns.remove(index),
            }
        }
        Ok(())
    }

    fn transmit(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        while let Some(index) = self.transmit.turns.next() {
            let Some(pair) = self
                .pairs
                .get_mut(index)
                .filter(|_| index < self.used_pairs)
            else {
                self.transmit.turns.remove(index);
                continue;
            };
            if !self.transmit.limiter.admits() || !pair.end.has_room() {
                break;
            }
            let queue = 2 * index + 1;
            let Some(chain) = queues.pop(queue)? else {
                self.transmit.turns.remove(index);
                continue;
            };
            if !chain.writable.is_empty() || chain.readable.len() < HEADER {
                return Err(NeedsReset(
                    "a packet to send must be readable and have a header",
                ));
            }
            let bytes = (chain.readable.len() - HEADER) as u64;
            self.transmit.limiter.charge(bytes);
            match chain.readable.len() <= PACKET_MAX && pair.end.send(&chain) {
                true => self.transmit.counters.passed(bytes),
                false => self.transmit.counters.drops += 1,
            }
            if pair.end.has_answers() {
                self.receive.turns.add(index);
            }
            queues.complete(queue, chain.head, 0)?;
        }
        Ok(())
    }

    /// Passes packets both ways. What the guest sends may be answered here, so it comes first.
    fn pass(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        let transmitted = self.transmit(queues);
        self.pairs.iter_mut().for_each(|pair| pair.end.flush());
        transmitted?;
        self.receive(queues)
    }

    /// Passes packets as long as several come at a time: a guest that sends meanwhile need
    /// not tell, and one that is answered meanwhile has one interrupt for all.
    fn work(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        if std::mem::take(&mut self.link_changed) {
            queues.config_changed();
        }
        for _ in 0..ROUNDS {
            let sent = self.transmit.counters.packets;
            self.pass(queues)?;
            if self.transmit.counters.packets.wrapping_sub(sent) < SEVERAL_PACKETS {
                break;
            }
            (0..self.used_pairs).for_each(|index| self.transmit.turns.add(index));
        }
        for pair in &mut self.pairs {
            if let Some(reason) = pair.end.take_loss() {
                log::warn!("network: the link is down: {reason}");
                if let Some(status) = self.config.get_mut(STATUS) {
                    status.fill(0);
                }
                queues.config_changed();
            }
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> DeviceId {
        DeviceId::Net
    }

    fn features(&self) -> u64 {
        let several = match self.pairs.len() {
            0 | 1 => &[][..],
            _ => &SEVERAL,
        };
        let ends = self.pairs.first().map(|pair| pair.end.features());
        let all = FEATURES
            .iter()
            .chain(several)
            .chain(ends.unwrap_or_default());
        all.fold(0, |all, &bit| all | feature(bit))
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, acked: u64, _: &Arc<GuestMemory>) -> Result<(), NeedsReset> {
        let has = |bit| acked & feature(bit) != 0;
        self.mergeable = has(spec::VIRTIO_NET_F_MRG_RXBUF);
        // It is behind the pairs that the driver knows of.
        let behind = match has(spec::VIRTIO_NET_F_MQ) {
            true => 2 * self.pairs.len(),
            false => 2,
        };
        self.control = has(spec::VIRTIO_NET_F_CTRL_VQ).then_some(behind);
        if let Some(pair) = self.pairs.first() {
            pair.end.set_offloads(acked);
        }
        // Sources are not heard before.
        self.take_limits();
        Ok(())
    }

    fn process_queue(&mut self, queue: usize, queues: &mut Queues) -> Result<(), NeedsReset> {
        match self.role(queue) {
            Role::Receive(index) => self.receive.turns.add(index),
            Role::Transmit(index) => self.transmit.turns.add(index),
            Role::Control => self.control(queue, queues)?,
        }
        self.work(queues)
    }

    fn sources(&self) -> Vec<(Token, RawFd)> {
        let ends = || self.pairs.iter().map(|pair| &pair.end);
        let packets = (0..).zip(ends().map(Backend::source));
        let room = (ROOM..).zip(ends());
        let room = room.filter_map(|(token, end)| Some((token, end.room_source()?)));
        let timers = (TIMER..).zip(ends());
        let timers = timers.filter_map(|(token, end)| Some((token, end.timer_source()?)));
        packets
            .chain(room)
            .chain(timers)
            .chain([
                (RECEIVE_BUDGET, self.receive.limiter.timer()),
                (TRANSMIT_BUDGET, self.transmit.limiter.timer()),
                (NEW_LIMITS, self.new_limits.changed()),
            ])
            .collect()
    }

    fn handle_event(&mut self, token: Token, queues: &mut Queues) -> Result<(), NeedsReset> {
        match token {
            RECEIVE_BUDGET => self.receive.limiter.acknowledge(),
            TRANSMIT_BUDGET => self.transmit.limiter.acknowledge(),
            NEW_LIMITS => self.take_limits(),
            TIMER.. => {
                let index = (token - TIMER) as usize;
                if let Some(pair) = self.pairs.get_mut(index) {
                    pair.end.handle_timer();
                    self.receive.turns.add(index);
                }
            }
            // Its pair has its turn still.
            ROOM..TIMER => {}
            end => self.receive.turns.add(end as usize),
        }
        self.work(queues)
    }

    fn quiesce(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            pair.put_back(2 * index, queues);
        }
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::Net(NetState {
            // There are no more pairs than the configuration space can tell.
            used_pairs: u16::try_from(self.used_pairs).unwrap_or(u16::MAX),
            link_up: self.link_is_up(),
        }))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Net(NetState {
            used_pairs,
            link_up,
        }) = state
        else {
            return Err(RestoreError::Kind(DeviceId::Net));
        };
        let count = usize::from(used_pairs);
        if !(1..=self.pairs.len()).contains(&count) || !self.use_pairs(count) {
            return Err(RestoreError::Mismatch(
                "the network has not as many pairs of queues",
            ));
        }
        self.link_changed = link_up != self.link_is_up();
        Ok(())
    }

    fn reset(&mut self) {
        self.link_changed = false;
        for pair in &mut self.pairs {
            pair.reset();
        }
        self.control = None;
        self.use_pairs(1);
        self.receive.turns = RoundRobin::default();
        self.transmit.turns = RoundRobin::default();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let (rx, tx) = (self.receive.counters, self.transmit.counters);
        let throttled = self.receive.limiter.throttled() + self.transmit.limiter.throttled();
        let mut all = vec![
            ("rx_packets", rx.packets),
            ("rx_bytes", rx.bytes),
            ("rx_drops", rx.drops),
            ("tx_packets", tx.packets),
            ("tx_bytes", tx.bytes),
            ("tx_drops", tx.drops),
            ("throttled", throttled),
        ];
        all.extend(self.pairs.iter().flat_map(|pair| pair.end.counters()));
        all
    }
}
