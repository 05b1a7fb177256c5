//! Starting a VM in the background.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::process::started as start_time;
use super::record::Place;
use super::{STATUS_FAILED, signalled};
use crate::arguments;
use crate::failure::{Failure, OrFail};
use crate::helper;
use crate::machine::StartSignals;

const WHAT: &str = "starting in the background";
/// What the process in the background says before its VM's name when the command runs.
const STARTED: &[u8] = b"started ";
/// It says no more.
const SAID_MAX: usize = 256;
/// One that was told to end by a signal has so long to clear up.
const GRACE_PERIOD: Duration = Duration::from_secs(10);

/// Starts this program again in the background, and waits until its command runs. `words` are
/// those of the command line behind the verb.
pub fn detach(name: &str, words: &[OsString]) -> Result<u8, Failure> {
    let program = std::env::current_exe().or_host(WHAT)?;
    let mut command = Command::new(program);
    // What makes it the one in the background, then all as given; but everybody can
    // read what a process was started with, and values may be secrets.
    command.args(["run", "--detached", name]);
    command.args(arguments::without_values(words));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    helper::leave(&mut command).or_internal(WHAT)?;
    let signals = StartSignals::take().or_internal("blocking signals")?;
    let mut child = command.spawn().or_host(WHAT)?;
    if let Some(input) = child.stdin.take() {
        // If it has gone, it told why.
        let _ = arguments::hand_over(words, input);
    }
    let since = start_time(child.id());
    let (said, sent) = hear(&mut child, &signals)?;
    // The name is another if a VM had the one that was made up here.
    if let Some(name) = started(&said) {
        writeln!(io::stdout(), "{name}")
            .or_host(format_args!("standard output, as {name} runs"))?;
        return Ok(0);
    }
    let status = child.wait().or_host(WHAT)?;
    Ok(failed(name, (child.id(), since), status, sent))
}

/// Hears what the process in the background says until its command runs or it ends. A signal
/// that comes meanwhile is for that one.
fn hear(child: &mut Child, signals: &StartSignals) -> Result<(Vec<u8>, Option<i32>), Failure> {
    let pid = Pid::from_child(child);
    let (mut said, mut sent) = (Vec::new(), None);
    let Some(output) = &mut child.stdout else {
        return Ok((said, None));
    };
    let mut deadline = None;
    while said.len() < SAID_MAX {
        let left = deadline.map_or(Duration::MAX, |deadline: Instant| {
            deadline.saturating_duration_since(Instant::now())
        });
        match signals.wait(output.as_fd(), left) {
            Ok(true) => {
                let mut chunk = [0; SAID_MAX];
                match output.read(&mut chunk).or_host(WHAT)? {
                    0 => break,
                    len => said.extend(chunk.iter().take(len)),
                }
            }
            Ok(false) => {
                let _ = kill_process(pid, Signal::KILL);
                break;
            }
            Err(failure) => {
                let Some(signal) = failure.signal() else {
                    return Err(failure);
                };
                sent = Some(signal);
                deadline.get_or_insert(Instant::now() + GRACE_PERIOD);
                if let Some(signal) = Signal::from_named_raw(signal) {
                    let _ = kill_process(pid, signal);
                }
            }
        }
    }
    Ok((said, sent))
}

/// The name of the VM whose command runs.
fn started(said: &[u8]) -> Option<&str> {
    let name = said.strip_prefix(STARTED)?.strip_suffix(b"\n")?;
    std::str::from_utf8(name).ok()
}

/// What to exit with. One that ended by itself said why on standard error; of one that was
/// killed this tells, and removes what it left.
fn failed(
    name: &str,
    (pid, since): (u32, Option<u64>),
    status: ExitStatus,
    sent: Option<i32>,
) -> u8 {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    if let Some(code) = code {
        return code;
    }
    if let Some(signal) = status.signal() {
        let why = format!("its supervisor was ended by signal {signal} while it started");
        let _ = writeln!(io::stderr(), "mayfly: {name}: {why}");
    }
    if let Some(since) = since {
        Place::remove_of(pid, since);
    }
    sent.map_or(STATUS_FAILED, signalled)
}

/// What is left to say in the background, when the command runs.
pub fn tell_started(name: &str) {
    let said = [STARTED, name.as_bytes(), b"\n"].concat();
    let _ = io::stdout().write_all(&said);
    let _ = io::stdout().flush();
    let Ok(null) = File::options().read(true).write(true).open("/dev/null") else {
        return;
    };
    let _ = dup2_stdin(&null);
    let _ = dup2_stdout(&null);
    let _ = dup2_stderr(&null);
}
