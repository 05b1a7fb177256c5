//! `mayfly list`

use std::process::ExitCode;
use std::time::Duration;

use mayfly_text::printable;
use serde_json::{Value, json};

use super::output;
use crate::control::{Client, ClientError, Command, Folder};
use crate::failure::Failure;

const EXAMPLES: &str = "\
Examples:
  mayfly list
  mayfly list --json";

/// A VM answers at once, unless its process is stopped.
const TIMEOUT: Duration = Duration::from_secs(2);

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
    let folder = Folder::open()?;
    let names = folder.names();
    let about = |name: &String| about(&folder, name, TIMEOUT);
    let all: Vec<Value> = names.iter().filter_map(about).collect();
    if args.json {
        output::print_json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::print(&format!(
        "{:<20} {:>8} {:<8} {:>4} {:>10} {:>10}",
        "NAME", "PID", "STATE", "CPUS", "MEMORY", "UPTIME"
    ))?;
    for vm in all {
        let number = |key: &str, scale: u64| match vm[key].as_u64() {
            Some(number) => (number / scale).to_string(),
            None => "?".to_owned(),
        };
        let text = |key: &str| printable::text(vm[key].as_str().unwrap_or("?"));
        output::print(&format!(
            "{:<20} {:>8} {:<8} {:>4} {:>9}M {:>9}s",
            text("name"),
            number("pid", 1),
            text("state"),
            number("cpus", 1),
            number("memory", 1 << 20),
            number("uptime_ms", 1000),
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What a VM says of itself; nothing if it does not run.
fn about(folder: &Folder, name: &str, timeout: Duration) -> Option<Value> {
    let ask = || Client::connect(&folder.socket(name), timeout)?.ask(&Command::Info {});
    match ask() {
        Ok(info) => Some(info),
        Err(ClientError::NotRunning | ClientError::Ended) => None,
        Err(_) => Some(json!({ "name": name, "state": "silent" })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_does_not_answer_is_listed_and_one_that_is_not_there_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let folder = Folder::at(&folder.path().join("run"));
        let (listener, _name) = folder.listen("vm").unwrap();
        let about = || about(&folder, "vm", Duration::from_millis(20));
        let silent = json!({ "name": "vm", "state": "silent" });
        assert_eq!(about(), Some(silent));
        drop(listener);
        assert_eq!(about(), None);
    }
}
