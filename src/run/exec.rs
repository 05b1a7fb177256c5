//! `mayfly exec` and `mayfly attach`: more connections to a VM's agent.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use mayfly_guest::protocol::{HostMessage, Process, Size};

use super::agent::{Agent, AgentError, Link, Patient, Streams};
use super::detach::DetachKeys;
use super::plan::variables;
use super::record::{Place, Record, State};
use super::session::{Insistence, send_apart};
use super::{SIGNALLED, standard};
use crate::arguments;
use crate::console::terminal::{self, RawTerminal};
use crate::failure::{Failure, OrFail};
use crate::machine::Signals;

/// What to run in a VM, in the user's words.
#[derive(Clone, Debug, Default)]
pub struct ExecOptions {
    /// Pass standard input on.
    pub interactive: bool,
    /// Give the command a terminal.
    pub terminal: bool,
    /// `NAME[=VALUE]`
    pub environment: Vec<String>,
    /// The folder to run in.
    pub folder: Option<String>,
    /// `USER[:GROUP]`
    pub user: Option<String>,
    /// What to leave it with.
    pub detach_keys: Option<DetachKeys>,
    /// The VM's name.
    pub name: String,
    /// What to run.
    pub command: Vec<String>,
}

/// Runs a command in a VM, and returns its status.
pub fn exec(options: ExecOptions) -> Result<u8, Failure> {
    need_terminal(options.terminal)?;
    let (place, record) = running(&options.name)?;
    let mut environment: Vec<(Vec<u8>, Vec<u8>)> = record
        .environment
        .iter()
        .map(|(name, value)| (name.clone().into(), value.clone().into()))
        .collect();
    if options.terminal {
        let terminal = std::env::var("TERM").unwrap_or_else(|_| "xterm".into());
        environment.push((b"TERM".into(), terminal.into()));
    }
    environment.extend(variables(&options.environment, "--env")?);
    arguments::hide_values();
    let process = Process {
        arguments: options.command.into_iter().map(Into::into).collect(),
        environment,
        folder: options.folder.unwrap_or(record.folder).into(),
        user: options.user.unwrap_or(record.user),
        terminal: options.terminal.then(here),
        input: options.interactive,
    };
    follow(
        &place,
        HostMessage::Start(Box::new(process)),
        options.terminal,
        options.interactive,
        options.detach_keys,
    )
}

/// Connects to a VM's main process, and returns its status.
pub fn attach(name: &str, input: bool, keys: Option<DetachKeys>) -> Result<u8, Failure> {
    let (place, record) = running(name)?;
    let terminal = record.terminal && input && io::stdin().is_terminal();
    let size = record.terminal.then(here);
    follow(&place, HostMessage::Attach(size), terminal, input, keys)
}

fn running(name: &str) -> Result<(Place, Record), Failure> {
    let place = Place::find(name)?;
    if place.state() == State::Ended {
        return Err(Failure::config(format!(
            "{name}: has ended; see mayfly logs {name}"
        )));
    }
    place.need_unpaused()?;
    let record = place.record()?;
    Ok((place, record))
}

/// Refuses what asks for a terminal where there is none.
pub fn need_terminal(wanted: bool) -> Result<(), Failure> {
    match wanted && !io::stdin().is_terminal() {
        true => Err(Failure::config(
            "-t needs a terminal as standard input; leave it out, or run it in one",
        )),
        false => Ok(()),
    }
}

/// The size of the terminal that this has.
pub fn here() -> Size {
    let size = standard(io::stdin()).ok().as_ref().and_then(terminal::size);
    match size {
        Some(size) => Size {
            rows: size.rows,
            columns: size.columns,
        },
        None => Size {
            rows: 24,
            columns: 80,
        },
    }
}

fn follow(
    place: &Place,
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
    let mut agent = Agent::connect(&place.vsock()).or_host(place.name())?;
    let failed = |error: AgentError| match error {
        AgentError::Failed(failed) => {
            let _ = writeln!(io::stderr(), "mayfly: {}: {}", place.name(), failed.reason);
            Ok(failed.status)
        }
        error => Err(error).or_host(place.name()),
    };
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
                .then(|| standard(io::stdin()).map(Patient))
                .transpose()?,
            // Elsewhere nobody types them.
            detach: keys.filter(|_| raw.is_some()),
            output: Box::new(Patient(standard(io::stdout())?)),
            errors: Box::new(Patient(standard(io::stderr())?)),
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
                place.name()
            );
            Ok(0)
        }
        Err(error) => failed(error),
    }
}

/// Passes signals on to the process, once there is one.
fn pass_on(signals: &Signals, link: &Mutex<Option<Link>>, terminal: bool) {
    let mut insistence = Insistence::default();
    let mut sender = None;
    while let Some(signal) = signals.wait() {
        let message = match signal {
            libc::SIGWINCH if !terminal => continue,
            libc::SIGWINCH => HostMessage::Resize(here()),
            signal => HostMessage::Signal(signal),
        };
        let link = link.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let leave = insistence.heard(signal) || (link.is_none() && signal != libc::SIGWINCH);
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
