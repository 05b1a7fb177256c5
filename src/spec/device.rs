//! The virtio devices of a specification.

use mayfly_devices::rate_limiter::Limits;
use mayfly_devices::virtio::balloon::Abilities;
use serde::{Deserialize, Serialize};

/// A virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSpec {
    /// What commands, metrics and messages call it, such as `disk0` or `rng`. No two devices of
    /// a machine have the same name.
    pub name: String,
    /// What it is.
    pub kind: DeviceKind,
}

/// What a device is, and what the guest can see of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum DeviceKind {
    /// A disk (virtio 1.2, 5.2).
    Block(BlockSpec),
    /// A network device (5.1).
    Net(NetSpec),
    /// A shared directory (5.11).
    Fs {
        /// The tag that the guest mounts it by.
        tag: String,
    },
    /// Sockets between guest and host (5.10).
    Vsock {
        /// The guest's address.
        cid: u32,
    },
    /// An entropy device (5.4).
    Rng,
    /// A memory balloon (5.5).
    Balloon {
        /// Its size in bytes when the guest boots.
        size: u64,
        /// What it offers the guest.
        abilities: Abilities,
    },
    /// The console, beside the serial port (5.3).
    Console,
    /// Named ports, `/dev/virtio-ports/NAME` in the guest (5.3).
    Channels {
        /// The ports' names.
        names: Vec<String>,
    },
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockSpec {
    /// The guest may not write.
    pub read_only: bool,
    /// The serial number, at most 20 ASCII characters.
    pub id: String,
    /// The number of queues, one or more.
    pub queues: u8,
    /// How much the guest may move.
    pub limits: Limits,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// The guest's address.
    pub mac: [u8; 6],
    /// The number of pairs of queues, one or more.
    pub queues: u8,
    /// How much the guest may send, and as much again receive.
    pub limits: Limits,
}
