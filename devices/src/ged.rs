//! The register of ACPI's generic event device (ACPI 6.5, 5.6.9): what
//! happened, told by an interrupt and read by the guest's `_EVT` method.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BusDevice, lock};

/// The device as the guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GedState {
    /// A bit for each event that the guest has not read.
    pub pending: u8,
}

struct Shared {
    state: Mutex<GedState>,
    interrupt: EventFd,
}

/// The device: one register of 8 bits, cleared by reading.
pub struct Ged(Arc<Shared>);

/// Tells the guest what happened.
#[derive(Clone)]
pub struct GedHandle(Arc<Shared>);

impl Ged {
    /// A device in a state, and the handle to it.
    pub fn new(state: GedState, interrupt: EventFd) -> (Self, GedHandle) {
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            interrupt,
        });
        (Ged(shared.clone()), GedHandle(shared))
    }
}

impl GedHandle {
    /// Adds events, and interrupts. Those that the guest has not read yet
    /// happen once.
    pub fn raise(&self, events: u8) {
        lock(&self.0.state).pending |= events;
        // Fails only if the counter is full: then the interrupt is on its way.
        let _ = self.0.interrupt.write(1);
    }

    /// Saves the device as the guest sees it.
    pub fn save(&self) -> GedState {
        *lock(&self.0.state)
    }
}

impl BusDevice for Ged {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let [value] = data {
            *value = std::mem::take(&mut lock(&self.0.state).pending);
        }
    }

    fn write(&mut self, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_wait_until_they_are_read() {
        let interrupt = EventFd::new(0).unwrap();
        let (mut device, handle) = Ged::new(GedState::default(), interrupt.try_clone().unwrap());
        let mut read = |len: usize| {
            let mut data = vec![0xff; len];
            device.read(0, &mut data);
            data
        };
        assert_eq!(read(1), [0]);
        handle.raise(1);
        handle.clone().raise(2);
        handle.raise(1);
        assert_eq!(interrupt.read().unwrap(), 3);
        assert_eq!(read(2), [0, 0]); // no such register
        assert_eq!(handle.save(), GedState { pending: 3 });
        assert_eq!((read(1), read(1)), (vec![3], vec![0]));
        handle.raise(2);
        device.write(0, &[0]);
        assert_eq!(handle.save().pending, 2);
    }
}
