//! The paravirtual panic device (QEMU's `docs/specs/pvpanic`): a port by which
//! a kernel says that it is dying.

use crate::bus::BusDevice;

/// The event that a guest's kernel reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestPanic {
    /// It panicked, and nobody inside sees to it.
    Panicked,
    /// It panicked, and its crash kernel takes over.
    CrashLoaded,
}

const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// The device: one port. It has no state: it only tells.
pub struct Pvpanic<F> {
    tell: F,
}

impl<F: FnMut(GuestPanic) + Send> Pvpanic<F> {
    /// A device that calls `tell` for each event, on the vCPU's thread.
    pub fn new(tell: F) -> Self {
        Pvpanic { tell }
    }
}

impl<F: FnMut(GuestPanic) + Send> BusDevice for Pvpanic<F> {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let [value] = data {
            *value = PANICKED | CRASH_LOADED; // what it understands
        }
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        let &[value] = data else { return };
        if value & PANICKED != 0 {
            (self.tell)(GuestPanic::Panicked);
        } else if value & CRASH_LOADED != 0 {
            (self.tell)(GuestPanic::CrashLoaded);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_what_it_understands() {
        let (sender, told) = std::sync::mpsc::channel();
        let mut device = Pvpanic::new(move |panic| sender.send(panic).unwrap());
        let mut data = [0xff];
        device.read(0, &mut data);
        assert_eq!(data, [3]);
        for data in [&[][..], &[0], &[4], &[0xf0], &[1, 0], &[1, 0, 0, 0]] {
            device.write(0, data);
        }
        assert!(told.try_recv().is_err());
        for value in [1, 2, 3] {
            device.write(0, &[value]);
        }
        let told: Vec<_> = told.try_iter().collect();
        use GuestPanic::*;
        assert_eq!(told, [Panicked, CrashLoaded, Panicked]);
    }
}
