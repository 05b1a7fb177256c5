//! How a transport interrupts its driver (virtio 1.2, 4.2.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bitflags::bitflags;
use virtio_bindings::virtio_mmio as reg;
use vmm_sys_util::eventfd::EventFd;

use super::registers::RegisterPage;

/// An interrupt of the guest's, triggered by edges.
pub trait InterruptLine: Send + Sync {
    /// Interrupts the guest once more.
    fn pulse(&self);
}

/// Who waits for the event interrupts the guest.
impl InterruptLine for EventFd {
    fn pulse(&self) {
        // Only refuses when it is signalled already.
        let _ = self.write(1);
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
}

impl Interrupter {
    /// `line` interrupts the guest; `registers` say why.
    pub fn new(registers: Arc<RegisterPage>, line: impl InterruptLine + 'static) -> Self {
        Interrupter {
            registers,
            line: Box::new(line),
            raised: AtomicU64::new(0),
        }
    }

    /// Interrupts the driver for a reason.
    pub fn raise(&self, reason: Interrupt) {
        self.raised.fetch_add(1, Ordering::Relaxed);
        self.registers.raise(reason.bits());
        self.repeat();
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
