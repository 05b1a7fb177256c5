//! Limits on what a device moves in a second.
//!
//! Token buckets with debt: a request passes while anything is left of the
//! budget and is then charged whole, so that one larger than the bucket passes
//! too, and those behind it wait until its debt is paid. The average is exact,
//! whatever the sizes. The logic takes the time as an argument; only
//! [`RateLimiter`] looks at the clock, and has a timer.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

const NANOS: i128 = 1_000_000_000;
/// How long an idle device saves up: enough that a late driver or timer loses
/// nothing, and a hundredth of what the rate allows in ten seconds.
const SAVED: i128 = NANOS / 10;
/// How much is saved up before a device that had spent all goes on, so that
/// small requests do not cost a timer each.
const QUANTUM: i128 = NANOS / 100;

/// A rate: a number a second, and a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Rate {
    /// Bytes, or operations.
    pub per_second: NonZeroU64,
    /// As much more passes at once, one time.
    #[serde(default)]
    pub burst: u64,
}

/// The limits of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Rate>,
    /// Requests, or packets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations: Option<Rate>,
}

/// The budget of one rate.
#[derive(Clone, Debug)]
struct Bucket {
    rate: i128,
    /// What may be spent, in billionths: exact, as a nanosecond adds `rate` of
    /// them. Negative is debt.
    level: i128,
    /// The rest of the burst, in bytes or operations.
    burst: u64,
    filled: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        let per_second = i128::from(rate.per_second.get());
        Bucket {
            rate: per_second,
            level: per_second * SAVED,
            burst: rate.burst,
            filled: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled).as_nanos();
        // A clock that went back fills nothing, and is not believed.
        self.filled = self.filled.max(now);
        let elapsed = i128::from(u64::try_from(elapsed).unwrap_or(u64::MAX));
        let earned = elapsed.saturating_mul(self.rate);
        self.level = self.level.saturating_add(earned).min(self.rate * SAVED);
    }

    /// How long to wait, if there is nothing to spend.
    fn wait(&self) -> Option<Duration> {
        if self.level > 0 || self.burst > 0 {
            return None;
        }
        let missing = self.rate * QUANTUM - self.level;
        let nanos = (missing + self.rate - 1) / self.rate;
        Some(Duration::from_nanos(
            u64::try_from(nanos).unwrap_or(u64::MAX),
        ))
    }

    fn charge(&mut self, amount: u64) {
        let from_burst = self.burst.min(amount);
        self.burst -= from_burst;
        let rest = i128::from(amount - from_burst) * NANOS;
        self.level = self.level.saturating_sub(rest);
    }
}

/// The budgets of both rates.
#[derive(Clone, Debug)]
struct Budget {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Budget {
    fn new(limits: Limits, now: Instant) -> Self {
        Budget {
            bandwidth: limits.bandwidth.map(|rate| Bucket::new(rate, now)),
            operations: limits.operations.map(|rate| Bucket::new(rate, now)),
        }
    }

    /// How long the next request must wait, if it must.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let buckets = [&mut self.bandwidth, &mut self.operations];
        let waits = buckets.into_iter().flatten().filter_map(|bucket| {
            bucket.fill(now);
            bucket.wait()
        });
        waits.max()
    }

    /// One request passed, and moves the given number of bytes.
    fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bandwidth {
            bucket.charge(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.charge(1);
        }
    }

    fn is_unlimited(&self) -> bool {
        self.bandwidth.is_none() && self.operations.is_none()
    }
}

/// Limits what a device does, and wakes it up when it may go on.
pub struct RateLimiter {
    budget: Budget,
    timer: TimerFd,
    waiting: bool,
    throttled: u64,
}

impl RateLimiter {
    /// A limiter with full buckets.
    pub fn new(limits: Limits) -> io::Result<Self> {
        Ok(RateLimiter {
            budget: Budget::new(limits, Instant::now()),
            timer: TimerFd::new().map_err(io::Error::from)?,
            waiting: false,
            throttled: 0,
        })
    }

