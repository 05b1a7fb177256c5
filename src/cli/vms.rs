//! `mayfly ps`, `logs`, `exec`, `attach`, `cp`, `stop`, `kill`, `wait`, `rm`,
//! `inspect`, `stats`: VMs of `mayfly run`.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Subcommand;
use serde_json::{Value, json};

use super::logs;
use super::output;
use crate::control::{Client, Command, Folder};
use crate::failure::Failure;
use crate::run::detach::{self, DetachKeys};
use crate::run::record::{Record, State, VmDir};
use crate::run::{self, CopyOptions, ExecOptions, Usage, end, signal};
use crate::supervisor::Status;
use crate::timing::now_ms;
use mayfly_text::printable;

/// A machine that takes longer to tell of itself is left out.
const TIMEOUT: Duration = Duration::from_secs(2);

/// How many seconds a command has to end, if nobody says how many.
const STOP_TIMEOUT: u64 = 10;

const CP_EXAMPLES: &str = "\
Examples:
  mayfly cp web:/etc/hosts .          a file, into a folder
  mayfly cp ./site/. web:/srv/www     what is in a folder
  mayfly cp web:/var/log - | tar t    an archive

A folder that is there gets SRC in it, or, if SRC ends in /., what is in SRC; else
DEST is what SRC becomes. Devices, named pipes, capabilities and set-user-ID bits of
a VM stay there, for an archive, too.";

/// The number of lines to show, or all.
#[derive(Clone, Copy, Debug)]
pub struct Lines(Option<usize>);

fn lines(text: &str) -> Result<Lines, String> {
    match text {
        "all" => Ok(Lines(None)),
        text => {
            let number = text.parse();
            let number = number.map_err(|_| "write a number, or all".to_owned())?;
            Ok(Lines(Some(number)))
        }
    }
}

