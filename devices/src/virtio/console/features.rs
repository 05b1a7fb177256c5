//! Queues and features of both devices.

/// The size of each queue: Linux fills one that receives with a page an entry.
pub const QUEUE_SIZE: u16 = 64;

/// The configuration space holds the terminal's size (virtio 1.2, 5.3.3).
pub const F_SIZE: u32 = 0;
/// There are several ports, and queues to speak of them.
pub const F_MULTIPORT: u32 = 1;
