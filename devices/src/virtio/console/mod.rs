//! The console device (virtio 1.2, 5.3) in its two forms: a [`Console`] is one
//! terminal, [`Channels`] are named ports.
//!
//! They are two devices on purpose. With `VIRTIO_CONSOLE_F_MULTIPORT` a
//! terminal appears some time after the driver, when messages went to and fro;
//! and its size comes in a message whose fields the specification and most
//! versions of Linux order differently. Without it, the terminal is there with
//! the driver, and its size lies in the configuration space.

mod channels;
mod port;
mod terminal;

pub use channels::{CHANNELS_MAX, Channels};
pub use port::Port;
pub use terminal::Console;

/// The size of each queue: Linux fills one that receives with a page an entry.
const QUEUE_SIZE: u16 = 64;

/// The configuration space holds the terminal's size (virtio 1.2, 5.3.3).
const F_SIZE: u32 = 0;
/// There are several ports, and queues to speak of them.
const F_MULTIPORT: u32 = 1;
