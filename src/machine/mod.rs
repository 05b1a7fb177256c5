//! A machine from its configuration to its end.

mod build;
mod event_loop;
mod resources;
mod run;
mod signals;

pub use run::{Ending, Outcome, run};