/// What is asked of them.
#[derive(Subcommand)]
pub enum Verb {
    /// List the VMs of `mayfly run`
    Ps {
        /// Also those that have ended
        #[arg(short, long)]
        all: bool,
        /// Print names only
        #[arg(short, long, conflicts_with = "json")]
        quiet: bool,
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Print what a VM's command wrote, as far as it is kept (run --log-size)
    Logs {
        /// Go on until it ends
        #[arg(short, long)]
        follow: bool,
        /// Show only this number of last lines
        #[arg(short = 'n', long, value_name = "N|all", value_parser = lines)]
        tail: Option<Lines>,
        /// Print before each line when it began
        #[arg(short, long)]
        timestamps: bool,
        /// The VM's name
        vm: String,
    },
    /// Run another command in a VM
    #[command(after_help = "Examples:\n  mayfly exec web ls /\n  mayfly exec -it web sh")]
    Exec(ExecArgs),
    /// Connect to the command of a VM in the background
    Attach {
        /// Do not pass standard input on
        #[arg(long)]
        no_stdin: bool,
        /// What to type on a terminal to leave it; it goes on
        #[arg(long, value_name = "KEYS", default_value = detach::DEFAULT)]
        detach_keys: String,
        /// The VM's name
        vm: String,
    },
    /// Copy files between a VM that runs and the host
    #[command(after_help = CP_EXAMPLES)]
    Cp {
        /// Keep owners and groups: in the VM, and on the host if you are root
        #[arg(short, long)]
        archive: bool,
        /// If SRC is a symbolic link, copy what it leads to
        #[arg(short = 'L', long)]
        follow_link: bool,
        /// VM:PATH, a path of the host, or - for a tar archive on standard input
        #[arg(value_name = "SRC")]
        from: OsString,
        /// VM:PATH, a path of the host, or - for a tar archive on standard output
        #[arg(value_name = "DEST")]
        to: OsString,
    },
    /// Ask VMs' commands to end; after a time, end them
    Stop {
        /// How many seconds they have [default: what --stop-timeout of run said, else 10]
        #[arg(short, long, visible_alias = "timeout", value_name = "SECONDS")]
        time: Option<u64>,
        /// What asks them [default: what each was started with]
        #[arg(short, long)]
        signal: Option<String>,
        /// Their names
        #[arg(required = true)]
        vm: Vec<String>,
    },
    /// Signal VMs' commands
    Kill {
        /// The signal
        #[arg(short, long, default_value = "KILL")]
        signal: String,
        /// Their names
        #[arg(required = true)]
        vm: Vec<String>,
    },
    /// Wait until VMs have ended, and print their exit statuses
    Wait {
        /// Their names
        #[arg(required = true)]
        vm: Vec<String>,
    },
    /// Remove what ended VMs left
    Rm {
        /// End those that run
        #[arg(short, long)]
        force: bool,
        /// Nothing, for Docker's command lines: what is a VM's own goes with it anyway
        #[arg(short, long)]
        volumes: bool,
        /// Their names
        #[arg(required = true)]
        vm: Vec<String>,
    },
    /// Print all there is to know about VMs, as JSON
    Inspect {
        /// Their names
        #[arg(required = true)]
        vm: Vec<String>,
    },
    /// Print where the host listens for a VM's ports
    Port {
        /// The VM's name
        vm: String,
        /// Only this one of the guest's
        #[arg(value_name = "PORT[/udp]")]
        port: Option<String>,
    },
    /// Print what VMs use of the host
    Stats {
        /// Only once
        #[arg(long)]
        no_stream: bool,
        /// Print JSON, one line a VM
        #[arg(long)]
        json: bool,
        /// Their names [default: all that run]
        vm: Vec<String>,
    },
}

/// What to run in a VM.
#[derive(clap::Args)]
pub struct ExecArgs {
    /// Pass standard input on
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_default_value = true, value_name = "true|false",
          hide_possible_values = true, action = clap::ArgAction::Set)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_default_value = true, value_name = "true|false",
          hide_possible_values = true, action = clap::ArgAction::Set)]
    tty: bool,
    /// Let it run, and do not wait for it
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_default_value = true, value_name = "true|false",
          hide_possible_values = true, action = clap::ArgAction::Set)]
    detach: bool,
    /// An environment variable, the host's own if there is no value (repeatable)
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<OsString>,
    /// A file with a variable in each line (repeatable)
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// The folder to run in [default: that of the VM's command]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<OsString>,
    /// Who runs it [default: the user of the VM's command]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Nothing, for Docker's command lines: root has all that the VM's kernel gives
    #[arg(long)]
    privileged: bool,
    /// What to type on a terminal to leave it; it goes on
    #[arg(long, value_name = "KEYS", default_value = detach::DEFAULT)]
    detach_keys: String,
    /// The VM's name, and what to run, word by word, with whatever flags it has
    // One list: nothing behind its first word is a flag.
    #[arg(value_names = ["VM", "COMMAND"], required = true, num_args = 1..,
          trailing_var_arg = true)]
    words: Vec<OsString>,
}

impl ExecArgs {
    #[cfg(test)]
    pub(super) fn words(&self) -> &[OsString] {
        &self.words
    }

    fn run(self) -> Result<u8, Failure> {
        let mut words = self.words.into_iter();
        let name = words.next().unwrap_or_default();
        let command: Vec<_> = words.collect();
        let name = name.to_string_lossy().into_owned();
        if command.is_empty() {
            return Err(Failure::config(format!(
                "exec {name}: say what to run: mayfly exec {name} COMMAND"
            )));
        }
        run::exec(ExecOptions {
            interactive: self.interactive,
            terminal: self.tty,
            detach: self.detach,
            environment: self.env,
            environment_files: self.env_file,
            folder: self.workdir,
            user: self.user,
            detach_keys: keys(&self.detach_keys)?,
            name,
            command,
        })
    }
}

