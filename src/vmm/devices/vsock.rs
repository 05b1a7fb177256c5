//! Sockets between guest and host.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use mayfly_devices::virtio::vsock::{Vsock, VsockState};

use super::pending::{PendingDevice, first};
use crate::link::{BlamePart, Broker, Part, VmmFailure};

/// A device of an address, where clients come by a listening socket, and which connects the
/// guest to the host by the broker.
pub fn make(
    name: &str,
    cid: u32,
    listener: Vec<OwnedFd>,
    broker: &Arc<Broker>,
) -> Result<PendingDevice, VmmFailure> {
    let listener = first(name, listener)?.into();
    let broker = broker.clone();
    let connector = Box::new(move |port| broker.connect(port));
    let device = Vsock::new(VsockState::new(cid), listener, connector);
    let device = device.or_host_of(Part::Device(name.to_owned()))?;
    Ok(PendingDevice::new(device))
}
