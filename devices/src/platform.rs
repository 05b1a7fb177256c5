//! The platform's own ports: power and reset as hardware-reduced ACPI knows
//! them (ACPI 6.5, 4.8.3.6 and 4.8.3.7), the boot timer, the guest's status.

use crate::bus::BusDevice;

/// What the guest asks of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlatformEvent {
    /// Turn off.
    PowerOff,
    /// Restart the machine.
    Reset,
    /// The guest's init was reached.
    BootMark,
    /// How the guest's work ended, as its init says.
    Status(u8),
}

/// The offsets of the registers, and the values that matter.
#[derive(Clone, Copy, Debug)]
pub struct PlatformPorts {
    /// Sleep control register.
    pub sleep_control: u64,
    /// The sleep type of soft-off.
    pub soft_off: u8,
    /// Reset register.
    pub reset: u64,
    /// The value that resets the machine when written to the reset register.
    pub reset_value: u8,
    /// Boot mark.
    pub boot_mark: u64,
    /// Guest status.
    pub status: u64,
}

/// Sleep enable, bit 5 of the sleep control register; the type is bits 2 to 4.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u32 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// The device. It has no state: it only tells.
pub struct Platform<F> {
    ports: PlatformPorts,
    tell: F,
}

impl<F: FnMut(PlatformEvent) + Send> Platform<F> {
    /// A device that passes events to `tell`, on the vCPU's thread.
    pub fn new(ports: PlatformPorts, tell: F) -> Self {
        Platform { ports, tell }
    }
}

impl<F: FnMut(PlatformEvent) + Send> BusDevice for Platform<F> {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0); // the sleep status register: never woken
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let ports = self.ports;
        if offset == ports.sleep_control {
            let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
            if value & SLEEP_ENABLE != 0 && sleep_type == ports.soft_off {
                (self.tell)(PlatformEvent::PowerOff);
            }
        } else if offset == ports.reset {
            if value == ports.reset_value {
                (self.tell)(PlatformEvent::Reset);
            }
        } else if offset == ports.boot_mark {
            (self.tell)(PlatformEvent::BootMark);
        } else if offset == ports.status {
            (self.tell)(PlatformEvent::Status(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn only_the_right_values_act() {
        let (sender, events) = mpsc::channel();
        let ports = PlatformPorts {
            sleep_control: 0,
            soft_off: 5,
            reset: 2,
            reset_value: 1,
            boot_mark: 4,
            status: 5,
        };
        let mut device = Platform::new(ports, move |event| sender.send(event).unwrap());
        for (offset, data) in [
            (0, &[5 << 2][..]),         // not enabled
            (0, &[1 << 2 | 1 << 5]),    // another sleep state
            (0, &[5 << 2 | 1 << 5, 0]), // too wide
            (1, &[5 << 2 | 1 << 5]),
            (2, &[0]),
            (15, &[1]),
        ] {
            device.write(offset, data);
        }
        assert!(events.try_recv().is_err());
        device.write(4, &[0]);
        device.write(5, &[42]);
        device.write(2, &[1]);
        device.write(0, &[5 << 2 | 1 << 5]);
        assert_eq!(
            events.try_iter().collect::<Vec<_>>(),
            [
                PlatformEvent::BootMark,
                PlatformEvent::Status(42),
                PlatformEvent::Reset,
                PlatformEvent::PowerOff
            ]
        );
    }
}
