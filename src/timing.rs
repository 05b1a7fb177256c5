//! How long each phase of a VM's life took, and the record of it all.

use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A time in milliseconds.
pub fn milliseconds(time: Duration) -> u64 {
    number(time.as_millis())
}

/// Of no time that anything here takes is it too small.
fn number(parts: u128) -> u64 {
    u64::try_from(parts).unwrap_or(u64::MAX)
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, milliseconds)
}

/// `CLOCK_MONOTONIC` now.
fn monotonic() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

/// When each phase ended, counted from the process's start.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Timeline {
    #[serde(skip, default = "Instant::now")]
    start: Instant,
    /// KVM is open and has a VM.
    pub kvm_ready: Option<Duration>,
    /// Guest memory is mapped.
    pub memory_mapped: Option<Duration>,
    /// Kernel, initial RAM disk and tables are in guest memory.
    pub kernel_loaded: Option<Duration>,
    /// The vCPUs run.
    pub vcpus_started: Option<Duration>,
    /// The guest's init said that it was reached.
    pub guest_init: Option<Duration>,
    /// The VM ended.
    pub exit: Option<Duration>,
}

impl Timeline {
    /// Starts to count.
    pub fn start() -> Self {
        Timeline {
            start: Instant::now(),
            kvm_ready: None,
            memory_mapped: None,
            kernel_loaded: None,
            vcpus_started: None,
            guest_init: None,
            exit: None,
        }
    }

    /// The same from a start that another process knows, in microseconds of `CLOCK_MONOTONIC`.
    pub fn since(started_us: u64) -> Self {
        let ago = monotonic().saturating_sub(Duration::from_micros(started_us));
        let now = Instant::now();
        Timeline {
            start: now.checked_sub(ago).unwrap_or(now),
            ..Timeline::start()
        }
    }

    /// The time since the start.
    pub fn now(&self) -> Option<Duration> {
        Some(self.start.elapsed())
    }

    /// The time of an instant.
    pub fn at(&self, instant: Instant) -> Option<Duration> {
        Some(instant.saturating_duration_since(self.start))
    }

    /// The start, in microseconds of `CLOCK_MONOTONIC`.
    pub fn started_us(&self) -> u64 {
        let started = monotonic().saturating_sub(self.start.elapsed());
        u64::try_from(started.as_micros()).unwrap_or(u64::MAX)
    }

    fn phases(&self) -> [(&'static str, Option<Duration>); 6] {
        [
            ("KVM ready", self.kvm_ready),
            ("memory mapped", self.memory_mapped),
            ("kernel loaded", self.kernel_loaded),
            ("vCPUs started", self.vcpus_started),
            ("guest init reached", self.guest_init),
            ("exit", self.exit),
        ]
    }
}

impl Timeline {
    /// The phases by the names that they have in records.
    pub fn keyed(&self) -> [(&'static str, Option<Duration>); 6] {
        let names = [
            "kvm_ready",
            "memory_mapped",
            "kernel_loaded",
            "vcpus_started",
            "guest_init",
            "exit",
        ];
        let mut ends = self.phases();
        for (end, name) in ends.iter_mut().zip(names) {
            end.0 = name;
        }
        ends
    }
}

impl fmt::Display for Timeline {
    /// One line a phase: when it ended, and how long it took.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let mut last = Duration::ZERO;
        for (name, end) in self.phases() {
            match end {
                Some(end) => {
                    writeln!(
                        f,
                        "{name:<20}{:>10.1} ms {:>+10.1} ms",
                        ms(end),
                        ms(end.saturating_sub(last))
                    )?;
                    last = end;
                }
                None => writeln!(f, "{name:<20}{:>10}", "-")?,
            }
        }
        Ok(())
    }
}

/// The machine-readable record of `--json`. Times are microseconds since the
/// process's start.
#[derive(Debug, Serialize)]
pub struct Record<'a> {
    /// How the VM ended: [`Outcome::name`](crate::link::Outcome::name).
    pub outcome: &'a str,
    /// More about it, where there is more to say.
    pub detail: Option<&'a str>,
    /// mayfly's exit code.
    pub exit_code: u8,
    /// What the guest's init said of its work.
    pub guest_status: Option<u8>,
    /// The phases.
    pub timing_us: TimingUs,
}

/// [`Timeline`] in microseconds.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct TimingUs {
    pub kvm_ready: Option<u64>,
    pub memory_mapped: Option<u64>,
    pub kernel_loaded: Option<u64>,
    pub vcpus_started: Option<u64>,
    pub guest_init: Option<u64>,
    pub exit: Option<u64>,
}

impl From<&Timeline> for TimingUs {
    fn from(timeline: &Timeline) -> Self {
        let us = |time: Option<Duration>| time.map(|time| number(time.as_micros()));
        TimingUs {
            kvm_ready: us(timeline.kvm_ready),
            memory_mapped: us(timeline.memory_mapped),
            kernel_loaded: us(timeline.kernel_loaded),
            vcpus_started: us(timeline.vcpus_started),
            guest_init: us(timeline.guest_init),
            exit: us(timeline.exit),
        }
    }
}
