//! `mayfly volume`

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;

use super::image::bytes;
use super::output;
use crate::config::parse_size;
use crate::failure::Failure;
use crate::volume::{SIZE, Volumes};

const EXAMPLES: &str = "\
Examples:
  mayfly volume create data --size 20G
  mayfly run -v data:/var/lib/data demo touch /var/lib/data/x
  mayfly volume ls
  mayfly volume rm data";

/// Raw flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make a volume; mayfly run makes those that it misses
    Create {
        /// What it is called
        #[arg(value_name = "NAME")]
        name: String,
        /// What it can hold: 512M, 2G; it takes what is in use [default: 8G]
        #[arg(long, value_name = "SIZE")]
        size: Option<String>,
    },
    /// List volumes
    #[command(alias = "list")]
    Ls {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
        /// Print names only
        #[arg(long, short, conflicts_with = "json")]
        quiet: bool,
    },
    /// Remove volumes, and what is in them
    Rm {
        /// Names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

/// A plain number counts MiB.
const MIB: u32 = 20;

/// Works with volumes.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let volumes = Volumes::open_default()?;
    match args.verb {
        Verb::Create { name, size } => {
            let parsed = size.as_ref().map(|size| parse_size(size, MIB)).transpose();
            let parsed = parsed.map_err(|error| {
                Failure::config(format!("--size {}: {error}", size.unwrap_or_default()))
            })?;
            if !volumes.create(&name, parsed.unwrap_or(SIZE))? {
                return Err(Failure::config(format!(
                    "volume {name}: there is one of that name"
                )));
            }
            output::print(&name)?;
        }
        Verb::Ls { json, quiet } => list(&volumes, json, quiet)?,
        Verb::Rm { names } => {
            for name in names {
                volumes.remove(&name)?;
                output::print(&name)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list(volumes: &Volumes, json: bool, quiet: bool) -> Result<(), Failure> {
    let all = volumes.list()?;
    if json {
        let one = |it: &crate::volume::Volume| {
            json!({
                "name": it.name,
                "path": it.path,
                "size_bytes": it.size,
                "used_bytes": it.used,
                "in_use": it.busy,
            })
        };
        let all: Vec<_> = all.iter().map(one).collect();
        return output::print_json(&all);
    }
    if !quiet {
        output::print(&format!(
            "{:<24} {:>10} {:>10}  IN USE",
            "NAME", "SIZE", "ON DISK"
        ))?;
    }
    for volume in all {
        output::print(&match quiet {
            true => volume.name,
            false => format!(
                "{:<24} {:>10} {:>10}  {}",
                volume.name,
                bytes(volume.size),
                bytes(volume.used),
                if volume.busy { "yes" } else { "no" }
            ),
        })?;
    }
    Ok(())
}
