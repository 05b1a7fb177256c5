//! `mayfly template`

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;

use super::image::{age, bytes};
use super::output;
use crate::config::parse_size;
use crate::failure::Failure;
use crate::run::template;
use crate::snapshot::store::{BUDGET, Listed, Templates};
use crate::timing::Timeline;

const EXAMPLES: &str = "\
Examples:
  mayfly template ls
  mayfly template rm 3f2a
  mayfly template prune --keep 500M

A template is a machine that is ready to run an image: its kernel has booted. It holds
nothing of an image and nothing of a user's. Templates are in the user's cache folder, and
can be made again.";

/// Raw flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List templates, those used last first
    #[command(alias = "list")]
    Ls {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
        /// Print names only
        #[arg(long, short, conflicts_with = "json")]
        quiet: bool,
    },
    /// Remove templates that no VM uses
    Rm {
        /// Names, or the beginnings of names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Remove templates that failed, and those not used for longest, until the others fit
    Prune {
        /// What the others may take on disk: 500M, 2G; 0 removes all that no VM uses
        /// [default: 2G]
        #[arg(long, value_name = "SIZE")]
        keep: Option<String>,
    },
    /// Make the template that standard input asks for
    #[command(hide = true)]
    Make {
        /// What is to be made comes on standard input: mayfly run asks so
        #[arg(long, required = true)]
        request: bool,
    },
}

/// How much of a name people are shown.
const SHORT: usize = 12;
/// A plain number counts MiB.
const MIB: u32 = 20;

/// Works with templates.
pub fn run(args: Args, timeline: Timeline) -> Result<ExitCode, Failure> {
    let templates = Templates::open_default()?;
    match args.verb {
        Verb::Make { .. } => template::make_requested(timeline)?,
        Verb::Ls { json, quiet } => list(&templates, json, quiet)?,
        Verb::Rm { names } => {
            for name in names {
                output::print(&templates.remove(&name)?.hex())?;
            }
        }
        Verb::Prune { keep } => {
            let parsed = keep.as_ref().map(|size| parse_size(size, MIB)).transpose();
            let parsed = parsed.map_err(|error| {
                Failure::config(format!("--keep {}: {error}", keep.unwrap_or_default()))
            })?;
            let gone = templates.prune(parsed.unwrap_or(BUDGET))?;
            for it in &gone {
                output::print(&format!("removed {}", it.name.hex()))?;
            }
            let freed = gone.iter().map(|it| it.bytes).sum();
            output::print(&format!("freed {}", bytes(freed)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list(templates: &Templates, json: bool, quiet: bool) -> Result<(), Failure> {
    let all = templates.list()?;
    if json {
        let one = |it: &Listed| {
            json!({
                "name": it.name.hex(),
                "size_bytes": it.bytes,
                "in_use": it.busy,
                "failure": it.failure,
                "manifest": it.manifest,
            })
        };
        let all: Vec<_> = all.iter().map(one).collect();
        return output::print_json(&all);
    }
    if !quiet {
        output::print(&format!(
            "{:<12} {:>10} {:>4} {:>10} {:>6}  STATUS",
            "NAME", "MEMORY", "CPUS", "ON DISK", "USED"
        ))?;
    }
    for it in all {
        let name = it.name.hex();
        if quiet {
            output::print(&name)?;
            continue;
        }
        let machine = it.manifest.as_ref().map(|manifest| &manifest.key.machine);
        let status = match (&it.failure, machine) {
            (Some(failure), _) => format!("failed: {failure}"),
            (None, None) => "cannot be read".into(),
            (None, Some(_)) if it.busy => "in use".into(),
            (None, Some(_)) => "ready".into(),
        };
        let memory = machine.map_or_else(|| "?".into(), |it| bytes(it.memory.size));
        output::print(&format!(
            "{:<12} {memory:>10} {:>4} {:>10} {:>6}  {status}",
            name.get(..SHORT).unwrap_or(&name),
            machine.map_or_else(|| "?".into(), |it| it.cpus.to_string()),
            bytes(it.bytes),
            age(it.used),
        ))?;
    }
    Ok(())
}
