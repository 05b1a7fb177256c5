//! The memory balloon (virtio 1.2, 5.5): the guest gives pages up when the host
//! wants some, and, with reporting, those that it does not use anyway.
//!
//! What the guest gives up really goes back to the host ([`Reclaim`]), and
//! reads as zeroes when the guest takes it again. Nobody may rely on that, but
//! nothing is shown that is not the guest's. `VIRTIO_BALLOON_F_PAGE_POISON` is
//! not offered: Linux, when it fills free pages itself (`init_on_free`), then
//! does not report them.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::chain::{Buffer, Chain};
use super::device::{DeviceId, NeedsReset, Token, VirtioDevice};
use super::queues::Queues;
use super::state::{BalloonState, DeviceState, RestoreError, SaveError};
use super::{GuestMemory, feature};
use crate::bus::lock;

const F_STATS_VQ: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_REPORTING: u32 = 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
/// The queue of reports is the last of five. Linux before 6.11 does not count
/// queues that are not there, such as the one before it: then it is the fourth.
/// Reports have a size of their own: Linux requires it.
const QUEUE_SIZES: [u16; 5] = [16, 16, 16, 32, 32];
const QUEUES_WITHOUT_REPORTING: usize = 3;

/// The pages of the specification.
const PAGE_SHIFT: u32 = 12;
/// How many pages a request names at most: Linux sends 256.
const PAGES_MAX: usize = 1024;
const PFN: usize = size_of::<u32>();

/// Where the driver writes how large the balloon is.
const ACTUAL: u64 = 4;

/// A statistic: a tag of 16 bits and a value of 64 (virtio 1.2, 5.5.6.4).
const STATISTIC: usize = 10;
const STATISTICS_MAX: usize = 32;
/// The names of the tags; the last ones are Linux' of 6.12.
const NAMES: [&str; 16] = [
    "swapped_in_bytes",
    "swapped_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "cache_bytes",
    "hugepage_allocations",
    "hugepage_failures",
    "oom_kills",
    "allocation_stalls",
    "scanned_pages_background",
    "scanned_pages_direct",
    "reclaimed_pages_background",
    "reclaimed_pages_direct",
];

/// Takes pages of guest memory for the host.
pub trait Reclaim: Send {
    /// Takes the whole pages of a range of guest memory; what they held is lost.
    /// Returns how many bytes were taken, or `None` if some of the range is not
    /// guest memory.
    fn reclaim(&mut self, start: u64, len: u64) -> Option<u64>;
}

/// What the driver last said of the guest's memory.
#[derive(Clone, Debug)]
pub struct Statistics {
    /// When the driver said it.
    pub when: Instant,
    /// By name, in no order.
    pub values: Vec<(&'static str, u64)>,
}

#[derive(Default)]
struct Shared {
    /// In pages.
    target: u32,
    actual: u32,
    statistics: Option<Statistics>,
    /// Newer ones are wanted.
    wanted: bool,
}

/// Commands a balloon.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Mutex<Shared>>,
    wake: Arc<EventFd>,
}

impl BalloonHandle {
    /// Asks the guest for a balloon of that many bytes; whole pages count.
    pub fn set_target(&self, bytes: u64) {
        lock(&self.shared).target = u32::try_from(bytes >> PAGE_SHIFT).unwrap_or(u32::MAX);
        self.wake();
    }

    /// The size that the guest was asked for, in bytes.
    pub fn target(&self) -> u64 {
        u64::from(lock(&self.shared).target) << PAGE_SHIFT
    }

    /// The size that the guest says the balloon has, in bytes.
    pub fn actual(&self) -> u64 {
        u64::from(lock(&self.shared).actual) << PAGE_SHIFT
    }

    /// Asks the guest for statistics.
    pub fn request_statistics(&self) {
        lock(&self.shared).wanted = true;
        self.wake();
    }

    /// The last that it sent.
    pub fn statistics(&self) -> Option<Statistics> {
        lock(&self.shared).statistics.clone()
    }