/// Does it.
pub fn run(verb: Verb) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Ps { all, quiet, json } => ps(all, quiet, json)?,
        Verb::Logs {
            follow,
            tail,
            timestamps,
            vm,
        } => logs::print(
            &VmDir::find(&vm)?,
            follow,
            tail.and_then(|lines| lines.0),
            timestamps,
        )?,
        Verb::Exec(args) => return Ok(exit_code(args.run())),
        Verb::Attach {
            no_stdin,
            detach_keys,
            vm,
        } => {
            let attach = |keys| run::attach(&vm, !no_stdin, keys);
            return Ok(exit_code(keys(&detach_keys).and_then(attach)));
        }
        Verb::Cp {
            archive,
            follow_link,
            from,
            to,
        } => run::cp(&CopyOptions {
            archive,
            follow: follow_link,
            from,
            to,
        })?,
        Verb::Stop { time, signal, vm } => {
            let signal = signal.as_deref().map(signal_number).transpose()?;
            each(&vm, |vm_dir| {
                let said = || vm_dir.record().ok().and_then(|vm| vm.stop_timeout);
                let time = time.or_else(said).unwrap_or(STOP_TIMEOUT);
                end::stop(vm_dir, signal, Duration::from_secs(time))?;
                output::print(&vm_dir.name())
            })?;
        }
        Verb::Kill { signal, vm } => {
            let number = signal_number(&signal)?;
            each(&vm, |vm_dir| {
                end::kill(vm_dir, number)?;
                output::print(&vm_dir.name())
            })?;
        }
        Verb::Wait { vm } => each(&vm, |vm_dir| {
            // Without one, its process was killed.
            let status = vm_dir.wait()?.unwrap_or(end::STATUS_KILLED);
            output::print(&status.to_string())
        })?,
        Verb::Rm { force, vm, .. } => each(&vm, |vm_dir| {
            if force && vm_dir.state() == State::Running {
                end::kill(vm_dir, libc::SIGKILL)?;
                vm_dir.wait()?;
            }
            // One with --rm has removed itself.
            if !force || VmDir::find(&vm_dir.name()).is_ok() {
                vm_dir.remove()?;
            }
            output::print(&vm_dir.name())
        })?,
        Verb::Inspect { vm } => {
            let all: Vec<Value> = vm
                .iter()
                .map(|name| VmDir::find(name).and_then(|vm_dir| inspect(&vm_dir)))
                .collect::<Result<_, _>>()?;
            output::print_pretty_json(&all)?;
        }
        Verb::Port { vm, port } => super::port::port(&vm, port.as_deref())?,
        Verb::Stats {
            no_stream,
            json,
            vm,
        } => stats(&vm, json, no_stream || !io::stdout().is_terminal())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn signal_number(text: &str) -> Result<i32, Failure> {
    signal(text).ok_or_else(|| {
        Failure::config(format!(
            "--signal {text}: is no signal; write a name such as INT, or a number"
        ))
    })
}

fn keys(text: &str) -> Result<Option<DetachKeys>, Failure> {
    DetachKeys::parse(text).map_err(Failure::config)
}

fn exit_code(result: Result<u8, Failure>) -> ExitCode {
    ExitCode::from(result.unwrap_or_else(|failure| {
        output::report(&failure);
        run::STATUS_FAILED
    }))
}

/// Does something to each VM; one that is not there does not spare the others.
fn each(names: &[String], act: impl Fn(&VmDir) -> Result<(), Failure>) -> Result<(), Failure> {
    let mut result = Ok(());
    for name in names {
        let done = VmDir::find(name).and_then(|vm_dir| act(&vm_dir));
        if done.is_err()
            && let Err(earlier) = std::mem::replace(&mut result, done)
        {
            output::report(&earlier);
        }
    }
    result
}

fn ps(all: bool, quiet: bool, as_json: bool) -> Result<(), Failure> {
    let vms: Vec<(State, Record, Status)> = VmDir::all()?
        .into_iter()
        .filter_map(|vm_dir| Some((vm_dir.state(), vm_dir.record().ok()?, vm_dir.status())))
        .filter(|(state, ..)| all || *state == State::Running)
        .collect();
    if as_json {
        let all = vms.iter().map(|(state, vm, how)| describe(*state, vm, how));
        let all: Vec<Value> = all.collect();
        return output::print_json(&all);
    }
    if quiet {
        return vms
            .iter()
            .try_for_each(|(_, vm, _)| output::print(&vm.name));
    }
    output::print(&format!(
        "{:<24} {:<20} {:<24} {:<12} {:<24} {}",
        "NAME", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS"
    ))?;
    for (state, vm, how) in vms {
        let command = printable::text(&command_line(&vm));
        output::print(&format!(
            "{:<24} {:<20} {:<24} {:<12} {:<24} {}",
            vm.name,
            vm.image,
            shorten(&command, 24),
            format!("{} ago", age(vm.created_ms)),
            status(state, &vm, &how),
            vm.ports.join(", ")
        ))?;
    }
    Ok(())
}

fn command_line(vm: &Record) -> String {
    let words: Vec<_> = vm.command.iter().map(ToString::to_string).collect();
    words.join(" ")
}

