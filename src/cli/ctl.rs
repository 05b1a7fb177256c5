//! `mayfly ctl`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use mayfly_devices::rate_limiter::Limits;
use mayfly_text::printable;

use super::output;
use crate::config::{Keys, parse_size, take_limits};
use crate::control::{Client, ClientError, Command, Folder};
use crate::failure::{Class, Failure, OrFail};

const EXAMPLES: &str = "\
Examples:
  mayfly ctl web pause
  mayfly ctl web metrics | grep exits
  mayfly ctl web balloon 256M
  mayfly ctl web limit disk0 bw=10M,iops=500
  mayfly ctl web shutdown --deadline 10";

/// Longer than a VM takes to say that its event loop is stuck.
const TIMEOUT: Duration = Duration::from_secs(40);

/// Raw flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The VM's name (see mayfly list), or the path of its socket
    vm: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Stop all vCPUs
    Pause,
    /// Let them go on
    Resume,
    /// Print what the VM is and how it does, as JSON
    Info,
    /// Print events as they happen, one JSON line each, until the VM ends
    Events,
    /// Print all counters in Prometheus' text format
    Metrics,
    /// Ask the guest to turn off, and wait until it has
    Shutdown {
        /// End the VM after that many seconds all the same
        #[arg(long, value_name = "SECONDS", default_value_t = 30)]
        deadline: u64,
        /// Do not wait
        #[arg(long)]
        no_wait: bool,
    },
    /// Send a non-maskable interrupt to every vCPU
    Nmi,
    /// Ask the guest to give up that much of its memory, or to take it back
    Balloon {
        /// The balloon's size: 256M, 1G, 0; a plain number is MiB
        size: String,
    },
    /// Limit what a disk or network moves in a second: disk0 bw=10M,iops=500, or none
    Limit {
        /// The device's name: disk0, net0, …
        device: String,
        /// bw=10M[,bw-burst=50M], and iops= and iops-burst= of a disk, pps= and
        /// pps-burst= of a network; or none
        limits: String,
    },
}

/// Carries out the verb.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let path = match args.vm.contains('/') {
        true => PathBuf::from(&args.vm),
        false => Folder::open()?.socket(&args.vm),
    };
    let refuse = |error| refusal(error, &args.vm);
    let mut client = Client::connect(&path, TIMEOUT).map_err(refuse)?;
    match args.verb {
        Verb::Pause => drop(client.ask(&Command::Pause {}).map_err(refuse)?),
        Verb::Resume => drop(client.ask(&Command::Resume {}).map_err(refuse)?),
        Verb::Nmi => drop(client.ask(&Command::Nmi {}).map_err(refuse)?),
        Verb::Balloon { size } => {
            let wrong = |reason| Failure::config(format!("ctl balloon {size}: {reason}"));
            let size = parse_size(&size, 20).map_err(wrong)?;
            client.ask(&Command::Balloon { size }).map_err(refuse)?;
        }
        Verb::Limit { device, limits } => {
            let flag = format!("ctl {} limit {device} {limits}", args.vm);
            let limits = parse_limits(&device, &limits)
                .map_err(|error| Failure::config(format!("{flag}: {error}")))?;
            let command = Command::Limit { device, limits };
            drop(client.ask(&command).map_err(refuse)?);
        }
        Verb::Info => {
            let info = client.ask(&Command::Info {}).map_err(refuse)?;
            output::print_pretty_json(&info)?;
        }
        Verb::Metrics => {
            let metrics = client.ask(&Command::Metrics {}).map_err(refuse)?;
            let metrics = metrics.as_str().unwrap_or_default().trim_end();
            output::print(&printable::lines(metrics.as_bytes()))?;
        }
        Verb::Events => {
            client.ask(&Command::Events {}).map_err(refuse)?;
            while let Some(event) = client.event().map_err(refuse)? {
                output::print_json(&event)?;
            }
        }
        Verb::Shutdown { deadline, no_wait } => {
            // Asked for first, so that the end is not missed.
            let mut end = Client::connect(&path, TIMEOUT).map_err(refuse)?;
            end.ask(&Command::Events {}).map_err(refuse)?;
            client
                .ask(&Command::Shutdown { deadline })
                .map_err(refuse)?;
            while !no_wait && end.event().map_err(refuse)?.is_some() {}
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A network's operations are packets.
fn parse_limits(device: &str, text: &str) -> Result<Limits, String> {
    if text == "none" {
        return Ok(Limits::default());
    }
    let (operations, syntax) = match device.starts_with("net") {
        true => (
            "pps",
            "bw=10M,bw-burst=50M,pps=5000,pps-burst=1000, or none",
        ),
        false => (
            "iops",
            "bw=10M,bw-burst=50M,iops=500,iops-burst=1000, or none",
        ),
    };
    let mut keys = Keys::parse(text, syntax);
    let limits = take_limits(&mut keys, operations)?;
    keys.finish().map(|()| limits)
}

fn refusal(error: ClientError, vm: &str) -> Failure {
    let class = match error {
        ClientError::NotRunning | ClientError::Refused(_) => Class::Config,
        _ => Class::Host,
    };
    Err::<(), _>(error)
        .or_fail(class, format_args!("ctl {vm}"))
        .err()
        .unwrap_or_else(|| Failure::host(vm))
}
