//! The console device (virtio 1.2, 5.3) in its two forms: a [`Console`] is one
//! terminal, [`Channels`] are named ports.
//!
//! They are two devices on purpose. With `VIRTIO_CONSOLE_F_MULTIPORT` a
//! terminal appears some time after the driver, when messages went to and fro;
//! and its size comes in a message whose fields the specification and most
//! versions of Linux order differently. Without it, the terminal is there with
//! the driver, and its size lies in the configuration space.

mod channels;
mod features;
mod port;
mod terminal;

pub use channels::{CHANNELS_MAX, Channels};
pub use port::Port;
pub use terminal::Console;
