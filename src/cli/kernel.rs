//! `mayfly kernel`

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use mayfly_boot::payload;

use super::output;
use crate::failure::{Failure, OrFail};

const EXAMPLES: &str = "\
Examples:
  mayfly kernel extract /boot/vmlinuz-6.12.0 vmlinux";

/// Raw flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Unpack the ELF kernel (vmlinux) inside a bzImage: it boots faster
    Extract {
        /// The bzImage (vmlinuz)
        source: PathBuf,
        /// The file to write
        target: PathBuf,
    },
}

/// Runs the verb.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let Verb::Extract { source, target } = args.verb;
    let image = fs::read(&source).or_config(source.display())?;
    let vmlinux = payload::extract_vmlinux(&image).or_config(source.display())?;
    output::replace(&target, &vmlinux).or_host(target.display())?;
    Ok(ExitCode::SUCCESS)
}
