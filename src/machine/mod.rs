//! A machine from its configuration to its end: a process of its own, and its keeper.

mod attach;
mod build;
mod clients;
mod control;
mod event_loop;
mod keeper;
mod link;
mod pidfile;
mod platform;
mod resources;
mod run;
mod signals;
mod status;
mod vmm_process;

pub(crate) use build::open_kvm;
pub use keeper::{Keeper, run};
pub use platform::PlatformHandle;
pub(crate) use resources::refusal;
pub use run::{Ending, Outcome};
pub(crate) use signals::Signals;
#[cfg(test)]
pub(crate) use signals::raise;
pub use signals::{StartSignals, survive_file_limit};
pub use status::{Status, StatusBoard};
pub use vmm_process::StopHandle;
