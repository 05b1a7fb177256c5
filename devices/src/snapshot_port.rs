//! The port by which a guest says that it may be saved (`protocol/src/mailbox.rs`), and where
//! its mailbox is.

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;

/// Each byte that is written here is the next of the mailbox's physical address, lowest first.
const ADDRESS: u64 = 0;
/// A write here says that the guest may be saved.
const POINT: u64 = 1;

/// The address register, as the guest has written it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotPortState {
    /// The last eight bytes of the address register.
    pub mailbox: u64,
}

/// The device: two ports of 8 bits.
pub struct SnapshotPort<F> {
    state: SnapshotPortState,
    reached: F,
}

impl<F: FnMut(u64) + Send> SnapshotPort<F> {
    /// A device that calls `reached` on the vCPU's thread, with the address of the guest's
    /// mailbox: any number at all. The vCPU must not run on before it has been decided what
    /// becomes of it.
    pub fn new(state: SnapshotPortState, reached: F) -> Self {
        SnapshotPort { state, reached }
    }

    /// The guest-visible state.
    pub fn save(&self) -> SnapshotPortState {
        self.state
    }
}

impl<F: FnMut(u64) + Send> BusDevice for SnapshotPort<F> {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (ADDRESS, &[byte]) => {
                self.state.mailbox = self.state.mailbox >> 8 | u64::from(byte) << 56;
            }
            (POINT, &[_]) => (self.reached)(self.state.mailbox),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_comes_with_the_last_address() {
        let (sender, told) = std::sync::mpsc::channel();
        let mut device = SnapshotPort::new(SnapshotPortState::default(), move |address| {
            sender.send(address).unwrap();
        });
        device.write(POINT, &[1]);
        for byte in 0..9 {
            device.write(ADDRESS, &[byte]);
        }
        for (offset, data) in [(0, &[7, 7][..]), (1, &[]), (1, &[1, 1]), (2, &[1])] {
            device.write(offset, data);
        }
        device.write(POINT, &[1]);
        let told: Vec<_> = told.try_iter().collect();
        assert_eq!(told, [0, 0x0807_0605_0403_0201]);
        let mut data = [0xff; 2];
        device.read(0, &mut data);
        assert_eq!(data, [0, 0]);
        // Another device goes on with it.
        let state = device.save();
        let other = SnapshotPort::new(state, |_| ());
        assert_eq!(other.save().mailbox, 0x0807_0605_0403_0201);
    }
}
