//! Packets, and their headers.

/// `struct virtio_net_hdr_v1`, and where its `num_buffers` is.
pub const HEADER: usize = 12;
pub const NUM_BUFFERS: usize = 10;
/// The largest packet, with its header: 64 KiB and an Ethernet header.
pub const PACKET_MAX: usize = HEADER + 14 + 65_535;

/// What came of a look for a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// One waits for the guest.
    Packet,
    /// One came, and is lost.
    Lost,
    /// There is none.
    Nothing,
}
