//! The block device (virtio 1.2, 5.2), on an image or a host's block device.

#![allow(unsafe_code, reason = "I/O by pointers to guest memory")]

mod engine;
#[cfg(test)]
mod qcow2_tests;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_blk as spec;

use self::engine::{Completion, DEPTH, Engine, Kind, Operation, Submitted, unprepared};
use self::request::{Action, Limits, Request, Status};
use super::device::{DeviceId, NeedsReset, Token, VirtioDevice};
use super::queues::Queues;
use super::round_robin::RoundRobin;
use super::state::{BlockState, DeviceState, RestoreError, SaveError};
use super::{GuestMemory, feature};
use crate::rate_limiter::{LimitHandle, Limits as RateLimits, RateLimiter};

pub use self::engine::{
    Backing, Concat, Image, ImageError, Prepare, Qcow2, qcow2_size, restricted_ring, try_ring,
};
pub use self::request::SECTOR;

const QUEUE_SIZE: u16 = DEPTH;
/// Data descriptors of a request: all but header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
// In sectors, of which a KiB has two.
const DISCARD_SECTORS_MAX: u32 = 2 << 20;
const ZEROES_SECTORS_MAX: u32 = 2 * 4 << 10;
const DISCARD_ALIGNMENT: u32 = 2 * 4;
/// Zeroes, for file systems that cannot make ranges read as such.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Bytes that were moved at once after which the guest begins to work on them, while the
/// device goes on.
const EARLY: usize = 32 << 10;

// Sources.
const COMPLETED: Token = 0;
const BUDGET: Token = 1;
const NEW_LIMITS: Token = 2;

/// The length of a disk's identifier.
pub const ID_LEN: usize = 20;

/// The host's side of a disk.
#[derive(Debug)]
pub struct Disk {
    /// An image, open as `read_only` says.
    pub image: Image,
    /// Its size in sectors.
    pub sectors: u64,
    /// The guest may not write.
    pub read_only: bool,
    /// What the guest sees as serial number, padded with NULs.
    pub id: [u8; ID_LEN],
    /// How many queues the guest may use, one or more.
    pub queues: u16,
    /// How much it may move.
    pub limits: RateLimits,
}

/// A request whose operation is in flight.
struct InFlight {
    request: Request,
    /// Where its chain came from.
    queue: usize,
    operation: Operation,
    /// Bytes that are not done yet, of a read or a write.
    rest: usize,
    /// What the used ring is told at the end.
    written: usize,
}

/// What was done since the device was made.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    reads: u64,
    read_bytes: u64,
    writes: u64,
    written_bytes: u64,
    flushes: u64,
    discards: u64,
    zeroes: u64,
    errors: u64,
}

/// The device.
pub struct Block {
    engine: Engine,
    limits: Limits,
    id: [u8; ID_LEN],
    config: Vec<u8>,
    /// The driver did not agree on flushes: writes must be durable at once.
    write_through: bool,
    /// Indexed by token; boxed, as the kernel holds pointers to its inside.
    in_flight: Vec<Option<Box<InFlight>>>,
    free: Vec<usize>,
    queue_sizes: Vec<u16>,
    /// Bytes that were moved at once since the guest may work on what it was given.
    moved: usize,
    /// The queues that may have chains which were not taken yet.
    turns: RoundRobin,
    limiter: RateLimiter,
    new_limits: LimitHandle,
    /// The guest knows another size, and is to be told that it changed.
    resized: bool,
    counters: Counters,
}

impl Block {
    /// A device on a disk.
    pub fn new(disk: Disk) -> io::Result<Self> {
        Self::with_engine(disk, |image| Engine::new(image, &unprepared()))
    }

    /// The same, whose threads are prepared.
    pub fn with_prepared(disk: Disk, prepare: &Arc<dyn Prepare>) -> io::Result<Self> {
        Self::with_engine(disk, |image| Engine::new(image, prepare))
    }

