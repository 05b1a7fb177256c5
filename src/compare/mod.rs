//! `mayfly compare`: the same image and command in VMs and containers, side by side.
//!
//! A comparison is [`prepare`]d, takes its samples in rounds in which each engine comes once,
//! then looks at memory, load, steady state and isolation, engine by engine. All that it
//! finds is in the [`Report`](model::Report).

mod capabilities;
pub mod container;
mod engines;
mod facts;
mod guard;
mod host;
mod instance;
pub mod model;
mod order;
mod overlay;
mod peer;
mod prepare;
mod processes;
mod removal;
pub mod report;
mod session;
pub mod statistics;
mod undo;

use std::time::Duration;

pub use self::engines::NAMES as ENGINES;
pub use self::guard::INTERRUPTED;
use self::guard::Scene;
pub use self::prepare::obtain;
use self::session::Session;
use crate::failure::{Failure, OrFail};
use crate::kvm::accept::AcceptKvm;

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Measure {
    /// Starts, in phases.
    Start,
    /// What instances that idle have in memory.
    Memory,
    /// Many at once.
    Load,
    /// What usual work costs.
    Steady,
    /// What can be seen from inside.
    Isolation,
}

/// What is to be compared.
#[derive(Clone, Debug)]
pub struct Options {
    /// As `mayfly run` takes it.
    pub image: String,
    /// Empty: only the marker.
    pub command: Vec<String>,
    /// Of each engine.
    pub runs: u32,
    /// Of each engine, before those.
    pub warmup: u32,
    /// Names, or none for all.
    pub engines: Vec<String>,
    /// What is looked at.
    pub measures: Vec<Measure>,
    /// How many at once.
    pub parallel: u32,
    /// Of each instance.
    pub cpus: u32,
    /// Of each instance, in MiB.
    pub memory_mib: u64,
    /// Decides the order.
    pub seed: u64,
    /// Let the host forget files before each run.
    pub drop_caches: bool,
    /// How long an instance may take.
    pub patience: Duration,
    /// Whether VMs use a KVM that seems to emulate.
    pub accept_kvm: AcceptKvm,
}

/// What a process is to do with a comparison.
pub enum Outcome {
    /// It is the one that compared: this is what it found, and what ended it early.
    Report(Box<model::Report>, Option<Failure>),
    /// It only waited for that one, whose status this is.
    Status(u8),
}

/// Compares. To be called while there is one thread.
pub fn compare(options: &Options) -> Result<Outcome, Failure> {
    guard::await_children();
    let scene = Scene::create()?;
    let other_half = match guard::divide(&scene)? {
        Ok(other_half) => other_half,
        Err(status) => {
            scene.clear();
            return Ok(Outcome::Status(status));
        }
    };
    // Until it is prepared a signal ends us at once, and our other half cleans up.
    let begin = |residents| {
        instance::hurry();
        Ok(instance::Ends {
            signals: processes::take_signals().or_host("signals")?,
            other_half,
            residents,
        })
    };
    let session = Session::new(options, &scene, begin);
    let report = session.and_then(|mut session| session.run());
    scene.clear();
    report.map(|(report, failure)| Outcome::Report(Box::new(report), failure))
}