    fn wake(&self) {
        // Only refuses when it is signalled already.
        let _ = self.wake.write(1);
    }
}

/// The optional features of a balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Abilities {
    /// The guest may take pages back rather than run out of memory.
    pub deflate_on_oom: bool,
    /// The guest reports pages that it does not use.
    pub reporting: bool,
}

/// The device.
pub struct Balloon<R> {
    reclaim: R,
    abilities: Abilities,
    state: BalloonState,
    config: [u8; 8],
    handle: BalloonHandle,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    inflated_pages: u64,
    deflated_pages: u64,
    reported_bytes: u64,
    reclaimed_bytes: u64,
}

impl<R: Reclaim> Balloon<R> {
    /// A balloon that is to have a size in bytes at the start.
    pub fn new(reclaim: R, abilities: Abilities, size: u64) -> std::io::Result<Self> {
        let handle = BalloonHandle {
            shared: Arc::default(),
            wake: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        };
        handle.set_target(size);
        Ok(Balloon {
            reclaim,
            abilities,
            state: BalloonState::default(),
            config: [0; 8],
            handle,
            counters: Counters::default(),
        })
    }

    /// A handle by which the host commands it.
    pub fn handle(&self) -> BalloonHandle {
        self.handle.clone()
    }

    /// Takes the target over; true if it changed.
    fn look(&mut self) -> bool {
        let target = lock(&self.handle.shared).target;
        let changed = std::mem::replace(&mut self.state.target, target) != target;
        self.show();
        changed
    }

    fn show(&mut self) {
        let BalloonState { target, actual, .. } = self.state;
        let ([a, b, c, d], [e, f, g, h]) = (target.to_le_bytes(), actual.to_le_bytes());
        self.config = [a, b, c, d, e, f, g, h];
        lock(&self.handle.shared).actual = actual;
    }

    fn inflate(&mut self, pages: &Buffer) -> Result<(), NeedsReset> {
        let pages = page_numbers(pages)?;
        self.counters.inflated_pages += pages.len() as u64;
        for (first, count) in runs(pages) {
            let (start, len) = (
                u64::from(first) << PAGE_SHIFT,
                u64::from(count) << PAGE_SHIFT,
            );
            let taken = self.reclaim.reclaim(start, len);
            self.counters.reclaimed_bytes +=
                taken.ok_or(NeedsReset("a page in the balloon is not memory"))?;
        }
        Ok(())
    }

    fn report(&mut self, chain: &Chain) -> Result<(), NeedsReset> {
        if !chain.readable.is_empty() {
            return Err(NeedsReset("reported pages must be writable"));
        }
        for (start, len) in chain.writable.ranges() {
            self.counters.reported_bytes += len;
            let taken = self.reclaim.reclaim(start, len);
            self.counters.reclaimed_bytes +=
                taken.ok_or(NeedsReset("a reported page is not memory"))?;
        }
        Ok(())
    }

    /// Takes the driver's statistics, and its buffer until new ones are wanted.
    fn take_statistics(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        while let Some(chain) = queues.pop(STATISTICS)? {
            if !chain.writable.is_empty() {
                return Err(NeedsReset("statistics must only be readable"));
            }
            let mut data = [0; STATISTIC * STATISTICS_MAX];
            let len = chain.readable.read(&mut data);
            {
                let mut shared = lock(&self.handle.shared);
                shared.wanted = false;
                shared.statistics = Some(Statistics {
                    when: Instant::now(),
                    values: statistics(data.get(..len).unwrap_or_default()),
                });
            }
            if let Some(older) = self.state.held.replace(chain.head) {
                queues.complete(STATISTICS, older, 0)?;
            }
        }
        Ok(())
    }
}