    fn with_engine(
        disk: Disk,
        engine: impl FnOnce(Image) -> io::Result<Engine>,
    ) -> io::Result<Self> {
        let limits = Limits {
            sectors: disk.sectors,
            read_only: disk.read_only,
            discard_sectors: DISCARD_SECTORS_MAX,
            zeroes_sectors: ZEROES_SECTORS_MAX,
        };
        Ok(Block {
            engine: engine(disk.image)?,
            limits,
            id: disk.id,
            config: config_space(disk.sectors, disk.queues),
            write_through: true,
            in_flight: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH.into()).rev().collect(),
            queue_sizes: vec![QUEUE_SIZE; disk.queues.max(1).into()],
            moved: 0,
            turns: RoundRobin::default(),
            limiter: RateLimiter::new(disk.limits)?,
            new_limits: LimitHandle::new(disk.limits)?,
            resized: false,
            counters: Counters::default(),
        })
    }

    /// Changes the limits while the device runs.
    pub fn limit_handle(&self) -> LimitHandle {
        self.new_limits.clone()
    }

    /// Starts a request, or completes it if there is nothing to wait for.
    fn start(
        &mut self,
        request: Request,
        queue: usize,
        queues: &mut Queues,
    ) -> Result<(), NeedsReset> {
        let durable = self.write_through;
        let (kind, offset, iovecs, rest, written) = match &request.action {
            Action::Refuse(status) => {
                let status = *status;
                return self.done(&request, queue, status, 0, queues);
            }
            Action::GetId { data } => {
                let len = data.write(&self.id);
                return self.done(&request, queue, Status::Ok, len, queues);
            }
            Action::Read { offset, data } => {
                (Kind::Read, *offset, data.iovecs(), data.len(), data.len())
            }
            Action::Write { offset, data } => (
                Kind::Write { durable },
                *offset,
                data.iovecs(),
                data.len(),
                0,
            ),
            Action::Flush => (Kind::Flush, 0, Vec::new(), 0, 0),
            Action::Discard { offset, len } => {
                (Kind::Discard { len: *len }, *offset, Vec::new(), 0, 0)
            }
            Action::WriteZeroes { offset, len, unmap } => {
                let (len, unmap) = (*len, *unmap);
                (Kind::Zero { len, unmap }, *offset, Vec::new(), 0, 0)
            }
        };
        let in_flight = Box::new(InFlight {
            request,
            queue,
            operation: Operation {
                kind,
                offset,
                iovecs,
            },
            rest,
            written,
        });
        self.submit(in_flight, queues)
    }

    fn submit(&mut self, in_flight: Box<InFlight>, queues: &mut Queues) -> Result<(), NeedsReset> {
        let slot = self.free.pop();
        let place = slot.and_then(|slot| Some((slot, self.in_flight.get_mut(slot)?)));
        let Some((slot, place)) = place else {
            // `process_queue` leaves chains in the ring rather than come here.
            return self.done(
                &in_flight.request,
                in_flight.queue,
                Status::IoError,
                0,
                queues,
            );
        };
        let operation = &place.insert(in_flight).operation;
        // SAFETY: the operation stays in its slot until its completion is
        // taken; it holds the buffers, which hold guest memory.
        let submitted = unsafe { self.engine.submit(slot as u64, operation) };
        if let Ok(Submitted::Started) = submitted {
            return Ok(());
        }
        self.free.push(slot);
        let Some(ended) = place.take() else {
            return Ok(());
        };
        match submitted {
            Ok(Submitted::Done(result)) => {
                self.moved = result.as_ref().map_or(0, |moved| self.moved + moved);
                self.ended(ended, result, queues)
            }
            _ => self.done(&ended.request, ended.queue, Status::IoError, 0, queues),
        }
    }

    /// Takes what is in flight by its token, which is its slot.
    fn take(&mut self, token: u64) -> Option<(usize, Box<InFlight>)> {
        let slot = usize::try_from(token).ok()?;
        Some((slot, self.in_flight.get_mut(slot)?.take()?))
    }

    fn complete(&mut self, completion: Completion, queues: &mut Queues) -> Result<(), NeedsReset> {
        let (token, result) = completion;
        let Some((slot, in_flight)) = self.take(token) else {
            return Ok(());
        };
        self.free.push(slot);
        self.ended(in_flight, result, queues)
    }

    /// An operation ended; the request may need another.
    fn ended(
        &mut self,
        mut in_flight: Box<InFlight>,
        result: io::Result<usize>,
        queues: &mut Queues,
    ) -> Result<(), NeedsReset> {
        let status = match (in_flight.operation.kind, result) {
            (Kind::Read | Kind::Write { .. }, Ok(count)) => {
                if count < in_flight.rest && count > 0 {
                    in_flight.advance(count);
                    return self.submit(in_flight, queues);
                }
                // A file that ends early was cut by somebody else.
                match count == in_flight.rest {
                    true => Status::Ok,
                    false => Status::IoError,
                }
            }
            (Kind::Discard { .. } | Kind::Zero { .. }, Ok(_)) if self.write_through => {
                in_flight.operation.kind = Kind::Flush;
                return self.submit(in_flight, queues);
            }
            (_, Ok(_)) => Status::Ok,
            (_, Err(error)) if error.kind() == io::ErrorKind::Interrupted => {
                return self.submit(in_flight, queues);
            }
            (Kind::Discard { .. }, Err(error)) if is_unsupported(&error) => Status::Unsupported,
            (Kind::Zero { len, .. }, Err(error)) if is_unsupported(&error) => {
                in_flight.write_zeroes(len, self.write_through);
                return self.submit(in_flight, queues);
            }
            (_, Err(error)) => {
                log::warn!("disk: {error}");
                Status::IoError
            }
        };
        self.done(
            &in_flight.request,
            in_flight.queue,
            status,
            in_flight.written,
            queues,
        )
    }

    /// Tells the driver how a request ended, and counts it. `written` is
    /// without the status.
    fn done(
        &mut self,
        request: &Request,
        queue: usize,
        status: Status,
        written: usize,
        queues: &mut Queues,
    ) -> Result<(), NeedsReset> {
        request.finish(status);
        let counters = &mut self.counters;
        let written = match status {
            Status::Ok => {
                match &request.action {
                    Action::Read { data, .. } => {
                        counters.reads += 1;
                        counters.read_bytes += data.len() as u64;
                    }
                    Action::Write { data, .. } => {
                        counters.writes += 1;
                        counters.written_bytes += data.len() as u64;
                    }
                    Action::Flush => counters.flushes += 1,
                    Action::Discard { .. } => counters.discards += 1,
                    Action::WriteZeroes { .. } => counters.zeroes += 1,
                    Action::GetId { .. } | Action::Refuse(_) => {}
                }
                written
            }
            Status::IoError | Status::Unsupported => {
                counters.errors += 1;
                0
            }
        };
        queues.complete(queue, request.head, written.saturating_add(1))
    }

    /// Waits for all that is in flight, so that nothing touches the guest.
    fn drain(&mut self) {
        while self.in_flight.iter().any(Option::is_some) {
            match self.engine.commit().and_then(|()| self.engine.wait()) {
                Ok(()) => {}
                // The kernel is short of memory for a moment.
                Err(error) if is_passing(&error) => {}
                // The buffers may still be written to: they must stay.
                Err(_) => std::process::abort(),
            }
            for (token, _) in self.engine.completions() {
                if let Some((slot, _)) = self.take(token) {
                    self.free.push(slot);
                }
            }
        }
    }

    /// Takes chains from all queues in turn, as long as there is room and budget.
    fn process_requests(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        while !self.turns.is_empty() {
            if self.free.is_empty() || !self.limiter.admits() {
                // A completion or the timer calls again. No queue has lost its turn.
                break;
            }
            let Some(queue) = self.turns.next() else {
                break;
            };
            let Some(chain) = queues.pop(queue)? else {
                self.turns.remove(queue);
                continue;
            };
            let request = Request::parse(&chain, self.limits)?;
            self.limiter.charge(request.moved());
            self.start(request, queue, queues)?;
            if self.moved >= EARLY {
                self.moved = 0;
                queues.interrupt_early(queue)?;
            }
        }
        Ok(())
    }

    /// Takes all that is completed. Each is taken, even behind a fault: what is left is
    /// waited for elsewhere.
    fn take_completions(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        let mut result = Ok(());
        for completion in self.engine.completions() {
            result = result.and(self.complete(completion, queues));
        }
        result
    }

    fn take_limits(&mut self) {
        if let Some(limits) = self.new_limits.take() {
            self.limiter.set(limits);
        }
    }

    /// Starts what the guest asks for.
    fn work(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        self.moved = 0;
        self.engine.begin();
        let served = self.process_requests(queues);
        self.commit(queues);
        served
    }

    fn commit(&mut self, queues: &mut Queues) {
        if let Err(error) = self.engine.commit() {
            log::warn!("disk: submitting: {error}");
            // The guest may wait for just these, and send no more.
            queues.reschedule();
        }
    }
}

