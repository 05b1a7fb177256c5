//! `mayfly boot`

use std::io::{IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;

use super::output;
use crate::config::{GuestFiles, HostFacts, NetConfig, RawConfig};
use crate::failure::{Class, Failure};
use crate::link::{Ending, Outcome};
use crate::supervisor;
use crate::timing::{Record, Timeline};

const EXAMPLES: &str = "\
Examples:
  mayfly boot
  mayfly boot --cpus 2 --memory 2G --disk path=root.img --cmdline root=/dev/vda
  mayfly boot --net tap=tap0 --console unix=/tmp/console --name web
  mayfly boot --net user,publish=8080:80,allow=*.debian.org
  mayfly boot --config vm.toml --memory 4G";

/// Flags of the machine, and of this run.
#[derive(clap::Args, Default)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    machine: RawConfig,
    /// Take flags from a TOML file; those given here win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print on standard error how long each phase took
    #[arg(long)]
    timing: bool,
    /// Print one JSON record at the end, as the last line of standard output
    #[arg(long)]
    json: bool,
    /// Only print the files that the VM would write to, each ended by a NUL
    #[arg(long, hide = true)]
    list_written: bool,
}

impl Args {
    /// What `mayfly` alone does: a shell on a terminal, else a demonstration.
    pub fn bare() -> Self {
        if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
            return Args::default();
        }
        Args {
            machine: RawConfig {
                cmdline: Some("-- demo".to_owned()),
                ..Default::default()
            },
            timing: true,
            ..Args::default()
        }
    }
}

/// Boots a VM and runs it to its end.
pub fn run(args: Args, timeline: Timeline) -> Result<ExitCode, Failure> {
    let file = match &args.config {
        Some(path) => RawConfig::from_file(path)?,
        None => RawConfig::default(),
    };
    let raw = args.machine.or(file);
    let (kernel, initrd) = (raw.kernel.clone(), raw.initrd.clone());
    let mut options = raw.parse()?;
    let host = HostFacts::look_up();
    // Before a guest is made, and ports are taken.
    options.check(&host)?;
    let guest = GuestFiles::choose(kernel.as_deref(), initrd.as_deref())?;
    if args.list_written {
        let config = options.validate(guest, &host)?;
        let mut list = Vec::new();
        for path in config.written() {
            list.extend_from_slice(path.as_os_str().as_bytes());
            list.push(0);
        }
        output::print_bytes(&list)?;
        return Ok(ExitCode::SUCCESS);
    }
    let ports = options.nets.iter_mut().map(NetConfig::choose_ports);
    let ports = ports.collect::<Result<_, _>>()?;
    let config = options.validate(guest, &host)?;
    let ending = supervisor::run(&config, ports, timeline)?;
    if args.timing {
        let _ = write!(std::io::stderr(), "{}", ending.timeline);
    }
    let code = exit_code(&ending.outcome);
    if args.json {
        output::print_json(&record(&ending, code))?;
    }
    match &ending.outcome {
        Outcome::Panic => output::report(&"the guest's kernel panicked"),
        Outcome::Hung(late) => output::report(&format!(
            "the guest hung: its watchdog was not fed for {} s",
            late.as_secs()
        )),
        Outcome::Crash(reason) => output::report(&format!("the guest crashed: {reason}")),
        Outcome::Internal(reason) => output::report(reason),
        _ => {}
    }
    if matches!(code, GUEST_CRASH | GUEST_PANIC) && !ending.last_lines.is_empty() {
        output::report(&"the guest's last lines:");
        for line in &ending.last_lines {
            let _ = writeln!(std::io::stderr(), "  {line}");
        }
    }
    Ok(ExitCode::from(code))
}

const GUEST_CRASH: u8 = Class::GuestCrash as u8;
const GUEST_PANIC: u8 = Class::GuestPanic as u8;

fn exit_code(outcome: &Outcome) -> u8 {
    const SIGNALLED: i32 = 128;
    match outcome {
        Outcome::PowerOff | Outcome::Reset | Outcome::Quit | Outcome::Forced | Outcome::Saved => 0,
        Outcome::Signal(signal) => u8::try_from(SIGNALLED + signal).unwrap_or(u8::MAX),
        Outcome::Panic => GUEST_PANIC,
        Outcome::Hung(_) | Outcome::Crash(_) => GUEST_CRASH,
        Outcome::Internal(_) => Class::Internal as u8,
    }
}

fn record(ending: &Ending, exit_code: u8) -> Record<'_> {
    let detail = match &ending.outcome {
        Outcome::Crash(reason) | Outcome::Internal(reason) => Some(reason.as_str()),
        _ => None,
    };
    Record {
        outcome: ending.outcome.name(),
        detail,
        exit_code,
        guest_status: ending.guest_status,
        timing_us: (&ending.timeline).into(),
    }
}
