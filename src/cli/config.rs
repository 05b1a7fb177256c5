//! `mayfly config`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;

use crate::config::RawConfig;
use crate::failure::Failure;

const EXAMPLES: &str = r#"Examples:
  mayfly config check vm.toml

A file has the names of boot's flags:
  cpus = 2
  memory = { size = "2G", shared = true }
  [[disk]]
  path = "root.img""#;

/// Raw flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Check a file of mayfly boot --config, without booting it
    Check {
        /// The TOML file
        file: PathBuf,
    },
}

/// Runs the verb.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let Verb::Check { file } = args.verb;
    let flag = format!("--config {}", file.display());
    RawConfig::from_file(&file)?
        .validate()
        .map_err(|failure| Failure::new(failure.class, format!("{flag}: {failure}")))?;
    Ok(ExitCode::SUCCESS)
}
