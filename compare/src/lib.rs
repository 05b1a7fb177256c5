//! `mayfly compare`: the same image and command in VMs and containers, side by side.
//!
//! A comparison is [`prepare`]d, takes its samples in rounds in which each engine comes once,
//! then looks at memory, load, steady state and isolation, engine by engine. All that it
//! finds is in the [`Report`](model::Report).

#![cfg_attr(
    not(test),
    deny(
        clippy::cast_lossless,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss
    )
)]

mod capabilities;
pub mod container;
mod engines;
pub mod error;
mod facts;
mod guard;
mod host;
mod instance;
pub mod model;
mod options;
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

use mayfly_image::Progress;

pub use self::engines::NAMES as ENGINES;
use self::error::Context;
pub use self::error::{Error, ErrorKind};
pub use self::guard::INTERRUPTED;
use self::guard::Workspace;
pub use self::options::{Guest, Mayfly, Measure, Options};
use self::session::Session;

/// What a process is to do with a comparison.
pub enum Outcome {
    /// It is the one that compared: this is what it found, and what ended it early.
    Report(Box<model::Report>, Option<Error>),
    /// It only waited for that one, whose status this is.
    Status(u8),
}

/// Compares. To be called while there is one thread.
pub fn compare(options: &Options, progress: &dyn Progress) -> Result<Outcome, Error> {
    guard::await_children();
    let workspace = Workspace::create()?;
    let other_half = match guard::divide(&workspace)? {
        Ok(other_half) => other_half,
        Err(status) => {
            workspace.clear();
            return Ok(Outcome::Status(status));
        }
    };
    // Until it is prepared a signal ends us at once, and our other half cleans up.
    let begin = |residents| {
        instance::hurry();
        Ok(instance::batch::Ends {
            signals: processes::take_signals().or_host("signals")?,
            other_half,
            residents,
        })
    };
    let session = Session::new(options, progress, &workspace, begin);
    let report = session.and_then(|mut session| session.run());
    workspace.clear();
    report.map(|(report, failure)| Outcome::Report(Box::new(report), failure))
}
