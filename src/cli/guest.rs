//! `mayfly guest`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;

use super::image::bytes;
use super::output;
use crate::failure::Failure;
use crate::guests::{Guest, Guests, MakeOptions};

const EXAMPLES: &str = "\
Examples:
  mayfly guest make
  mayfly guest make --debian
  mayfly guest make mine --kernel vmlinux --modules /lib/modules/6.12.0
  mayfly guest use mine

A guest is the kernel that VMs boot by default, with mayfly's init in its initial RAM
disks. The first mayfly run or mayfly boot makes one: from this host's own kernel and
modules, or on Debian from the cloud kernel's package. It is made anew when mayfly is
upgraded.";

/// Raw flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List guests
    #[command(alias = "list")]
    Ls {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
        /// Print names only
        #[arg(long, short, conflicts_with = "json")]
        quiet: bool,
    },
    /// Make a guest; the first is the default
    Make {
        /// What it is called [default: its kernel's release, or file]
        #[arg(value_name = "NAME")]
        name: Option<String>,
        /// Its kernel: a vmlinux or a vmlinuz [default: the host's, or Debian's]
        #[arg(long, value_name = "FILE")]
        kernel: Option<PathBuf>,
        /// The folder of its modules, with modules.dep [default: none, if --kernel is given]
        #[arg(long, value_name = "DIR", requires = "kernel")]
        modules: Option<PathBuf>,
        /// Take the kernel of Debian's cloud package, not the host's
        #[arg(long, conflicts_with = "kernel")]
        debian: bool,
    },
    /// Make a guest the default
    Use {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Remove guests
    Rm {
        /// Their names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

/// Works with guests.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let guests = Guests::locate()?;
    match args.verb {
        Verb::Ls { json, quiet } => list(&guests, json, quiet)?,
        Verb::Make {
            name,
            kernel,
            modules,
            debian,
        } => {
            let options = MakeOptions {
                name,
                kernel,
                modules,
                debian,
            };
            let guest = guests.make(&options)?;
            output::print(&guest.name())?;
        }
        Verb::Use { name } => {
            guests.choose(&name)?;
            output::print(&name)?;
        }
        Verb::Rm { names } => {
            for name in names {
                guests.remove(&name)?;
                output::print(&name)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list(guests: &Guests, json: bool, quiet: bool) -> Result<(), Failure> {
    let all = guests.list();
    let default = guests.default_guest().map(|guest| guest.name());
    let is_default = |guest: &Guest| default.as_ref() == Some(&guest.name());
    if json {
        let one = |it: &Guest| {
            json!({
                "name": it.name(),
                "default": is_default(it),
                "kernel": it.kernel(),
                "source": it.source(),
                "size_bytes": it.size(),
                "made_ms": it.made_ms(),
            })
        };
        let all: Vec<_> = all.iter().map(one).collect();
        return output::print_json(&all);
    }
    if !quiet {
        output::print(&format!("{:<32} {:>10}  DEFAULT", "NAME", "SIZE"))?;
    }
    for guest in all {
        output::print(&match quiet {
            true => guest.name(),
            false => format!(
                "{:<32} {:>10}  {}",
                guest.name(),
                bytes(guest.size()),
                if is_default(&guest) { "yes" } else { "no" }
            ),
        })?;
    }
    Ok(())
}
