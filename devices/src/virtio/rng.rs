//! The entropy device (virtio 1.2, 5.4).

use std::io::Read;
use std::sync::Arc;

use super::GuestMemory;
use super::device::{DeviceId, NeedsReset, VirtioDevice};
use super::queues::Queues;
use super::state::{DeviceState, RestoreError, SaveError};

const REQUESTS: usize = 0;
const QUEUE_SIZES: [u16; 1] = [64];
/// What one chain is given at most; a driver that wants more asks again.
const CHUNK: usize = 256;

/// The device, with a source of random bytes that does not block.
pub struct Rng<R> {
    source: R,
}

impl<R: Read + Send> Rng<R> {
    /// A device that passes the source on.
    pub fn new(source: R) -> Self {
        Rng { source }
    }
}

impl<R: Read + Send> VirtioDevice for Rng<R> {
    fn id(&self) -> DeviceId {
        DeviceId::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn activate(&mut self, _: u64, _: &Arc<GuestMemory>) -> Result<(), NeedsReset> {
        Ok(())
    }

    fn process_queue(&mut self, _: usize, queues: &mut Queues) -> Result<(), NeedsReset> {
        while let Some(chain) = queues.pop(REQUESTS)? {
            if !chain.readable.is_empty() || chain.writable.is_empty() {
                return Err(NeedsReset(
                    "a request for random bytes must only be writable",
                ));
            }
            let mut bytes = [0; CHUNK];
            let len = chain.writable.len().min(CHUNK);
            let bytes = bytes.get_mut(..len).unwrap_or_default();
            let len = match self.source.read_exact(bytes) {
                Ok(()) => chain.writable.write(bytes),
                Err(_) => 0,
            };
            queues.complete(REQUESTS, chain.head, len)?;
        }
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::Rng)
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Rng => Ok(()),
            _ => Err(RestoreError::Kind(DeviceId::Rng)),
        }
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::mmio::Status;
    use crate::virtio::testing::{Descriptor, Driver};

    fn driver() -> Driver {
        Driver::new(Box::new(Rng::new(std::io::repeat(0x5a))))
    }

    #[test]
    fn fills_what_is_writable_up_to_a_chunk() {
        let mut driver = driver();
        driver.start(0);
        driver.add(
            0,
            &[
                Descriptor::writable(0x8000, 3),
                Descriptor::writable(0x9000, 1000),
            ],
        );
        driver.kick(0);
        assert_eq!(driver.used(0), [(0, CHUNK as u32)]);
        assert_eq!(driver.read(0x8000, 4), [0x5a, 0x5a, 0x5a, 0]);
        assert_eq!(driver.read(0x9000, 253), [0x5a; 253]);
        assert_eq!(driver.read(0x9000 + 253, 1), [0]);
        assert_eq!(driver.interrupts(), 1);
    }

    #[test]
    fn chains_of_the_wrong_shape_break_it_until_it_is_reset() {
        for chain in [
            vec![Descriptor::readable(0x8000, 16)],
            vec![
                Descriptor::readable(0x8000, 16),
                Descriptor::writable(0x9000, 16),
            ],
            vec![Descriptor::writable(0x8000, 0)],
        ] {
            let mut driver = driver();
            driver.start(0);
            driver.add(0, &chain);
            driver.kick(0);
            assert!(driver.status().contains(Status::NEEDS_RESET));
            driver.reset();
            driver.start(0);
            driver.add(0, &[Descriptor::writable(0x8000, 1)]);
            driver.kick(0);
            assert_eq!(driver.used(0), [(0, 1)]);
        }
    }
}
