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
mod output;
mod port;
pub mod run;
pub mod snapshot;
pub mod template;
pub mod vms;
pub mod volume;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::output::report;
use crate::failure::Class;

/// A VM that starts faster than a container.
#[derive(Parser)]
#[command(name = "mayfly", version, about, after_help = EXIT_CODES, args_conflicts_with_subcommands = true,
          args_override_self = true)]
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
    /// Work with snapshots of VMs
    Snapshot(snapshot::Args),
    /// Work with the templates that make starts warm
    Template(template::Args),
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
    crate::signals::survive_file_limit();
    let launched = mayfly_compare::container::now();
    let timeline = crate::timing::Timeline::start();
    let words = match crate::arguments::take() {
        Ok(words) => words,
        Err(error) => {
            report(&format_args!("reading the command line: {error}"));
            return ExitCode::from(Class::Internal as u8);
        }
    };
    let cli = match Cli::try_parse_from(&words) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, words.get(1)),
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
        Some(Verb::Snapshot(args)) => snapshot::run(args),
        Some(Verb::Template(args)) => template::run(args, timeline),
        Some(Verb::Run(args)) => {
            return run::run(*args, words.get(2..).unwrap_or_default(), timeline);
        }
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
fn refuse(error: &clap::Error, verb: Option<&OsString>) -> ExitCode {
    let failed = match verb {
        Some(verb) if ["run", "exec", "attach"].iter().any(|it| verb == *it) => {
            crate::run::STATUS_FAILED
        }
        _ => Class::Config as u8,
    };
    let printed = error.print().and_then(|()| io::stdout().flush());
    match (error.exit_code(), printed) {
        (0, Ok(())) => ExitCode::SUCCESS,
        (0, Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        (0, Err(error)) => {
            report(&format_args!("standard output: {error}"));
            match failed {
                crate::run::STATUS_FAILED => ExitCode::from(failed),
                _ => ExitCode::from(Class::Host as u8),
            }
        }
        _ => ExitCode::from(failed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    /// What `mayfly run` makes of words; the flags, and what is behind the image.
    fn run_words(words: &[OsString]) -> (crate::run::Options, Vec<OsString>) {
        let words = [&["mayfly".into(), "run".into()], words].concat();
        match Cli::try_parse_from(words).unwrap().verb {
            Some(Verb::Run(args)) => {
                let options = args.options.sort().unwrap();
                let command = options.command.clone();
                (options, command)
            }
            _ => panic!("another verb"),
        }
    }

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn nothing_behind_the_image_is_mayfly_s() {
        for behind in [
            "--help",
            "-h",
            "-i",
            "-t",
            "-d",
            "--rm",
            "--json",
            "-v",
            "-e",
            "--",
            "-- -n a",
            "a -- b",
            "--detached x",
            "--only-obtain",
            "-e A=b --memory 1G",
            "--unknown",
        ] {
            for before in ["img", "--rm img", "-it -e A=b --name n img", "-- img"] {
                let all = words(&format!("{before} {behind}"));
                let (options, command) = run_words(&all);
                assert_eq!(options.image, "img", "{before} {behind}");
                assert_eq!(command, words(behind), "{before} {behind}");
            }
            let all = words(&format!("mayfly exec -i -- web {behind}"));
            match Cli::try_parse_from(all).unwrap().verb {
                Some(Verb::Vms(vms::Verb::Exec(args))) => {
                    assert_eq!(args.words()[1..], words(behind), "{behind}");
                }
                _ => panic!("another verb"),
            }
        }
        let bytes = OsString::from_vec(b"gr\xfcn".to_vec());
        let (_, command) = run_words(&["img".into(), bytes.clone()]);
        assert_eq!(command, [bytes]);
    }

    #[test]
    fn flags_are_taken_as_docker_takes_them() {
        let (options, _) = run_words(&words("--rm --rm=false -it=false --name a --name b img"));
        assert!(!options.remove && options.interactive && !options.terminal);
        assert_eq!(options.name().unwrap(), "b");
        let (options, _) = run_words(&words("-e A -e B --env C --network none --init img"));
        assert_eq!(options.environment, ["A", "B", "C"]);
        assert_eq!(options.net.as_deref(), Some("none"));
        for line in [
            "rm -fv a b",
            "stop -s INT --timeout 1 a",
            "logs -n all a",
            "logs --tail 5 a",
            "exec -it=false -d --privileged a true",
        ] {
            let all = words(&format!("mayfly {line}"));
            assert!(Cli::try_parse_from(all).is_ok(), "{line}");
        }
        assert!(Cli::try_parse_from(words("mayfly logs -n some a")).is_err());
    }
}