    /// The next request may pass. If not, the timer is set, and the device must
    /// leave the request where it is.
    pub fn admits(&mut self) -> bool {
        if self.budget.is_unlimited() {
            return true;
        }
        let Some(wait) = self.budget.wait(Instant::now()) else {
            self.waiting = false;
            return true;
        };
        if !std::mem::replace(&mut self.waiting, true) {
            self.throttled += 1;
        }
        if let Err(error) = self.timer.reset(wait, None) {
            // Better too fast than never again.
            log::warn!("rate limit: setting a timer: {error}");
            return true;
        }
        false
    }

    /// A request that was admitted moves the given number of bytes.
    pub fn charge(&mut self, bytes: u64) {
        self.budget.charge(bytes);
    }

    /// Sets other limits, with full buckets. Who waits must try again.
    pub fn set(&mut self, limits: Limits) {
        self.budget = Budget::new(limits, Instant::now());
    }

    /// Ready when the device may go on; watched on edges.
    pub fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// The timer is not ready any more.
    pub fn acknowledge(&mut self) {
        // Disarming forgets that it fired, and does not block as reading may.
        let _ = self.timer.clear();
    }

    /// How often the budget was spent.
    pub fn throttled(&self) -> u64 {
        self.throttled
    }
}

/// Changes a device's limits while it runs.
#[derive(Clone, Debug)]
pub struct LimitHandle {
    limits: Arc<Mutex<Limits>>,
    changed: Arc<EventFd>,
}

impl LimitHandle {
    /// A handle, whose clones the device and whoever changes its limits have.
    pub fn new(limits: Limits) -> io::Result<Self> {
        Ok(LimitHandle {
            limits: Arc::new(Mutex::new(limits)),
            changed: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        })
    }

    /// The limits.
    pub fn get(&self) -> Limits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes them; the device follows as soon as it is served.
    pub fn set(&self, limits: Limits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
        // Refuses only when it is signalled already.
        let _ = self.changed.write(1);
    }

    /// The device's source: ready when there are new limits to take.
    pub fn changed(&self) -> RawFd {
        self.changed.as_raw_fd()
    }

