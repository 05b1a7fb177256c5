//! `mayfly compare`

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::ValueEnum;

use mayfly_compare::{self as compare, ENGINES, INTERRUPTED, Options, Outcome, report};
use mayfly_image::{PullOptions, Store};
use mayfly_sandbox as sandbox;

use super::output;
use crate::config::{CMDLINE_QUICK, parse_size};
use crate::data_folder::data_folder;
use crate::failure::{Failure, OrFail};
use crate::guests;
use crate::kvm;
use crate::kvm::accept::AcceptKvm;
use crate::net::passt;
use crate::progress_bars::Bars;

const EXAMPLES: &str = "\
Examples:
  mayfly compare
  mayfly compare debian -- python3 -c 'print(1)'
  mayfly compare --engines mayfly,container,podman --runs 30 --html report.html
  mayfly compare --measure start --runs 100 --csv samples.csv demo

Engines that are not installed are listed as missing. docs/comparing.md says how it is
measured, and how to read it.";

/// A plain number of memory's size counts MiB.
const MIB: u32 = 20;
const WIDTH: usize = 80;
const WIDTH_MAX: usize = 120;

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Measure {
    /// Starts, in phases.
    Start,
    /// What instances that idle have in memory.
    Memory,
    /// Many at once.
    Load,
    /// What usual work costs.
    Steady,
    /// What can be seen from inside.
    Isolation,
}

impl From<Measure> for compare::Measure {
    fn from(measure: Measure) -> Self {
        match measure {
            Measure::Start => compare::Measure::Start,
            Measure::Memory => compare::Measure::Memory,
            Measure::Load => compare::Measure::Load,
            Measure::Steady => compare::Measure::Steady,
            Measure::Isolation => compare::Measure::Isolation,
        }
    }
}

/// Flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// What runs everywhere, as `mayfly run` takes it
    #[arg(value_name = "IMAGE", default_value = "demo")]
    image: String,
    /// The command, behind -- [default: only the marker, which ends at once]
    #[arg(value_name = "COMMAND", last = true)]
    command: Vec<String>,
    /// How many runs of each engine count
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// How many come before, and do not
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1000))]
    warmup: u32,
    /// Whom to compare, of process, container, mayfly, mayfly-cold, runc, crun, podman,
    /// docker, qemu, firecracker, cloud-hypervisor; NAME=PROGRAM is one of your own [default: all that
    /// are here]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = engine)]
    engines: Vec<String>,
    /// What to look at [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    measure: Vec<Measure>,
    /// How many to start at once
    #[arg(long, value_name = "K", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=200))]
    parallel: u32,
    /// CPUs of each instance
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=32))]
    cpus: u32,
    /// Memory of each instance
    #[arg(long, short, value_name = "SIZE", default_value = "512M")]
    memory: String,
    /// What decides the order of runs [default: the time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Let the host forget all files before each run (root only)
    #[arg(long)]
    drop_caches: bool,
    /// How long one instance may take, in seconds
    #[arg(long, alias = "patience", value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    #[command(flatten)]
    accept_kvm: AcceptKvm,
    /// Only see to it that the image is there
    #[arg(long, hide = true)]
    only_obtain: bool,
    /// Write every sample, and what it was taken on
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page to look at
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the samples, and the figures of the steady state, as a table
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

