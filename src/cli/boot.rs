//! `mayfly boot`

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use mayfly_boot::Protocol;

use crate::config::RawConfig;
use crate::failure::{Class, Failure, OrFail};
use crate::machine::{self, Ending, Outcome};
use crate::timing::{Record, Timeline};

/// Raw flags.
#[derive(clap::Args, Default)]
pub struct Args {
    /// Kernel: a vmlinux (ELF) or a bzImage [default: the fetched one, else the host's]
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,
    /// Appended to the default kernel command line
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// The command line is --cmdline alone
    #[arg(long)]
    no_default_cmdline: bool,
    /// How to enter the kernel
    #[arg(long, value_name = "PROTOCOL", value_enum, default_value_t)]
    boot_protocol: BootProtocol,
    /// vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    cpus: Option<String>,
    /// Memory: 512M, 2G; a plain number is MiB [default: 512M]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory: Option<String>,
    /// A raw disk image or block device (repeatable)
    #[arg(long, value_name = "path=F[,ro][,id=S]")]
    disk: Vec<String>,
    /// A network device on a TAP device (repeatable)
    #[arg(long, value_name = "tap=NAME[,mac=…]")]
    net: Vec<String>,
    /// Serial console: stdio, file=F, pty, unix=S, none [default: stdio]
    #[arg(long, value_name = "WHERE")]
    console: Option<String>,
    /// Write mayfly's process id to a file, removed at the end
    #[arg(long, value_name = "F")]
    pidfile: Option<PathBuf>,
    /// Print on standard error how long each phase took
    #[arg(long)]
    timing: bool,
    /// Print one JSON record at the end, as the last line of standard output
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum BootProtocol {
    /// Linux' 64-bit entry, or PVH if there is no other
    #[default]
    Auto,
    /// The Linux 64-bit boot protocol
    Linux,
    /// Xen's PVH
    Pvh,
}

impl Args {
    /// What `mayfly` alone does: a shell on a terminal, else a demonstration.
    pub fn bare() -> Self {
        if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
            return Args::default();
        }
        Args {
            cmdline: Some("-- demo".to_owned()),
            timing: true,
            ..Args::default()
        }
    }
}

/// Boots a VM and runs it to its end.
pub fn run(args: Args, timeline: Timeline) -> Result<ExitCode, Failure> {
    let config = RawConfig {
        kernel: args.kernel,
        initrd: args.initrd,
        cmdline: args.cmdline,
        no_default_cmdline: args.no_default_cmdline,
        protocol: match args.boot_protocol {
            BootProtocol::Auto => None,
            BootProtocol::Linux => Some(Protocol::Linux64),
            BootProtocol::Pvh => Some(Protocol::Pvh),
        },
        cpus: args.cpus,
        memory: args.memory,
        disks: args.disk,
        nets: args.net,
        console: args.console,
        pidfile: args.pidfile,
    }
    .validate()?;
    let ending = machine::run(&config, timeline)?;
    if args.timing {
        eprint!("{}", ending.timeline);
    }
    let code = exit_code(&ending.outcome);
    if args.json {
        println!("{}", record(&ending, code)?);
    }
    match &ending.outcome {
        Outcome::Crash(reason) => eprintln!("mayfly: the guest crashed: {reason}"),
        Outcome::Internal(reason) => eprintln!("mayfly: {reason}"),
        _ => {}
    }
    Ok(ExitCode::from(code))
}

fn exit_code(outcome: &Outcome) -> u8 {
    const SIGNALLED: i32 = 128;
    match outcome {
        Outcome::PowerOff | Outcome::Reset | Outcome::Quit => 0,
        Outcome::Signal(signal) => u8::try_from(SIGNALLED + signal).unwrap_or(u8::MAX),
        Outcome::Crash(_) => Class::GuestCrash as u8,
        Outcome::Internal(_) => Class::Internal as u8,
    }
}

fn record(ending: &Ending, exit_code: u8) -> Result<String, Failure> {
    let (outcome, detail) = match &ending.outcome {
        Outcome::PowerOff => ("power-off", None),
        Outcome::Reset => ("reset", None),
        Outcome::Quit => ("quit", None),
        Outcome::Signal(_) => ("signal", None),
        Outcome::Crash(reason) => ("crash", Some(reason.as_str())),
        Outcome::Internal(reason) => ("internal", Some(reason.as_str())),
    };
    serde_json::to_string(&Record {
        outcome,
        detail,
        exit_code,
        guest_status: ending.guest_status,
        timing_us: (&ending.timeline).into(),
    })
    .or_internal("--json")
}
