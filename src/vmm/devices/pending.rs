//! Devices that are made, and have no place yet.

use std::os::fd::OwnedFd;

use mayfly_devices::rate_limiter::LimitHandle;
use mayfly_devices::virtio::device::VirtioDevice;

use crate::failure::{Class, Failure};
use crate::link::VmmFailure;

/// A device without a place.
pub struct PendingDevice {
    pub device: Box<dyn VirtioDevice>,
    pub limits: Option<LimitHandle>,
}

impl PendingDevice {
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        PendingDevice {
            device: Box::new(device),
            limits: None,
        }
    }

    pub fn limited(device: impl VirtioDevice + 'static, limits: LimitHandle) -> Self {
        PendingDevice {
            device: Box::new(device),
            limits: Some(limits),
        }
    }
}

/// The supervisor sent another backend than the device has.
pub fn unfit(name: &str) -> VmmFailure {
    let what = format!("the host's backend of the device {name} is missing, or another device's");
    Failure::new(Class::Internal, what).into()
}

/// The only descriptor of a device's backend.
pub fn first(name: &str, files: Vec<OwnedFd>) -> Result<OwnedFd, VmmFailure> {
    files.into_iter().next().ok_or_else(|| unfit(name))
}
