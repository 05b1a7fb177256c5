//! The command line: one file a verb, raw flags only.

pub mod boot;
pub mod compare;
pub mod compare_container;
pub mod config;
pub mod ctl;
pub mod doctor;
pub mod guest;
pub mod image;
pub mod initramfs;
pub mod kernel;
pub mod list;
mod logs;
pub mod run;
pub mod vms;
pub mod volume;

use std::fmt::Display;
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tempfile::NamedTempFile;

use crate::failure::{Class, Failure, OrFail};

/// A VM that starts faster than a container.
#[derive(Parser)]
#[command(name = "mayfly", version, about, after_help = EXIT_CODES, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// Run an image's command in a VM of its own
    Run(Box<run::Args>),
    #[command(flatten)]
    Vms(vms::Verb),
    /// Measure VMs and containers side by side, on this machine
    Compare(Box<compare::Args>),
    /// Boot a kernel (the default verb)
    Boot(Box<boot::Args>),
    /// Command a running VM
    Ctl(ctl::Args),
    /// List running VMs
    List(list::Args),
    /// Work with configuration files
    Config(config::Args),
    /// Work with container images
    Image(image::Args),
    /// Work with the guests that VMs boot by default
    Guest(guest::Args),
    /// Work with named volumes
    Volume(volume::Args),
    /// Tell what this host can do, and what to do about what it can't
    Doctor(doctor::Args),
    /// Work with kernels
    Kernel(kernel::Args),
    /// Build an initramfs
    Initramfs(initramfs::Args),
    /// Run one container of a comparison
    #[command(hide = true)]
    CompareContainer(compare_container::Args),
}

const EXIT_CODES: &str = "\
Examples:
  mayfly                   the default guest: a shell, or a demonstration
  mayfly boot --help       all there is to say about a machine
  mayfly doctor            can this host run VMs?

Exit codes:
  0      the guest turned off or restarted its machine
  1      mayfly itself failed
  2      what was asked for cannot be (flags, files)
  3      the host refuses (KVM, permissions, locks)
  4      the guest crashed or hung (triple fault, KVM internal error, watchdog)
  5      the guest's kernel panicked
  128+N  ended by signal N";

/// Runs what the command line asks for.
pub fn run() -> ExitCode {
    let launched = crate::compare::container::now();
    let timeline = crate::timing::Timeline::start();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let result = match cli.verb {
        None => boot::run(boot::Args::bare(), timeline),
        Some(Verb::Boot(args)) => boot::run(*args, timeline),
        Some(Verb::Compare(args)) => compare::run(*args),
        Some(Verb::Ctl(args)) => ctl::run(args),
        Some(Verb::List(args)) => list::run(args),
        Some(Verb::Config(args)) => config::run(args),
        Some(Verb::Image(args)) => image::run(args),
        Some(Verb::Guest(args)) => guest::run(args),
        Some(Verb::Volume(args)) => volume::run(args),
        Some(Verb::Run(args)) => return run::run(*args, timeline),
        Some(Verb::Vms(verb)) => vms::run(verb),
        Some(Verb::Doctor(args)) => doctor::run(args),
        Some(Verb::Kernel(args)) => kernel::run(args),
        Some(Verb::Initramfs(args)) => initramfs::run(args),
        Some(Verb::CompareContainer(args)) => return compare_container::run(&args, launched),
    };
    result.unwrap_or_else(|failure| {
        report(&failure);
        ExitCode::from(failure.status())
    })
}

/// Prints help, or what is wrong with the words. Those whose status is that of a
/// command in a VM need one of their own.
fn refuse(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    let verb = std::env::args_os().nth(1).unwrap_or_default();
    match error.exit_code() {
        0 => ExitCode::SUCCESS,
        _ if ["run", "exec", "attach"].iter().any(|it| verb == *it) => {
            ExitCode::from(crate::run::STATUS_FAILED)
        }
        code => ExitCode::from(u8::try_from(code).unwrap_or(Class::Config as u8)),
    }
}

/// One line on standard error. Nobody may be there to read it.
fn report(message: &impl Display) {
    let _ = writeln!(std::io::stderr(), "mayfly: {message}");
}

/// Writes a file that takes the place of an older one whole: VMs may have that
/// one mapped.
fn replace(path: &Path, data: &[u8]) -> io::Result<()> {
    if path.exists() && !path.is_file() {
        return fs::write(path, data); // a pipe, a device
    }
    let folder = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let mut file = NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))?;
    file.write_all(data)?;
    file.as_file()
        .set_permissions(Permissions::from_mode(0o644))?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

/// Prints a line; a reader that has gone is a failure, not a panic.
fn print(line: &str) -> Result<(), Failure> {
    writeln!(std::io::stdout(), "{line}").or_host("standard output")
}
