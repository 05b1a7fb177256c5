//! What is saved of virtio devices: all that a guest can tell by, but for its memory.
//!
//! These are plain structs, so that one look shows what a snapshot holds. What is read
//! back is as hostile as a guest: [`VirtioMmio::restore`](super::mmio::VirtioMmio::restore)
//! and the devices check it. Rates, counters and the host's ends are not in it: they are
//! the host's.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::device_id::DeviceId;

/// The version of [`VirtioState`] and all that is in it.
pub const VERSION: u16 = 1;

/// A device behind its transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// [`VERSION`], when it was written.
    pub version: u16,
    /// The registers and the rings' positions.
    pub transport: TransportState,
    /// The device itself.
    pub device: DeviceState,
}

/// What the driver chose for a queue, and how far the device is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    pub(super) next_available: u16,
    pub(super) next_used: u16,
}

/// What the guest can see of the transport (virtio 1.2, 4.2.2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) acked: u64,
    pub(super) queue_select: u32,
    pub(super) interrupts: u32,
    pub(super) config_generation: u32,
    pub(super) queues: Vec<QueueSetup>,
}

/// The state of a kind of device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// An entropy source has none.
    Rng,
    /// A disk.
    Block(BlockState),
    /// A network card.
    Net(NetState),
    /// A terminal.
    Console(ConsoleState),
    /// Named ports, in order.
    Channels(Vec<ChannelState>),
    /// A memory balloon.
    Balloon(BalloonState),
    /// Sockets between guest and host.
    Vsock(VsockState),
}

/// A disk: requests in flight are completed before it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// The size that the guest knows, in sectors of 512 bytes.
    pub sectors: u64,
}

/// A network card. Frames that are on their way are lost, as networks lose frames.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// How many pairs of queues the guest uses.
    pub used_pairs: u16,
    /// What the guest knows of its link.
    pub link_up: bool,
}

/// A terminal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Columns and rows (virtio 1.2, 5.3.4), as the guest reads them.
    pub size: [u8; 4],
    /// The guest was notified of its first size.
    pub notified: bool,
    /// The bytes on their way through it.
    pub port: PortState,
}

/// A named port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    /// Its name.
    pub name: String,
    /// Messages that the guest is still to get of it, as bits.
    pub(super) news: u8,
    /// The driver has made the port.
    pub(super) ready: bool,
    /// When the guest has got all messages, it knows the host's side as connected.
    pub(super) connected: bool,
    /// The bytes on their way through it.
    pub port: PortState,
}

/// The bytes on their way through a console or channel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// The guest listens.
    pub(super) open: bool,
    /// Bytes for the guest.
    pub(super) input: VecDeque<u8>,
    /// Bytes of the guest.
    pub(super) output: VecDeque<u8>,
    /// How many bytes of the next chain to send are in `output` already.
    pub(super) taken: usize,
}

/// A memory balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// The configuration space (virtio 1.2, 5.5.4), in pages.
    pub(super) target: u32,
    pub(super) actual: u32,
    /// The buffer for statistics that the driver waits for, by its head.
    pub(super) held: Option<u16>,
}

/// Sockets between guest and host, but for their connections, which end with the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    pub(super) cid: u32,
    /// The guest is to be told that its connections ended.
    pub(super) ended: bool,
}

impl VsockState {
    /// The state of a device whose guest has an identifier of
    /// [`CIDS`](super::vsock::CIDS), and no connections.
    pub fn new(cid: u32) -> Self {
        VsockState { cid, ended: false }
    }
}

/// A device that cannot be saved, and the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a virtio device of kind {device:?} cannot be saved: {reason}")]
pub struct SaveError {
    /// The kind of device.
    pub device: DeviceId,
    /// The reason, as the end of a sentence.
    pub reason: &'static str,
}

/// Why a device cannot be made from a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Another version of mayfly wrote it.
    #[error("its version is {0}; this mayfly reads {VERSION}")]
    Version(u16),
    /// It is another kind of device's.
    #[error("it is not the state of a {0:?} device")]
    Kind(DeviceId),
    /// It contradicts itself, or the device that it is for.
    #[error("{0}")]
    Mismatch(&'static str),
    /// The host could not make the device.
    #[error("an event descriptor could not be made (errno {0})")]
    Host(i32),
}