impl InFlight {
    /// Leaves out what is done.
    fn advance(&mut self, count: usize) {
        self.rest -= count;
        self.operation.offset += count as u64;
        let mut skip = count;
        self.operation.iovecs.retain_mut(|iovec| {
            let len = skip.min(iovec.iov_len);
            skip -= len;
            iovec.iov_len -= len;
            // Within what it points to, or one behind and removed.
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(len);
            iovec.iov_len > 0
        });
    }

    /// Turns the operation into a write of zeroes.
    fn write_zeroes(&mut self, len: u64, durable: bool) {
        let mut rest = usize::try_from(len).unwrap_or(usize::MAX);
        self.rest = rest;
        self.operation.kind = Kind::Write { durable };
        while rest > 0 {
            let iov_len = rest.min(ZEROES.len());
            self.operation.iovecs.push(libc::iovec {
                iov_base: ZEROES.as_ptr().cast_mut().cast(),
                iov_len,
            });
            rest -= iov_len;
        }
    }
}

/// Neither the file system nor the format can do it, or a block device of
/// larger sectors not at this place.
fn is_unsupported(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, Unsupported};
    matches!(error.kind(), Unsupported | InvalidInput)
        || error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

/// A call that failed may succeed if it is made again.
fn is_passing(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    matches!(code, Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM))
}

