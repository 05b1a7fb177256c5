//! The VM generation ID (Microsoft's "Virtual Machine Generation ID"): 16
//! random bytes in guest memory, others whenever the guest was cloned or went
//! back in time, so that it renews its random numbers.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::ged::GedHandle;

const LEN: usize = 16;

/// Why the guest has no new identifier.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The host has no random numbers.
    #[error("getting random numbers")]
    Random(#[source] io::Error),
    /// The identifier's place is not in guest memory.
    #[error("writing to guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Gives the guest its identifier.
#[derive(Clone)]
pub struct GenerationId<M> {
    memory: M,
    address: GuestAddress,
    ged: GedHandle,
    event: u8,
}

impl<M: GuestMemoryBackend> GenerationId<M> {
    /// Writes the first identifier to `address`. `event` tells of the others.
    pub fn new(
        memory: M,
        address: u64,
        ged: GedHandle,
        event: u8,
    ) -> Result<Self, GenerationError> {
        let address = GuestAddress(address);
        let id = GenerationId {
            memory,
            address,
            ged,
            event,
        };
        id.write()?;
        Ok(id)
    }

    /// Writes another, and tells the guest.
    pub fn renew(&self) -> Result<(), GenerationError> {
        self.write()?;
        self.ged.raise(self.event);
        Ok(())
    }

    fn write(&self) -> Result<(), GenerationError> {
        let mut id = [0u8; LEN];
        let random = getrandom(&mut id, GetRandomFlags::empty());
        let len = random.map_err(|error| GenerationError::Random(error.into()))?;
        if len != LEN {
            return Err(GenerationError::Random(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(self.memory.write_slice(&id, self.address)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ged::{Ged, GedState};
    use vm_memory::GuestMemoryMmap;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn is_random_from_the_start_and_told_when_renewed() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
        let (_device, ged) = Ged::new(GedState::default(), EventFd::new(0).unwrap());
        let read = || memory.read_obj::<[u8; LEN]>(GuestAddress(0x1000)).unwrap();
        let id = GenerationId::new(memory.clone(), 0x1000, ged.clone(), 2).unwrap();
        let first = read();
        assert_ne!(first, [0; LEN]);
        assert_eq!(ged.save().pending, 0);
        id.renew().unwrap();
        assert_ne!(read(), first);
        assert_eq!(ged.save().pending, 2);
        let after: [u8; LEN] = memory.read_obj(GuestAddress(0x1010)).unwrap();
        assert_eq!(after, [0; LEN]);
        assert!(GenerationId::new(memory, 0x1ff8, ged, 2).is_err());
    }
}