    /// What was set last, if it was not taken yet.
    pub fn take(&self) -> Option<Limits> {
        self.changed.read().ok().map(|_| self.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn rate(per_second: u64, burst: u64) -> Option<Rate> {
        let per_second = NonZeroU64::new(per_second)?;
        Some(Rate { per_second, burst })
    }

    fn bandwidth(per_second: u64, burst: u64) -> Limits {
        Limits {
            bandwidth: rate(per_second, burst),
            operations: None,
        }
    }

    /// Requests of a size for a time, as fast as it goes: bytes, and waits.
    fn flood(budget: &mut Budget, size: u64, start: Instant, time: Duration) -> (u64, u64) {
        let (mut now, mut moved, mut waits) = (start, 0, 0);
        while now < start + time {
            match budget.wait(now) {
                Some(wait) => (now, waits) = (now + wait, waits + 1),
                None => {
                    budget.charge(size);
                    moved += size;
                }
            }
        }
        (moved, waits)
    }

    #[test]
    fn the_average_is_the_rate_whatever_the_size() {
        let start = Instant::now();
        for size in [1000, 4096, 65_536, 1 << 20, 3 << 20] {
            let mut budget = Budget::new(bandwidth(10 << 20, 0), start);
            let (moved, waits) = flood(&mut budget, size, start, 10 * SECOND);
            let expected = 100 << 20;
            assert!(moved >= expected, "{size}: {moved}");
            assert!(moved < expected + expected / 50 + size, "{size}: {moved}");
            // No busy loop: a hundred timers a second.
            assert!(waits <= 1000, "{size}: {waits}");
        }
        let mut budget = Budget::new(
            Limits {
                bandwidth: rate(1 << 40, 0),
                operations: rate(500, 0),
            },
            start,
        );
        let (moved, _) = flood(&mut budget, 1, start, 10 * SECOND);
        assert!((5000..5100).contains(&moved), "{moved}");
    }

    #[test]
    fn a_burst_passes_once() {
        let start = Instant::now();
        let mut budget = Budget::new(bandwidth(1000, 5000), start);
        let mut moved = 0;
        while budget.wait(start).is_none() {
            budget.charge(100);
            moved += 100;
        }
        assert_eq!(moved, 5100); // and what was saved up
        let later = start + 100 * SECOND;
        let mut again = 0;
        while budget.wait(later).is_none() {
            budget.charge(100);
            again += 100;
        }
        assert_eq!(again, 100);
    }

    #[test]
    fn a_debt_is_paid_before_anything_passes() {
        let start = Instant::now();
        let mut budget = Budget::new(bandwidth(1000, 0), start);
        assert_eq!(budget.wait(start), None);
        budget.charge(10_000);
        // 100 were saved up; then ten milliseconds' worth is waited for.
        let wait = Duration::from_millis(9910);
        assert_eq!(budget.wait(start), Some(wait));
        assert_eq!(budget.wait(start + wait), None);
        // Forgiven with new limits.
        budget.charge(1 << 60);
        budget = Budget::new(bandwidth(1000, 0), start);
        assert_eq!(budget.wait(start), None);
    }

    #[test]
    fn the_slower_of_both_rates_decides() {
        let start = Instant::now();
        let mut budget = Budget::new(
            Limits {
                bandwidth: rate(1000, 0),
                operations: rate(10, 0),
            },
            start,
        );
        budget.charge(10);
        // A tenth of a second's worth is one operation.
        assert_eq!(budget.wait(start), Some(Duration::from_millis(10)));
        budget.charge(1000);
        assert_eq!(budget.wait(start), Some(Duration::from_millis(920)));
    }

    #[test]
    fn the_timer_fires_when_there_is_budget_again() {
        let mut limiter = RateLimiter::new(bandwidth(100_000, 0)).unwrap();
        assert!(limiter.admits());
        limiter.charge(11_000);
        assert!(!limiter.admits());
        let timer = limiter.timer();
        let fires = |timeout_ms| crate::poll::ready(timer, libc::POLLIN, timeout_ms);
        assert!(fires(5000));
        limiter.acknowledge();
        assert!(!fires(0));
        assert!(limiter.admits());
        assert_eq!(limiter.throttled(), 1);
    }

    #[test]
    fn a_handle_s_last_word_counts() {
        let handle = LimitHandle::new(Limits::default()).unwrap();
        assert_eq!(handle.take(), None);
        let other = handle.clone();
        other.set(bandwidth(1, 0));
        other.set(bandwidth(2, 0));
        assert_eq!(handle.take(), Some(bandwidth(2, 0)));
        assert_eq!(handle.take(), None);
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate_and_always_going_on(
            per_second in prop_oneof![1..10_000u64, any::<u64>()],
            burst in prop_oneof![Just(0), 0..10_000u64, any::<u64>()],
            steps in prop::collection::vec((0..u64::MAX / 2, prop_oneof![0..5000u64, any::<u64>()]), 1..40),
        ) {
            prop_assume!(per_second > 0);
            let start = Instant::now();
            let mut budget = Budget::new(bandwidth(per_second, burst), start);
            let (mut now, mut spent, mut last) = (start, 0u128, 0u128);
            for (pause, size) in steps {
                now += Duration::from_nanos(pause % 3_000_000_000);
                if let Some(wait) = budget.wait(now) {
                    // Having waited is enough, unless it was longer than a
                    // clock counts.
                    prop_assert!(!wait.is_zero());
                    let Some(later) = now.checked_add(wait) else { continue };
                    now = later;
                    if wait < Duration::from_nanos(u64::MAX) {
                        prop_assert_eq!(budget.wait(now), None);
                    } else {
                        continue;
                    }
                }
                budget.charge(size);
                (spent, last) = (spent + u128::from(size), u128::from(size));
            }
            let nanos = (now - start).as_nanos() + SAVED as u128;
            let allowed = nanos.saturating_mul(u128::from(per_second)) / NANOS as u128;
            prop_assert!(spent - last <= allowed + u128::from(burst) + 1);
        }
    }
}
