//! A machine from its configuration to its end.

mod attach;
mod build;
mod control;
mod event_loop;
mod pidfile;
mod platform;
mod resources;
mod run;
mod signals;

pub(crate) use build::open_kvm;
pub use platform::PlatformHandle;
pub(crate) use resources::refusal;
pub use run::{Ending, Outcome, run};
pub(crate) use signals::{Signals, end_own_machine};
