//! `mayfly doctor`

use std::process::ExitCode;

use super::output;
use crate::doctor::{self, Verdict};
use crate::failure::{Class, Failure};
use crate::kvm::accept::AcceptKvm;

const EXAMPLES: &str = "\
Examples:
  mayfly doctor
  mayfly doctor --can-boot && mayfly boot";

/// Raw flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Print one JSON array
    #[arg(long)]
    json: bool,
    /// Only tell, by the exit code, whether VMs can run here; if not, why
    #[arg(long, conflicts_with = "json")]
    can_boot: bool,
    #[command(flatten)]
    accept_kvm: AcceptKvm,
}

/// Examines the host. The exit code is 0 if VMs can run, else 3.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    if args.can_boot {
        return crate::kvm::open(args.accept_kvm).map(|_| ExitCode::SUCCESS);
    }
    let checks = doctor::examine(args.accept_kvm);
    if args.json {
        output::print_json(&checks)?;
    } else {
        for check in &checks {
            output::print(&check.to_string())?;
        }
    }
    let fatal = checks.iter().any(|check| check.verdict == Verdict::Fatal);
    Ok(match fatal {
        true => ExitCode::from(Class::Host as u8),
        false => ExitCode::SUCCESS,
    })
}
