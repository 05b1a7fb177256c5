//! Address spaces: which device answers at which address.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A device with registers. Offsets are within the device's own range, and
/// the whole access lies in it.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes.
    fn write(&mut self, offset: u64, data: &[u8]);
    /// Those of its registers that need not wait for the device.
    fn shared(&self) -> Option<Arc<dyn SharedRegisters>> {
        None
    }
}

/// Registers that are accessed while their device does something else.
pub trait SharedRegisters: Send + Sync {
    /// Fills `data` with what the guest reads; false if that is the device's to do.
    fn read(&self, offset: u64, data: &mut [u8]) -> bool;
    /// Takes what the guest writes; false if that is the device's to do.
    fn write(&self, offset: u64, data: &[u8]) -> bool;
}

/// A range that is taken.
#[derive(Debug, thiserror::Error)]
#[error("the range of {len:#x} at {base:#x} is empty, overflows, or overlaps another device's")]
pub struct Overlap {
    base: u64,
    len: u64,
}

struct MappedDevice {
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
    shared: Option<Arc<dyn SharedRegisters>>,
}

/// An address space.
#[derive(Default)]
pub struct Bus {
    devices: BTreeMap<u64, MappedDevice>,
}

impl Bus {
    /// Places a device.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), Overlap> {
        let overlap = Overlap { base, len };
        let Some(end) = base.checked_add(len).filter(|_| len > 0) else {
            return Err(overlap);
        };
        let below = self.devices.range(..end).next_back();
        if below.is_some_and(|(&start, mapped)| start + mapped.len > base) {
            return Err(overlap);
        }
        let shared = lock(&device).shared();
        let mapped = MappedDevice {
            len,
            device,
            shared,
        };
        self.devices.insert(base, mapped);
        Ok(())
    }

    /// Where nothing answers, a read yields ones, as on a PC.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, mapped)) = self.find(address, data.len()) {
            let shared = mapped.shared.as_ref();
            if !shared.is_some_and(|shared| shared.read(offset, data)) {
                lock(&mapped.device).read(offset, data);
            }
        }
    }

    /// Where nothing answers, a write is lost.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, mapped)) = self.find(address, data.len()) {
            let shared = mapped.shared.as_ref();
            if !shared.is_some_and(|shared| shared.write(offset, data)) {
                lock(&mapped.device).write(offset, data);
            }
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &MappedDevice)> {
        let (base, mapped) = self.devices.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(len as u64)?;
        (end <= mapped.len).then_some((offset, mapped))
    }
}

/// Locks a device; one whose thread died has plain state, still usable.
pub fn lock<T: ?Sized>(device: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Echo(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn finds_the_device_and_only_it() {
        let echo = Arc::new(Mutex::new(Echo::default()));
        let mut bus = Bus::default();
        bus.insert(0x10, 4, echo.clone()).unwrap();
        let read = |bus: &Bus, address, len| {
            let mut data = vec![0; len];
            bus.read(address, &mut data);
            data
        };
        assert_eq!(read(&bus, 0x12, 2), [2, 2]);
        assert_eq!(read(&bus, 0x13, 2), [0xff; 2]); // leaves the device
        assert_eq!(read(&bus, 0xf, 1), [0xff]);
        assert_eq!(read(&bus, 0x14, 1), [0xff]);
        assert_eq!(read(&bus, u64::MAX, 8), [0xff; 8]);
        bus.write(0x11, &[7]);
        bus.write(0x14, &[8]);
        assert_eq!(lock(&echo).0, [(1, vec![7])]);
    }

    #[test]
    fn ranges_do_not_overlap() {
        let echo = Arc::new(Mutex::new(Echo::default()));
        let mut bus = Bus::default();
        bus.insert(0x10, 4, echo.clone()).unwrap();
        for (base, len) in [
            (0x10, 4),
            (0xf, 2),
            (0x13, 1),
            (0, 0x100),
            (5, 0),
            (u64::MAX, 2),
        ] {
            assert!(bus.insert(base, len, echo.clone()).is_err(), "{base:#x}");
        }
        bus.insert(0x14, 1, echo.clone()).unwrap();
        bus.insert(0xf, 1, echo).unwrap();
    }
}
