//! `mayfly config`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;

use crate::config::{GuestFiles, HostFacts, RawConfig};
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
    check(RawConfig::from_file(&file)?)
        .map_err(|failure| Failure::new(failure.class, format!("{flag}: {failure}")))?;
    Ok(ExitCode::SUCCESS)
}

/// Checks all that can be checked without making anything: where no kernel is named there may
/// be no guest yet.
fn check(raw: RawConfig) -> Result<(), Failure> {
    let kernel = raw.kernel.clone().unwrap_or_default();
    let guest = GuestFiles {
        // A default guest has mayfly's init.
        own_init: raw.kernel.is_none() && raw.initrd.is_none(),
        ..GuestFiles::named(&kernel, raw.initrd.as_deref())
    };
    let options = raw.parse()?;
    options.validate(guest, &HostFacts::look_up()).map(drop)
}
