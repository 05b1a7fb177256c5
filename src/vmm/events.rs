//! What the threads of vCPUs tell the event loop.

use std::time::Instant;

use mayfly_devices::mailbox::Mailbox;
use mayfly_devices::platform::PlatformEvent;
use mayfly_devices::pvpanic::GuestPanic;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::failure::{Failure, OrFail};
use crate::kvm::vcpu::VcpuEnd;

/// What the vCPUs' threads tell the event loop.
#[derive(Debug)]
pub enum VmEvent {
    /// A vCPU will not run any more.
    Vcpu(VcpuEnd),
    /// The guest asks its platform for something.
    Platform(PlatformEvent, Instant),
    /// The guest's kernel panicked.
    Panic(GuestPanic),
    /// The guest is at its snapshot point, where it is to be saved. The vCPUs stop.
    SnapshotPoint,
}

/// Sends [`VmEvent`]s.
pub struct Notifier {
    events: Mailbox<VmEvent>,
    wake: EventFd,
}

impl Notifier {
    /// A sender of events to a mailbox, which wakes up who takes them.
    pub fn new(events: &Mailbox<VmEvent>, wake: &EventFd) -> Result<Self, Failure> {
        Ok(Notifier {
            events: events.clone(),
            wake: duplicate(wake)?,
        })
    }

    /// Sends, and wakes the event loop up.
    pub fn send(&self, event: VmEvent) {
        self.events.put(event);
        let _ = self.wake.write(1);
    }

    /// Another sender.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Notifier {
            events: self.events.clone(),
            wake: self.wake.try_clone()?,
        })
    }
}

/// An event descriptor that does not block.
pub fn event() -> Result<EventFd, Failure> {
    EventFd::new(EFD_NONBLOCK).or_host("creating an event descriptor")
}

/// The same event descriptor once more.
pub fn duplicate(event: &EventFd) -> Result<EventFd, Failure> {
    event.try_clone().or_host("duplicating an event descriptor")
}
