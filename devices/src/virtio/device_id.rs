//! The kinds of virtio devices.

use virtio_bindings::virtio_ids;

/// The kind of device (virtio 1.2, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceId {
    /// Network card.
    Net = virtio_ids::VIRTIO_ID_NET,
    /// Block device.
    Block = virtio_ids::VIRTIO_ID_BLOCK,
    /// Console (virtio 1.2, 5.3).
    Console = virtio_ids::VIRTIO_ID_CONSOLE,
    /// Entropy source.
    Rng = virtio_ids::VIRTIO_ID_RNG,
    /// Memory balloon.
    Balloon = virtio_ids::VIRTIO_ID_BALLOON,
    /// Sockets between guest and host.
    Vsock = virtio_ids::VIRTIO_ID_VSOCK,
    /// File system.
    Fs = virtio_ids::VIRTIO_ID_FS,
}
