//! What of the host devices have.

use super::net::NetConfig;
use crate::net::user::UserNet;

/// What of the host a device has.
#[derive(Clone, Debug)]
pub struct Host<T> {
    /// The device's name in the specification.
    pub device: String,
    /// What it has.
    pub config: T,
}

/// A network device's side of the host.
#[derive(Clone, Debug)]
pub struct HostNet {
    /// What it leads to.
    pub config: NetConfig,
    /// The network of sockets, if it leads to one.
    pub user: Option<UserNet>,
}
