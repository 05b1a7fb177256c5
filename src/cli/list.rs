//! `mayfly list`

use std::process::ExitCode;

use serde_json::Value;

use crate::control::{Client, Command, Folder};
use crate::failure::{Failure, OrFail};

const EXAMPLES: &str = "\
Examples:
  mayfly list
  mayfly list --json";

/// Raw flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

/// Prints this user's VMs.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let folder = Folder::locate();
    let ask = |name: String| {
        let mut client = Client::connect(&folder.socket(&name)).ok()?;
        client.ask(&Command::Info {}).ok()
    };
    let all: Vec<Value> = folder.names().into_iter().filter_map(ask).collect();
    if args.json {
        super::print(&serde_json::to_string(&all).or_internal("--json")?)?;
        return Ok(ExitCode::SUCCESS);
    }
    super::print(&format!(
        "{:<20} {:>8} {:<8} {:>4} {:>10} {:>10}",
        "NAME", "PID", "STATE", "CPUS", "MEMORY", "UPTIME"
    ))?;
    for vm in all {
        let number = |key: &str| vm[key].as_u64().unwrap_or(0);
        let text = |key: &str| vm[key].as_str().unwrap_or("?").to_owned();
        super::print(&format!(
            "{:<20} {:>8} {:<8} {:>4} {:>9}M {:>9}s",
            text("name"),
            number("pid"),
            text("state"),
            number("cpus"),
            number("memory") >> 20,
            number("uptime_ms") / 1000,
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