/// The page numbers of a request, in order.
fn page_numbers(pages: &Buffer) -> Result<Vec<u32>, NeedsReset> {
    let len = pages.len();
    if len == 0 || !len.is_multiple_of(PFN) || len > PAGES_MAX * PFN {
        return Err(NeedsReset("a request to the balloon has no good length"));
    }
    let mut data = vec![0; len];
    pages.read(&mut data);
    let (numbers, _) = data.as_chunks::<PFN>();
    let mut numbers: Vec<u32> = numbers.iter().copied().map(u32::from_le_bytes).collect();
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// Puts pages that follow each other together: the first one, and how many.
fn runs(pages: Vec<u32>) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some((first, count)) if page - *first == *count => *count += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

fn statistics(data: &[u8]) -> Vec<(&'static str, u64)> {
    let (entries, _) = data.as_chunks::<STATISTIC>();
    let entries = entries.iter().filter_map(|&[a, b, value @ ..]| {
        let name = NAMES.get(usize::from(u16::from_le_bytes([a, b])))?;
        Some((*name, u64::from_le_bytes(value)))
    });
    entries.collect()
}

impl<R: Reclaim> VirtioDevice for Balloon<R> {
    fn id(&self) -> DeviceId {
        DeviceId::Balloon
    }

    fn features(&self) -> u64 {
        let mut features = feature(F_STATS_VQ);
        if self.abilities.deflate_on_oom {
            features |= feature(F_DEFLATE_ON_OOM);
        }
        if self.abilities.reporting {
            features |= feature(F_REPORTING);
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        match self.abilities.reporting {
            true => &QUEUE_SIZES,
            false => QUEUE_SIZES
                .get(..QUEUES_WITHOUT_REPORTING)
                .unwrap_or_default(),
        }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            self.state.actual = u32::from_le_bytes(actual);
            self.show();
        }
    }

    fn activate(&mut self, _: u64, _: &Arc<GuestMemory>) -> Result<(), NeedsReset> {
        self.look();
        Ok(())
    }

    fn process_queue(&mut self, queue: usize, queues: &mut Queues) -> Result<(), NeedsReset> {
        if queue == STATISTICS {
            return self.take_statistics(queues);
        }
        while let Some(chain) = queues.pop(queue)? {
            if queue != INFLATE && queue != DEFLATE {
                self.report(&chain)?;
            } else if !chain.writable.is_empty() {
                return Err(NeedsReset("a request to the balloon must only be readable"));
            } else if queue == INFLATE {
                self.inflate(&chain.readable)?;
            } else {
                // Back with the guest, who finds new pages there.
                self.counters.deflated_pages += page_numbers(&chain.readable)?.len() as u64;
            }
            queues.complete(queue, chain.head, 0)?;
        }
        Ok(())
    }

    fn sources(&self) -> Vec<(Token, RawFd)> {
        vec![(0, self.handle.wake.as_raw_fd())]
    }

    fn handle_event(&mut self, _: Token, queues: &mut Queues) -> Result<(), NeedsReset> {
        let _ = self.handle.wake.read();
        if self.look() {
            queues.config_changed();
        }
        if lock(&self.handle.shared).wanted
            && let Some(head) = self.state.held.take()
        {
            // The driver fills it anew.
            queues.complete(STATISTICS, head, 0)?;
        }
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::Balloon(self.state.clone()))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Balloon(state) = state else {
            return Err(RestoreError::Kind(DeviceId::Balloon));
        };
        let size = self.queue_sizes().get(STATISTICS).copied().unwrap_or(0);
        if state.held.is_some_and(|head| head >= size) {
            return Err(RestoreError::Mismatch(
                "the balloon's buffer for statistics is not in its queue",
            ));
        }
        // The target is what the guest was asked for, whatever the flags say now.
        lock(&self.handle.shared).target = state.target;
        self.state = state;
        self.show();
        Ok(())
    }

    fn reset(&mut self) {
        self.state = BalloonState::default();
        self.look();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("inflated_pages", self.counters.inflated_pages),
            ("deflated_pages", self.counters.deflated_pages),
            ("reported_bytes", self.counters.reported_bytes),
            ("reclaimed_bytes", self.counters.reclaimed_bytes),
        ]
    }
}

#[cfg(test)]
#[path = "balloon_tests.rs"]
pub(super) mod tests;
