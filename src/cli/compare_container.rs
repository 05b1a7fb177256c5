//! `mayfly compare-container`: not for people; `mayfly compare` starts it.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use super::output;
use crate::failure::{Failure, OrFail};
use mayfly_compare::container::{self, NO_CONTAINER, Spec};

/// Raw flags.
#[derive(clap::Args)]
pub struct Args {
    /// What the container is, as JSON
    spec: PathBuf,
}

/// Runs the container. The exit code is its command's.
pub fn run(args: &Args, launched: u64) -> ExitCode {
    match status(args, launched) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            output::report(&format_args!("compare-container: {failure}"));
            ExitCode::from(NO_CONTAINER)
        }
    }
}

fn status(args: &Args, launched: u64) -> Result<u8, Failure> {
    let text = fs::read(&args.spec).or_config(args.spec.display())?;
    let spec: Spec = serde_json::from_slice(&text).or_config(args.spec.display())?;
    Ok(container::run(&spec, launched)?)
}
