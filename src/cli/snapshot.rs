//! `mayfly snapshot`

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, IsTerminal, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Subcommand;
use mayfly_files::NewFile;
use serde_json::json;

use super::image::{age, bytes};
use super::output;
use crate::failure::{Failure, OrFail, file_refusal};
use crate::snapshot::store::{ListedSnapshot, SnapshotManifest, Snapshots};

const EXAMPLES: &str = "\
Examples:
  mayfly snapshot ls
  mayfly snapshot inspect warm
  mayfly snapshot export warm warm.snapshot
  mayfly snapshot export warm - | zstd | ssh other 'zstd -d | mayfly snapshot import -'
  mayfly snapshot rm warm

A snapshot holds all that was in its VM's memory: passwords and keys, too.";

/// Raw flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List snapshots
    #[command(alias = "list")]
    Ls {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
        /// Print names only
        #[arg(long, short, conflicts_with = "json")]
        quiet: bool,
    },
    /// Print all there is to know about snapshots, as JSON
    Inspect {
        /// Names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Remove snapshots that nothing uses
    Rm {
        /// Names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Write a snapshot as one file, which only its owner may read
    Export {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// The file, which must not exist; `-` for standard output
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Take a snapshot from such a file, when every byte of it is checked
    Import {
        /// The file; `-` for standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// What it is called [default: as where it was exported]
        #[arg(value_name = "NAME")]
        name: Option<String>,
    },
}

/// How much is read and written at once, in bytes.
const BUFFER: usize = 1 << 20;

/// Works with snapshots.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let snapshots = Snapshots::open_default()?;
    match args.verb {
        Verb::Ls { json, quiet } => list(&snapshots, json, quiet)?,
        Verb::Inspect { names } => {
            let one = |name: &String| {
                let snapshot = snapshots.find(name)?;
                let size = snapshot.bytes()?;
                Ok(json!({ "size_bytes": size, "manifest": snapshot.manifest }))
            };
            let all: Vec<_> = names.iter().map(one).collect::<Result<_, Failure>>()?;
            output::print_pretty_json(&all)?;
        }
        Verb::Rm { names } => {
            for name in names {
                snapshots.remove(&name)?;
                output::print(&name)?;
            }
        }
        Verb::Export { name, file } => export(&snapshots, &name, &file)?,
        Verb::Import { file, name } => {
            let input: Box<dyn Read> = match file.as_os_str() == "-" {
                true => Box::new(io::stdin().lock()),
                false => Box::new(
                    File::open(&file)
                        .map_err(|error| file_refusal(&error, &file.display().to_string()))?,
                ),
            };
            let mut input = BufReader::with_capacity(BUFFER, input);
            let snapshot = snapshots.import(&mut input, name.as_deref())?;
            output::print(&snapshot.manifest.name)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn export(snapshots: &Snapshots, name: &str, file: &Path) -> Result<(), Failure> {
    let snapshot = snapshots.find(name)?;
    if file.as_os_str() == "-" {
        let output = io::stdout().lock();
        if output.is_terminal() {
            return Err(Failure::config(
                "snapshot export: standard output is a terminal; name a file, or a pipe",
            ));
        }
        let mut output = BufWriter::with_capacity(BUFFER, output);
        return snapshots.export(&snapshot, &mut output);
    }
    if file.exists() && !file.is_file() {
        // A pipe, or a device.
        let output = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(file);
        let mut output = BufWriter::with_capacity(BUFFER, output.or_host(file.display())?);
        return snapshots.export(&snapshot, &mut output);
    }
    let new = NewFile::beside(file).or_host(file.display())?;
    let mut output = BufWriter::with_capacity(BUFFER, new.file());
    snapshots.export(&snapshot, &mut output)?;
    drop(output);
    new.keep().map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Failure::config(format!(
            "{}: there is a file of that name; remove it, or choose another",
            file.display()
        )),
        _ => Failure::host(format!("{}: {error}", file.display())),
    })
}

fn list(snapshots: &Snapshots, json: bool, quiet: bool) -> Result<(), Failure> {
    let all = snapshots.list()?;
    if json {
        let one = |it: &ListedSnapshot| {
            json!({
                "name": it.name,
                "size_bytes": it.bytes,
                "in_use": it.busy,
                "made_ms": it.manifest.as_ref().map(|it| it.made_ms),
                "source": it.manifest.as_ref().map(|it| &it.source),
            })
        };
        let all: Vec<_> = all.iter().map(one).collect();
        return output::print_json(&all);
    }
    if quiet {
        return all.iter().try_for_each(|it| output::print(&it.name));
    }
    output::print(&format!(
        "{:<24} {:<24} {:>10} {:>10} {:>6}  STATUS",
        "NAME", "VM", "MEMORY", "ON DISK", "MADE"
    ))?;
    for it in all {
        output::print(&row(&it))?;
    }
    Ok(())
}

fn row(it: &ListedSnapshot) -> String {
    let Some(manifest) = &it.manifest else {
        let size = bytes(it.bytes);
        return format!(
            "{:<24} {:<24} {:>10} {size:>10} {:>6}  cannot be read",
            it.name, "?", "?", "?"
        );
    };
    format!(
        "{:<24} {:<24} {:>10} {:>10} {:>6}  {}",
        it.name,
        mayfly_text::printable::lines(manifest.source.as_bytes()),
        bytes(manifest.machine.memory.size),
        bytes(it.bytes),
        age(made(manifest)),
        if it.busy { "in use" } else { "ready" }
    )
}

/// When it was made. What a foreign manifest says may be any number.
fn made(manifest: &SnapshotManifest) -> SystemTime {
    let made = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(manifest.made_ms));
    made.unwrap_or(SystemTime::UNIX_EPOCH)
}
