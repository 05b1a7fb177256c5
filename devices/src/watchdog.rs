//! A watchdog, driven as its ACPI table (WDAT) says: while it runs and nobody
//! feeds it for as long as its count says, a timer tells that the guest hangs.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use crate::bus::BusDevice;

/// The offsets of the registers.
#[derive(Clone, Copy, Debug)]
pub struct WatchdogPorts {
    /// 8 bits: runs or not.
    pub control: u64,
    /// The bit of `control` for it.
    pub run: u8,
    /// 8 bits: a write feeds.
    pub feed: u64,
    /// 16 bits: the count, in seconds.
    pub count: u64,
}

/// The watchdog as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogState {
    /// The watchdog is counting.
    pub running: bool,
    /// The seconds from which it counts down.
    pub count: u16,
}

impl Default for WatchdogState {
    fn default() -> Self {
        WatchdogState {
            running: false,
            count: 30,
        }
    }
}

/// The device.
pub struct Watchdog {
    ports: WatchdogPorts,
    state: WatchdogState,
    timer: TimerFd,
    /// When the watchdog was fed last.
    fed: Instant,
    /// How often it was not fed in time since.
    misses: u32,
    paused: bool,
}

impl Watchdog {
    /// A watchdog in a state; one that runs begins to count.
    pub fn new(ports: WatchdogPorts, state: WatchdogState) -> io::Result<Self> {
        let mut watchdog = Watchdog {
            ports,
            state,
            timer: TimerFd::new().map_err(io::Error::from)?,
            fed: Instant::now(),
            misses: 0,
            paused: false,
        };
        watchdog.restart();
        Ok(watchdog)
    }

    /// Saves the watchdog as the guest sees it.
    pub fn save(&self) -> WatchdogState {
        self.state
    }

    /// Readable when [`Watchdog::expired`] is to be called.
    pub fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// If the guest was late: how often in a row, and for how long in all. It
    /// counts once more.
    pub fn expired(&mut self) -> Option<(u32, Duration)> {
        // The guest may have fed it just now: then the timer runs again.
        let counting = self.state.running && !self.paused;
        if !counting || self.timer.is_armed().unwrap_or(false) {
            return None;
        }
        self.misses = self.misses.saturating_add(1);
        self.arm();
        let period = Duration::from_secs(self.state.count.into());
        Some((self.misses, period.saturating_mul(self.misses)))
    }

    /// Does not count while the guest cannot feed it.
    pub fn pause(&mut self) {
        self.paused = true;
        self.restart();
    }

    /// Counts again, from the start.
    pub fn resume(&mut self) {
        self.paused = false;
        self.restart();
    }

    fn restart(&mut self) {
        self.misses = 0;
        self.fed = Instant::now();
        self.arm();
    }

    /// The timer's ticks that nobody has taken are forgotten.
    fn arm(&mut self) {
        // Neither fails with a timer that exists.
        let _ = if self.state.running && !self.paused {
            let period = Duration::from_secs(self.state.count.into());
            self.timer.reset(period, None)
        } else {
            self.timer.clear()
        };
    }

    /// Seconds until it expires; begun ones count.
    fn left(&self) -> u16 {
        if !self.state.running {
            return self.state.count;
        }
        let passed = self.fed.elapsed().as_secs();
        let passed = u16::try_from(passed).unwrap_or(u16::MAX);
        self.state.count.saturating_sub(passed)
    }
}

impl BusDevice for Watchdog {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match data {
            [value] if offset == self.ports.control && self.state.running => {
                *value = self.ports.run;
            }
            [low, high] if offset == self.ports.count => {
                [*low, *high] = self.left().to_le_bytes();
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match *data {
            [value] if offset == self.ports.control => {
                self.state.running = value & self.ports.run != 0;
            }
            [_] if offset == self.ports.feed => {}
            [low, high] if offset == self.ports.count => {
                // A timer of zero would never expire.
                self.state.count = u16::from_le_bytes([low, high]).max(1);
            }
            _ => return,
        }
        self.restart();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PORTS: WatchdogPorts = WatchdogPorts {
        control: 0,
        run: 1,
        feed: 1,
        count: 2,
    };

    fn watchdog() -> Watchdog {
        Watchdog::new(PORTS, WatchdogState::default()).unwrap()
    }

    fn read<const LEN: usize>(device: &mut Watchdog, offset: u64) -> [u8; LEN] {
        let mut data = [0xff; LEN];
        device.read(offset, &mut data);
        data
    }

    fn fires(device: &Watchdog, timeout_ms: i32) -> bool {
        crate::poll::ready(device.timer(), libc::POLLIN, timeout_ms)
    }

    #[test]
    fn counts_only_while_it_runs() {
        let mut device = watchdog();
        assert_eq!((read(&mut device, 0), read(&mut device, 2)), ([0], [30, 0]));
        assert!(!device.timer.is_armed().unwrap());
        device.write(2, &[0x2c, 1]);
        device.write(0, &[1]);
        assert_eq!(
            (read(&mut device, 0), read(&mut device, 2)),
            ([1], [0x2c, 1])
        );
        assert!(device.timer.is_armed().unwrap());
        assert_eq!(device.expired(), None); // not yet
        device.pause();
        assert!(!device.timer.is_armed().unwrap());
        device.write(1, &[1]); // the end of an access that was begun
        assert!(!device.timer.is_armed().unwrap());
        device.resume();
        assert!(device.timer.is_armed().unwrap());
        device.write(0, &[0]);
        assert_eq!(read(&mut device, 0), [0]);
        device.resume();
        assert!(!device.timer.is_armed().unwrap());
        assert_eq!(device.expired(), None);
    }

    #[test]
    fn misses_are_counted_until_it_is_fed() {
        let mut device = watchdog();
        device.write(2, &[0, 0]);
        device.write(0, &[1]);
        assert_eq!(
            device.save(),
            WatchdogState {
                running: true,
                count: 1
            }
        );
        assert!(fires(&device, 5000));
        assert_eq!(device.expired(), Some((1, Duration::from_secs(1))));
        assert!(!fires(&device, 0) && fires(&device, 5000));
        assert_eq!(device.expired(), Some((2, Duration::from_secs(2))));
        assert!(fires(&device, 5000));
        // Fed at the last moment: nothing has happened.
        device.write(1, &[0]);
        assert!(!fires(&device, 0));
        assert_eq!(device.expired(), None);
        assert!(fires(&device, 5000));
        device.pause();
        assert_eq!((device.expired(), fires(&device, 0)), (None, false));
        device.resume();
        assert!(fires(&device, 5000));
        assert_eq!(device.expired(), Some((1, Duration::from_secs(1))));
    }

    proptest! {
        #[test]
        fn any_access_is_survived(
            accesses in proptest::collection::vec(
                (any::<bool>(), 0u64..4, proptest::collection::vec(any::<u8>(), 0..9)), 0..50),
        ) {
            let mut device = watchdog();
            for (write, offset, mut data) in accesses {
                if write {
                    device.write(offset, &data);
                } else {
                    device.read(offset, &mut data);
                }
                prop_assert!(device.save().count > 0);
                prop_assert_eq!(device.timer.is_armed().unwrap(), device.save().running);
            }
        }
    }
}
