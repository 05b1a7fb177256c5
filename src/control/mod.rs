//! The control plane of a running VM: a socket in a private folder, over which
//! one line of JSON asks and one line answers.
//!
//! The server's threads hold no state of the machine: they send [`Ask`]s to
//! the event loop, which answers.

mod client;
mod folder;
mod protocol;
mod server;

pub use client::{Client, ClientError};
pub use folder::{Folder, NAME_MAX, valid_name};
pub use protocol::{Command, Event, Reply};
pub use server::{Ask, Server, Subscriber, Subscription};