/// `struct virtio_blk_config` (virtio 1.2, 5.2.4).
fn config_space(sectors: u64, queues: u16) -> Vec<u8> {
    let mut config = vec![0; 60];
    let mut put = |offset: usize, bytes: &[u8]| {
        for (target, byte) in config.iter_mut().skip(offset).zip(bytes) {
            *target = *byte;
        }
    };
    put(0, &sectors.to_le_bytes()); // capacity
    put(12, &SEGMENTS_MAX.to_le_bytes()); // seg_max
    put(34, &queues.to_le_bytes()); // num_queues
    put(36, &DISCARD_SECTORS_MAX.to_le_bytes()); // max_discard_sectors
    put(40, &1u32.to_le_bytes()); // max_discard_seg
    put(44, &DISCARD_ALIGNMENT.to_le_bytes()); // discard_sector_alignment
    put(48, &ZEROES_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    config
}

impl VirtioDevice for Block {
    fn id(&self) -> DeviceId {
        DeviceId::Block
    }

    fn features(&self) -> u64 {
        let common = feature(spec::VIRTIO_BLK_F_SEG_MAX) | feature(spec::VIRTIO_BLK_F_FLUSH);
        let several = match self.queue_sizes.len() {
            0 | 1 => 0,
            _ => feature(spec::VIRTIO_BLK_F_MQ),
        };
        common
            | several
            | match self.limits.read_only {
                true => feature(spec::VIRTIO_BLK_F_RO),
                false => {
                    feature(spec::VIRTIO_BLK_F_DISCARD) | feature(spec::VIRTIO_BLK_F_WRITE_ZEROES)
                }
            }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, acked: u64, _: &Arc<GuestMemory>) -> Result<(), NeedsReset> {
        self.write_through = acked & feature(spec::VIRTIO_BLK_F_FLUSH) == 0;
        // Sources are not heard before.
        self.take_limits();
        Ok(())
    }

    fn process_queue(&mut self, queue: usize, queues: &mut Queues) -> Result<(), NeedsReset> {
        if std::mem::take(&mut self.resized) {
            queues.config_changed();
        }
        self.turns.add(queue);
        self.work(queues)
    }

    fn sources(&self) -> Vec<(Token, RawFd)> {
        vec![
            (COMPLETED, self.engine.event()),
            (BUDGET, self.limiter.timer()),
            (NEW_LIMITS, self.new_limits.changed()),
        ]
    }

    fn handle_event(&mut self, token: Token, queues: &mut Queues) -> Result<(), NeedsReset> {
        let mut result = Ok(());
        match token {
            COMPLETED => result = self.take_completions(queues),
            BUDGET => self.limiter.acknowledge(),
            _ => self.take_limits(),
        }
        result.and_then(|()| self.work(queues))
    }

    fn quiesce(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        while self.in_flight.iter().any(Option::is_some) {
            match self.engine.commit().and_then(|()| self.engine.wait()) {
                Ok(()) => {}
                // The kernel is short of memory for a moment.
                Err(error) if is_passing(&error) => {}
                Err(_) => return Err(NeedsReset("the disk's requests cannot be waited for")),
            }
            self.take_completions(queues)?;
        }
        // Chains may have waited for room.
        queues.reschedule();
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::Block(BlockState {
            sectors: self.limits.sectors,
        }))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Block(BlockState { sectors }) = state else {
            return Err(RestoreError::Kind(DeviceId::Block));
        };
        self.resized = sectors != self.limits.sectors;
        Ok(())
    }

    fn reset(&mut self) {
        self.drain();
        self.resized = false;
        self.turns = RoundRobin::default();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let all = self.counters;
        vec![
            ("reads", all.reads),
            ("read_bytes", all.read_bytes),
            ("writes", all.writes),
            ("written_bytes", all.written_bytes),
            ("flushes", all.flushes),
            ("discards", all.discards),
            ("zeroes", all.zeroes),
            ("errors", all.errors),
            ("throttled", self.limiter.throttled()),
        ]
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.drain();
    }
}

// SAFETY: what the pointers in operations point to is guest memory, which is
// shared with vCPUs anyway, or constant.
unsafe impl Send for Block {}
