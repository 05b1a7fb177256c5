//! The agent: makes the guest what its image says, runs what the host asks for,
//! and tells it how that ended.

mod command;
mod copies;
mod directory;
mod disks;
mod names;
mod passwd;
mod process;
mod reaper;
mod serve;
mod session;
mod settings;
mod setup;
mod snapshot;
mod vsock;

pub use self::serve::run;
