//! As much of a keyboard controller as `reboot=k` wants: its reset line.

use crate::bus::BusDevice;

/// The port of the controller's command and status register.
pub const COMMAND_PORT: u16 = 0x64;
/// Pulse output line 0, which is wired to the CPU's reset.
const PULSE_RESET: u8 = 0xfe;

/// The device, at [`COMMAND_PORT`], without a keyboard.
pub struct I8042<F> {
    reset: F,
}

impl<F: FnMut() + Send> I8042<F> {
    /// A controller that calls `reset` on the vCPU's thread.
    pub fn new(reset: F) -> Self {
        I8042 { reset }
    }
}

impl<F: FnMut() + Send> BusDevice for I8042<F> {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0); // both buffers empty: a command may be written
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        if data == [PULSE_RESET] {
            (self.reset)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resets_on_its_command_only() {
        let (sender, resets) = std::sync::mpsc::channel();
        let mut device = I8042::new(move || sender.send(()).unwrap());
        device.write(0, &[0xd1]);
        device.write(0, &[0xfe, 0xfe]);
        assert!(resets.try_recv().is_err());
        device.write(0, &[0xfe]);
        assert_eq!(resets.try_iter().count(), 1);
    }
}