/// Compares, and shows what was found.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let memory = parse_size(&args.memory, MIB);
    let memory =
        memory.map_err(|error| Failure::config(format!("--memory {}: {error}", args.memory)))?;
    if args.drop_caches && !rustix::process::geteuid().is_root() {
        return Err(Failure::config("--drop-caches: only root may"));
    }
    if args.only_obtain {
        let store = Store::open(&data_folder()?)?;
        store.obtain(&args.image, &PullOptions::default(), &Bars::new())?;
        return Ok(ExitCode::SUCCESS);
    }
    // Say what cannot be written before minutes are spent, not after.
    for path in [&args.json, &args.html, &args.csv].into_iter().flatten() {
        writable(path)?;
    }
    let time = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let options = Options {
        image: args.image,
        command: args.command,
        runs: args.runs,
        warmup: args.warmup,
        engines: args.engines,
        measures: match args.measure.is_empty() {
            true => Measure::value_variants(),
            false => &args.measure,
        }
        .iter()
        .map(|&it| it.into())
        .collect(),
        parallel: args.parallel,
        cpus: args.cpus,
        memory_mib: memory >> MIB,
        seed: args.seed.unwrap_or(u64::from(time.subsec_nanos())),
        drop_caches: args.drop_caches,
        timeout: Duration::from_secs(args.timeout),
        mayfly: mayfly(args.accept_kvm)?,
    };
    let (report, failure) = match compare::compare(&options, &Bars::new())? {
        Outcome::Status(status) => return Ok(ExitCode::from(status)),
        Outcome::Report(report, failure) => (report, failure),
    };
    let terminal = io::stdout().is_terminal();
    let width = if terminal { columns() } else { WIDTH };
    let colour = terminal && std::env::var_os("NO_COLOR").is_none();
    let what = "the report";
    // It took minutes: what can be shown is, whatever cannot.
    let mut shown = vec![output::print(
        report::table(&report, width, colour).trim_end(),
    )];
    if let Some(path) = &args.json {
        let text = report::json(&report).or_internal(what);
        shown.push(text.and_then(|text| write(path, &text)));
    }
    if let Some(path) = &args.csv {
        let text = report::csv(&report).or_internal(what);
        shown.push(text.and_then(|text| write(path, &text)));
    }
    if let Some(path) = &args.html {
        let text = report::html(&report).or_internal(what);
        shown.push(text.and_then(|text| write(path, &text)));
    }
    let failures = failure
        .map(Failure::from)
        .into_iter()
        .chain(shown.into_iter().filter_map(Result::err));
    let failures: Vec<Failure> = failures.collect();
    match failures.first() {
        Some(first) => {
            let all: Vec<_> = failures.iter().map(Failure::to_string).collect();
            Err(Failure::new(first.class, all.join("; ")))
        }
        None if report.interrupted => Ok(ExitCode::from(INTERRUPTED)),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// What mayfly tells of itself as one engine of several.
fn mayfly(accept_kvm: AcceptKvm) -> Result<compare::Mayfly, Failure> {
    let guest = guests::ensure_default()?;
    Ok(compare::Mayfly {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        store: data_folder()?,
        guest: compare::Guest {
            name: guest.name(),
            kernel: guest.kernel(),
            initrd: guest.compare_initrd(),
            run_initrd: guest.run_initrd(),
            probe: guest.probe(),
        },
        cmdline: CMDLINE_QUICK.to_owned(),
        check_kvm: Box::new(move || {
            let opened = kvm::open(accept_kvm);
            opened.map(drop).map_err(|failure| failure.to_string())
        }),
        flags: match accept_kvm.accept_kvm {
            true => vec!["--accept-kvm".to_owned()],
            false => Vec::new(),
        },
        passt: passt::program(),
        system_calls: sandbox::calls_max(),
    })
}

fn engine(text: &str) -> Result<String, String> {
    let own = text.split_once('=').is_some_and(|(name, program)| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !name.is_empty() && name.bytes().all(plain) && !program.is_empty()
    });
    match own || ENGINES.contains(&text) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "there are {}, and NAME=PROGRAM",
            ENGINES.join(", ")
        )),
    }
}

fn columns() -> usize {
    let size = rustix::termios::tcgetwinsize(io::stdout());
    match size.map(|size| usize::from(size.ws_col)) {
        Ok(columns @ 1..) => columns.min(WIDTH_MAX),
        _ => WIDTH,
    }
}

/// Tells what cannot be written; a file that is not there is not made by that.
fn writable(path: &Path) -> Result<(), Failure> {
    let open = |options: &mut OpenOptions| options.append(true).open(path);
    let tried = match open(OpenOptions::new().create_new(true)) {
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            open(OpenOptions::new().create(true)).map(drop)
        }
        Err(error) => Err(error),
    };
    tried.or_config(path.display())
}

/// Writes a file whole, or leaves what was there.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let written = || {
        // What a link leads to is written, not the link.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let there = fs::metadata(&path);
        let regular = there.as_ref().map_or(true, fs::Metadata::is_file);
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let permissions = match there {
            Ok(there) => there.permissions(),
            Err(_) => Permissions::from_mode(0o666),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".mayfly-").permissions(permissions);
        match builder.tempfile_in(folder) {
            Ok(mut file) if regular => {
                file.write_all(text.as_bytes())?;
                file.persist(path).map(drop).map_err(|error| error.error)
            }
            // A device, or one in a folder that is not the user's.
            _ => fs::write(path, text),
        }
    };
    written().or_host(path.display())
}
