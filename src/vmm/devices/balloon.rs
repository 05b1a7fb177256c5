//! The memory balloon.

use mayfly_devices::virtio::balloon::{Abilities, Balloon, BalloonHandle};

use super::pending::PendingDevice;
use crate::failure::OrFail;
use crate::kvm::memory::GuestMemory;
use crate::kvm::reclaim::Reclaimer;
use crate::link::VmmFailure;
use crate::spec::MemorySpec;

/// A balloon of a size in bytes, and the handle that changes it.
pub fn make(
    size: u64,
    abilities: Abilities,
    memory: &GuestMemory,
    spec: &MemorySpec,
) -> Result<(PendingDevice, BalloonHandle), VmmFailure> {
    let reclaimer = Reclaimer::new(memory, spec);
    let device = Balloon::new(reclaimer, abilities, size).or_host("--balloon")?;
    let handle = device.handle();
    Ok((PendingDevice::new(device), handle))
}
