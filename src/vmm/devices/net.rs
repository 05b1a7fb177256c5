//! Network devices.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use mayfly_devices::virtio::net::{Backend, Net};

use super::pending::{PendingDevice, first};
use crate::link::{BlamePart, Part, VmmFailure};
use crate::net::egress::{Egress, EgressPolicy};
use crate::net::host::KnownHost;
use crate::spec::NetSpec;

/// A device on a TAP, which was attached once for each pair of queues.
pub fn on_taps(
    name: &str,
    spec: &NetSpec,
    taps: Vec<OwnedFd>,
) -> Result<PendingDevice, VmmFailure> {
    let backends = taps.into_iter().map(|tap| Backend::tap(tap.into()));
    make(name, spec, backends.collect())
}

/// A device on a socket that takes frames, such as passt's, behind a filter.
pub fn on_stream(
    name: &str,
    spec: &NetSpec,
    socket: Vec<OwnedFd>,
    policy: EgressPolicy,
    host: &KnownHost,
) -> Result<PendingDevice, VmmFailure> {
    let socket = UnixStream::from(first(name, socket)?);
    let filter = Box::new(Egress::new(policy, host.clone()));
    let backend = Backend::stream(socket, Some(filter));
    make(name, spec, vec![backend.or_host_of(part(name))?])
}

fn make(name: &str, spec: &NetSpec, backends: Vec<Backend>) -> Result<PendingDevice, VmmFailure> {
    if backends.len() != usize::from(spec.queues) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput)).or_host_of(part(name));
    }
    let device = Net::new(backends, spec.mac, spec.limits).or_host_of(part(name))?;
    let limits = device.limit_handle();
    Ok(PendingDevice::limited(device, limits))
}

fn part(name: &str) -> Part {
    Part::Device(name.to_owned())
}
