//! How a transport interrupts its driver (virtio 1.2, 4.2.2).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bitflags::bitflags;
use virtio_bindings::virtio_mmio as reg;
use vmm_sys_util::eventfd::EventFd;

use super::registers::RegisterPage;
use crate::bus::lock;

/// An interrupt of the guest's, triggered by edges.
pub trait InterruptLine: Send + Sync {
    /// Interrupts the guest before it returns.
    fn pulse(&self);

    /// Interrupts the guest soon; what comes meanwhile may share the interrupt.
    fn pulse_soon(&self) {
        self.pulse();
    }
}

/// Who waits for the event interrupts the guest.
impl InterruptLine for EventFd {
    fn pulse(&self) {
        // Only refuses when it is signalled already.
        let _ = self.write(1);
    }
}

/// How many interrupts show whether they can be shared.
const PROBE: u64 = 32;
/// Interrupts that are sent at once after a probe found that they cannot be shared.
const AT_ONCE: u64 = 1024;
/// Chains for one interrupt that end that period early: there are several requests on their way.
const MANY: u64 = 4;

/// Chooses between interrupts at once and soon. A driver that waits for each request by
/// itself gains by the one; one with many requests on their way works on while it is
/// interrupted soon, and has fewer interrupts then.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    /// Interrupts that were soon, and the chains that they were for.
    interrupts: u64,
    chains: u64,
    /// How many more are at once.
    at_once: u64,
}

impl Pace {
    /// Whether the next interrupt, for this many chains, is sent at once.
    fn is_at_once(&mut self, chains: u64) -> bool {
        if self.at_once > 0 {
            self.at_once = match chains >= MANY {
                true => 0,
                false => self.at_once - 1,
            };
            return true;
        }
        self.interrupts += 1;
        self.chains = self.chains.saturating_add(chains);
        if self.interrupts == PROBE {
            if self.chains <= PROBE + PROBE / 16 {
                self.at_once = AT_ONCE;
            }
            (self.interrupts, self.chains) = (0, 0);
        }
        false
    }
}

bitflags! {
    /// Interrupt status.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Interrupt: u32 {
        const QUEUE = reg::VIRTIO_MMIO_INT_VRING;
        const CONFIG = reg::VIRTIO_MMIO_INT_CONFIG;
    }
}

/// Interrupts a driver, and counts how often.
pub(super) struct Interrupter {
    registers: Arc<RegisterPage>,
    line: Box<dyn InterruptLine>,
    raised: AtomicU64,
    pace: Mutex<Pace>,
}

impl Interrupter {
    /// `line` interrupts the guest; `registers` say why.
    pub fn new(registers: Arc<RegisterPage>, line: impl InterruptLine + 'static) -> Self {
        Interrupter {
            registers,
            line: Box::new(line),
            raised: AtomicU64::new(0),
            pace: Mutex::default(),
        }
    }

    /// Interrupts the driver for a reason.
    pub fn raise(&self, reason: Interrupt) {
        self.raised.fetch_add(1, Ordering::Relaxed);
        self.registers.raise(reason.bits());
        self.repeat();
    }

    /// Interrupts the driver for the number of chains that it got back.
    pub fn raise_for_chains(&self, chains: u64) {
        self.raised.fetch_add(1, Ordering::Relaxed);
        self.registers.raise(Interrupt::QUEUE.bits());
        match lock(&self.pace).is_at_once(chains) {
            true => self.line.pulse(),
            false => self.line.pulse_soon(),
        }
    }

    /// Interrupts it once more for the reasons that it has not acknowledged.
    pub fn repeat(&self) {
        self.line.pulse();
    }

    /// The number of interrupts so far.
    pub fn raised(&self) -> u64 {
        self.raised.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_are_at_once_while_requests_come_one_by_one() {
        let mut pace = Pace::default();
        let mut next = |chains, count: u64| {
            let at_once = (0..count).filter(|_| pace.is_at_once(chains));
            at_once.count()
        };
        assert_eq!(next(1, PROBE), 0);
        assert_eq!(next(1, AT_ONCE), AT_ONCE as usize);
        // It is found out again every so often …
        assert_eq!(next(1, PROBE + 10), 10);
        // … and when many come together.
        assert_eq!(next(MANY, 10), 1);
        // Two at a time share interrupts.
        assert_eq!(next(2, 10 * PROBE - 9), 0);
        assert_eq!(next(1, 2 * PROBE), PROBE as usize);
        assert_eq!(next(u64::MAX, 2 * PROBE), 1);
    }
}
