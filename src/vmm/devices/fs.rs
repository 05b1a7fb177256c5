//! Shared directories, by vhost-user backends.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use mayfly_devices::virtio::fs::{Frontend, Fs};

use super::pending::{PendingDevice, first};
use crate::link::{BlamePart, Broker, Part, VmmFailure};

/// A device whose backend was greeted, and offered features.
pub fn make(
    name: &str,
    tag: &str,
    features: u64,
    socket: Vec<OwnedFd>,
    broker: &Arc<Broker>,
) -> Result<PendingDevice, VmmFailure> {
    let part = || Part::Device(name.to_owned());
    let socket = UnixStream::from(first(name, socket)?);
    let backend = Frontend::resume(socket, features).or_host_of(part())?;
    let (broker, device) = (broker.clone(), name.to_owned());
    let end = Box::new(move || broker.end_helper(&device));
    let device = Fs::new(backend, tag, end).or_host_of(part())?;
    Ok(PendingDevice::new(device))
}
