//! `mayfly exec` and `mayfly attach`: more connections to a VM's agent.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use mayfly_protocol::agent::{HostMessage, Process};

use super::agent::{Agent, AgentError, BlockingFile, Link, Streams};
use super::detach::DetachKeys;
use super::environment::{self, Wishes};
use super::force_quit::ForceQuit;
use super::record::{Record, State, VmDir};
use super::standard::{send_apart, standard, terminal_size};
use super::status::SIGNALLED;
use crate::console::terminal::{self, RawTerminal};
use crate::failure::{Failure, OrFail};
use crate::signals::Signals;

/// What to run in a VM, in the user's words.
#[derive(Clone, Debug, Default)]
pub struct ExecOptions {
    /// Pass standard input on.
    pub interactive: bool,
    /// Give the command a terminal.
    pub terminal: bool,
    /// Let it run, and wait for nothing.
    pub detach: bool,
    /// `NAME[=VALUE]`
    pub environment: Vec<OsString>,
    /// Files with a variable in each line.
    pub environment_files: Vec<PathBuf>,
    /// The folder to run in.
    pub folder: Option<OsString>,
    /// `USER[:GROUP]`
    pub user: Option<String>,
    /// What to leave it with.
    pub detach_keys: Option<DetachKeys>,
    /// The VM's name.
    pub name: String,
    /// What to run.
    pub command: Vec<OsString>,
}

/// Runs a command in a VM, and returns its status.
pub fn exec(options: ExecOptions) -> Result<u8, Failure> {
    check_terminal(options.terminal && options.interactive && !options.detach)?;
    let (vm_dir, record) = running(&options.name)?;
    let from_files = environment::of_files(&options.environment_files)?;
    let wishes = Wishes {
        flags: &options.environment,
        from_files: &from_files,
        terminal: options.terminal,
    };
    let given = record.environment.into_iter();
    let mut given: Vec<_> = given.map(|(name, value)| (name.0, value.0)).collect();
    given.extend(wishes.terminal());
    let process = Process {
        arguments: options
            .command
            .into_iter()
            .map(OsString::into_vec)
            .collect(),
        environment: wishes.onto(given)?,
        folder: options.folder.map_or(record.folder.0, OsString::into_vec),
        user: options.user.unwrap_or(record.user),
        groups: record.groups,
        limits: record.limits,
        no_new_privileges: record.no_new_privileges,
        terminal: options.terminal.then(terminal_size),
        input: options.interactive && !options.detach,
    };
    if options.detach {
        return start_only(&vm_dir, process);
    }
    follow(
        &vm_dir,
        HostMessage::Start(Box::new(process)),
        options.terminal,
        options.interactive,
        options.detach_keys,
    )
}

/// Connects to a VM's main process, and returns its status.
pub fn attach(name: &str, input: bool, keys: Option<DetachKeys>) -> Result<u8, Failure> {
    let (vm_dir, record) = running(name)?;
    let terminal = record.terminal && input && io::stdin().is_terminal();
    let size = record.terminal.then(terminal_size);
    follow(&vm_dir, HostMessage::Attach(size), terminal, input, keys)
}

fn running(name: &str) -> Result<(VmDir, Record), Failure> {
    let vm_dir = VmDir::find(name)?;
    if vm_dir.state() == State::Ended {
        return Err(Failure::config(format!(
            "{name}: has ended; see mayfly logs {name}"
        )));
    }
    vm_dir.need_unpaused()?;
    let record = vm_dir.record()?;
    Ok((vm_dir, record))
}

/// Starts a process that goes on when nobody follows it.
fn start_only(vm_dir: &VmDir, process: Process) -> Result<u8, Failure> {
    let mut agent = Agent::connect(&vm_dir.vsock()).or_host(vm_dir.name())?;
    match agent.start(process).and_then(|()| agent.leave()) {
        Ok(()) => Ok(0),
        Err(error) => tell(vm_dir, error),
    }
}

/// Tells why a command did not start; what that comes to as a status.
fn tell(vm_dir: &VmDir, error: AgentError) -> Result<u8, Failure> {
    match error {
        AgentError::Failed(failed) => {
            let _ = writeln!(io::stderr(), "mayfly: {}: {}", vm_dir.name(), failed.reason);
            Ok(failed.status)
        }
        error => Err(error).or_host(vm_dir.name()),
    }
}

/// Refuses to pass on what is typed on a terminal where there is none, as Docker does.
/// Without input, the command has a terminal all the same.
pub fn check_terminal(wanted: bool) -> Result<(), Failure> {
    match wanted && !io::stdin().is_terminal() {
        true => Err(Failure::config(
            "-i and -t: standard input is no terminal; leave one of them out",
        )),
        false => Ok(()),
    }
}

fn follow(
    vm_dir: &VmDir,
    request: HostMessage,
    terminal: bool,
    input: bool,
    keys: Option<DetachKeys>,
) -> Result<u8, Failure> {
    let signals = Signals::passed_on().or_internal("blocking signals")?;
    let shared: Arc<Mutex<Option<Link>>> = Arc::default();
    let link = shared.clone();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || pass_on(&signals, &link, terminal))
        .or_host("starting a thread")?;
    let mut agent = Agent::connect(&vm_dir.vsock()).or_host(vm_dir.name())?;
    let failed = |error| tell(vm_dir, error);
    if let Err(error) = agent.ask(&request) {
        return failed(error);
    }
    let raw = match terminal && input {
        true => RawTerminal::transparent(&standard(io::stdin()).or_host("standard input")?)
            .or_host("the terminal")?,
        false => None,
    };
    *shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(agent.link());
    let streams = (|| {
        Ok(Streams {
            input: input
                .then(|| standard(io::stdin()).map(BlockingFile))
                .transpose()?,
            // Elsewhere nobody types them.
            detach: keys.filter(|_| raw.is_some()),
            output: Box::new(BlockingFile(standard(io::stdout())?)),
            errors: Box::new(BlockingFile(standard(io::stderr())?)),
        })
    })();
    let streams = streams
        .map_err(|error: io::Error| error)
        .or_host("standard streams")?;
    let exit = agent.follow(streams);
    drop(raw);
    match exit {
        Ok(Some(exit)) => Ok(exit.status),
        Ok(None) => {
            let _ = writeln!(
                io::stderr(),
                "\nmayfly: left {}, which goes on",
                vm_dir.name()
            );
            Ok(0)
        }
        Err(error) => failed(error),
    }
}

/// Passes signals on to the process, once there is one.
fn pass_on(signals: &Signals, link: &Mutex<Option<Link>>, terminal: bool) {
    let mut force_quit = ForceQuit::default();
    let mut sender = None;
    while let Some(signal) = signals.wait() {
        let message = match signal {
            libc::SIGWINCH if !terminal => continue,
            libc::SIGWINCH => HostMessage::Resize(terminal_size()),
            signal => HostMessage::Signal(signal),
        };
        let link = link.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let leave = force_quit.heard(signal) || (link.is_none() && signal != libc::SIGWINCH);
        if leave {
            terminal::restore();
            std::process::exit(i32::from(SIGNALLED) + signal);
        }
        if let Some(link) = link {
            let sender = sender.get_or_insert_with(|| send_apart(link));
            let _ = sender.send(message);
        }
    }
}
