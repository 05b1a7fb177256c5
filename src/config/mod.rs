//! From what a user asks for to a machine that makes sense: the only place that validates
//! and has defaults. Messages name the flag and the remedy.
//!
//! Flags and TOML become [`MachineOptions`] (`raw.rs`); `mayfly run` fills them in itself.
//! [`MachineOptions::validate`] makes a [`MachineConfig`] of them: the specification of the
//! machine, and what of the host its devices have, by their names. It opens nothing and looks
//! at nothing: what it has to know of the host it is given.

mod balloon;
mod cmdline;
mod console;
mod disk;
#[cfg(test)]
mod equal_tests;
mod folder;
mod guest;
mod host;
mod host_ends;
pub mod keys;
mod limits;
pub(crate) mod machine;
mod memory;
mod net;
mod options;
mod queues;
mod raw;
mod size;
mod vsock;
mod watchdog;

pub use self::balloon::BalloonConfig;
pub use self::cmdline::CMDLINE_QUICK;
pub use self::console::{ChannelConfig, ConsoleConfig, HostEnd};
pub use self::disk::{BackingConfig, DiskConfig, Format};
pub use self::folder::FolderConfig;
pub use self::guest::GuestFiles;
pub use self::host::HostFacts;
pub use self::host_ends::{Host, HostNet};
pub use self::keys::{FromKeys, Keys, Value};
pub use self::limits::take_limits;
#[cfg(test)]
pub(crate) use self::machine::testing;
pub use self::machine::{LAYERS, MachineConfig};
pub use self::net::{NetConfig, Network, parse_ports};
pub use self::options::{CPUS_DEFAULT, MachineOptions};
pub use self::queues::Queues;
pub use self::raw::{RawConfig, Setting, parse_cpus};
pub use self::size::parse_size;
pub use self::vsock::VsockConfig;
