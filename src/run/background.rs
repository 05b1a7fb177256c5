//! Starting a VM in the background.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionbio;
use rustix::process::{Pid, Signal, kill_process};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::process::started as start_time;
use super::record::VmDir;
use super::status::{STATUS_FAILED, signalled};
use crate::arguments;
use crate::failure::{Failure, OrFail};
use crate::helper;
use crate::signals::StartSignals;

const WHAT: &str = "starting in the background";
/// What the process in the background says before its VM's name when the command runs.
const STARTED: &[u8] = b"started ";
/// It says no more.
const SAID_MAX: usize = 256;
/// The time that one told to end by a signal has to clear up.
const GRACE_PERIOD: Duration = Duration::from_secs(10);

/// Starts this program again in the background, and waits until its command runs. `words` are
/// those of the command line behind the verb, and `from_files` the variables of its files.
pub fn detach(name: &str, from_files: &[OsString], words: &[OsString]) -> Result<u8, Failure> {
    let handed_over = with_variables(from_files, words);
    if !arguments::can_be_handed_over(&handed_over) {
        return Err(Failure::config(
            "--env-file: the variables have more than a command can be given",
        ));
    }
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
        let told = Heedful::new(input, &signals)
            .or_host(WHAT)
            .and_then(|input| input.send_words(&handed_over));
        if let Err(failure) = told {
            // Without all of its words it does nothing.
            let _ = child.kill();
            child.wait().or_host(WHAT)?;
            return Err(failure);
        }
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

/// The words that the process in the background gets: as given, and what the files held.
fn with_variables(from_files: &[OsString], words: &[OsString]) -> Vec<OsString> {
    let flag = |variable: &OsString| {
        let mut word = OsString::from("--from-environment-files=");
        word.push(variable);
        word
    };
    let variables = from_files.iter().map(flag);
    variables.chain(words.iter().cloned()).collect()
}

/// A pipe to a process that may not read it: whoever writes to it heeds signals.
struct Heedful<'a, W> {
    to: W,
    signals: &'a StartSignals,
    failure: Option<Failure>,
}

impl<'a, W: Write + AsFd> Heedful<'a, W> {
    fn new(to: W, signals: &'a StartSignals) -> io::Result<Self> {
        ioctl_fionbio(&to, true)?;
        Ok(Heedful {
            to,
            signals,
            failure: None,
        })
    }

    /// Gives the process its words, unless a signal comes.
    fn send_words(mut self, words: &[OsString]) -> Result<(), Failure> {
        // If it has gone, it told why.
        let _ = arguments::write_words(words, &mut self);
        self.failure.map_or(Ok(()), Err)
    }
}

impl<W: Write + AsFd> Write for Heedful<'_, W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        loop {
            match self.to.write(data) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            let room = self.signals.wait_for_room(self.to.as_fd(), Duration::MAX);
            if let Err(failure) = room {
                self.failure = Some(failure);
                return Err(io::ErrorKind::Other.into());
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
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
    // Others may have its output, too, and keep it.
    while said.len() < SAID_MAX && started(&said).is_none() {
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
        VmDir::remove_of(pid, since);
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

#[cfg(test)]
mod tests {
    use std::thread;

    use clap::Parser;

    use super::*;
    use crate::run::Options;
    use crate::signals::raise;

    #[derive(Parser)]
    #[command(args_override_self = true)]
    struct Words {
        #[command(flatten)]
        options: Options,
    }

    /// A pipe has its variables but once: `--env-file <(...)`.
    #[test]
    fn what_files_of_variables_held_is_not_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("env");
        std::fs::write(&path, "A=b=c\nB=\n").unwrap();
        let words = [
            "--env-file".into(),
            path.clone().into_os_string(),
            "img".into(),
            "-e".into(),
        ];
        let read = |before: &[&str], words: &[OsString]| {
            let before = before.iter().map(OsString::from);
            let words = before.chain(words.iter().cloned());
            let mut options = Words::parse_from(words).options.sort().unwrap();
            options.read_files().unwrap();
            options
        };
        let first = read(&["run", "-d"], &words);
        assert_eq!(first.from_environment_files, ["A=b=c", "B="]);
        std::fs::remove_file(&path).unwrap();
        let words = with_variables(&first.from_environment_files, &words);
        let second = read(&["run", "--detached", "x"], &words);
        assert_eq!(second.from_environment_files, ["A=b=c", "B="]);
        assert_eq!(
            (&*second.image, &*second.command),
            ("img", &["-e".into()][..])
        );
    }

    #[test]
    fn one_that_has_started_is_heard_while_others_keep_its_output() {
        // What is blocked is of a thread.
        let test = || {
            let signals = StartSignals::take().unwrap();
            let mut command = Command::new("sh");
            command.args(["-c", "echo started vm; exec sleep 600"]);
            let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
            let (said, sent) = hear(&mut child, &signals).unwrap();
            assert_eq!((started(&said), sent), (Some("vm"), None));
            assert!(child.try_wait().unwrap().is_none());
            child.kill().unwrap();
            child.wait().unwrap();
        };
        thread::spawn(test).join().unwrap();
    }

    #[test]
    fn a_signal_ends_the_handing_over_to_one_that_does_not_read() {
        let test = || {
            let signals = StartSignals::take().unwrap();
            let (mut reader, writer) = io::pipe().unwrap();
            let words = [OsString::from("x".repeat(4 << 20))];
            raise(libc::SIGTERM);
            let heedful = Heedful::new(writer, &signals).unwrap();
            let failure = heedful.send_words(&words).unwrap_err();
            assert_eq!(failure.status(), 128 + 15);
            assert!(reader.read_to_end(&mut Vec::new()).unwrap() < 4 << 20);
            // The words come whole otherwise.
            let (mut reader, writer) = io::pipe().unwrap();
            let reading = thread::spawn(move || reader.read_to_end(&mut Vec::new()).unwrap());
            let heedful = Heedful::new(writer, &signals).unwrap();
            heedful.send_words(&words).unwrap();
            assert_eq!(reading.join().unwrap(), (4 << 20) + 1);
        };
        thread::spawn(test).join().unwrap();
    }
}