fn status(state: State, vm: &Record, how: &Status) -> String {
    match (state, &vm.ended) {
        (State::Running, _) => {
            let paused = how.paused.then(|| "paused".to_owned());
            let problems = match how.problems.len() {
                0 => None,
                1 => Some("1 problem".to_owned()),
                number => Some(format!("{number} problems")),
            };
            let all: Vec<String> = paused.into_iter().chain(problems).collect();
            let up = format!("up {}", age(vm.created_ms));
            match all.is_empty() {
                true => up,
                false => format!("{up} ({})", all.join(", ")),
            }
        }
        (State::Ended, Some(ended)) => {
            format!("exited ({}) {} ago", ended.status, age(ended.at_ms))
        }
        (State::Ended, None) => "killed".to_owned(),
    }
}

fn describe(state: State, vm: &Record, how: &Status) -> Value {
    let mut value = json!(vm);
    if let Value::Object(map) = &mut value {
        let state = match (state, &vm.ended) {
            (State::Running, _) if how.paused => "paused",
            (State::Running, _) => "running",
            (State::Ended, Some(_)) => "exited",
            (State::Ended, None) => "killed",
        };
        map.insert("state".into(), state.into());
        if (state, &vm.ended) == ("killed", &None) {
            // As `wait` has it.
            let reason = "the supervisor process was killed";
            let ended = json!({ "status": end::STATUS_KILLED, "reason": reason });
            map.insert("ended".into(), ended);
        }
        if vm.ended.is_none() {
            map.insert("problems".into(), json!(how.problems));
        }
    }
    value
}

fn inspect(vm_dir: &VmDir) -> Result<Value, Failure> {
    let mut value = describe(vm_dir.state(), &vm_dir.record()?, &vm_dir.status());
    let socket = Folder::locate().socket(&vm_dir.name());
    let client = Client::connect(&socket, TIMEOUT);
    let machine = client.and_then(|mut client| client.ask(&Command::Info {}));
    if let (Value::Object(map), Ok(machine)) = (&mut value, machine) {
        map.insert("machine".into(), machine);
    }
    Ok(value)
}

fn stats(names: &[String], as_json: bool, once: bool) -> Result<(), Failure> {
    const INTERVAL: Duration = Duration::from_secs(1);
    let places = || -> Result<Vec<VmDir>, Failure> {
        match names {
            [] => VmDir::all(),
            names => names.iter().map(|name| VmDir::find(name)).collect(),
        }
    };
    loop {
        let before: Vec<(VmDir, Usage)> = places()?
            .into_iter()
            .filter(|vm_dir| vm_dir.state() == State::Running)
            .filter_map(|vm_dir| {
                let usage = Usage::of(vm_dir.record().ok()?.pid)?;
                Some((vm_dir, usage))
            })
            .collect();
        thread::sleep(INTERVAL);
        if !as_json {
            if !once {
                // The screen is this list's.
                output::print_bytes(b"\x1b[2J\x1b[H")?;
            }
            output::print(&format!(
                "{:<24} {:>7} {:>20}",
                "NAME", "CPU %", "MEMORY / OF"
            ))?;
        }
        for (vm_dir, before) in before {
            let Ok(vm) = vm_dir.record() else { continue };
            let Some(now) = Usage::of(vm.pid) else {
                continue;
            };
            let percent = before.percent(&now, INTERVAL);
            let memory = now.resident >> 20;
            match as_json {
                true => output::print_json(&json!({
                    "name": vm.name, "cpu_percent": percent, "memory": now.resident, "of": vm.memory,
                }))?,
                false => {
                    let of = format!("{memory} MiB / {}", vm.memory);
                    output::print(&format!("{:<24} {percent:>7.1} {of:>20}", vm.name))?;
                }
            }
        }
        if once {
            return Ok(());
        }
    }
}

fn age(since_ms: u64) -> String {
    let seconds = now_ms().saturating_sub(since_ms) / 1000;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

fn shorten(text: &str, len: usize) -> String {
    match text.chars().count() > len {
        true => text.chars().take(len - 1).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_short() {
        assert_eq!(shorten("abcdef", 4), "abc…");
        assert_eq!(shorten("äöü", 3), "äöü");
        assert_eq!(age(now_ms() - 61_000), "61 s");
        assert_eq!(age(now_ms() - 3_600_000), "60 min");
    }
}
