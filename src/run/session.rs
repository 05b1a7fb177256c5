//! The side of a run that talks to the guest: sets it up, starts the command,
//! moves its streams, passes signals on, ends it when its time is over.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use mayfly_protocol::agent::{Exit, HostMessage};
use rustix::net::{Shutdown, shutdown};

use super::agent::{Agent, AgentError, BlockingFile, Link, Streams};
use super::background::tell_started;
use super::force_quit::ForceQuit;
use super::log::Log;
use super::options::{Mode, Options};
use super::plan::Plan;
use super::standard::{send_apart, standard, terminal_size};
use super::status::STATUS_FAILED;
use crate::console::terminal::RawTerminal;
use crate::failure::{Failure, OrFail};
use crate::signals::Signals;
use crate::supervisor::StopHandle;
use crate::unix_socket::Name;

/// The time that the guest has to turn off when all was said.
const GRACE_PERIOD: Duration = Duration::from_secs(10);
/// How long output may take when the machine was ended, and how often that is
/// looked at.
const END_TIMEOUT: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(100);
/// How long the agent of a machine from a template may take to answer: it is ready, and has
/// disks to mount.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// How a session ended.
#[derive(Clone, Debug)]
pub enum SessionEnd {
    /// The command ended.
    Exited(Exit),
    /// It did not start, or its end was not heard of: a status, and why.
    Failed(u8, String),
    /// The guest ended without a word.
    Silent,
    /// It was ended after that long.
    TimedOut(Duration),
    /// A signal ended it before the command ran, or it did not heed it.
    Signalled(i32),
}

/// Why the machine was ended from here.
type Why = Arc<Mutex<Option<SessionEnd>>>;

/// A session on its threads.
pub struct Session {
    result: Receiver<Result<Exit, AgentError>>,
    over: Sender<()>,
    why: Why,
    answered: Answered,
    listener: UnixListener,
}

/// What the agent has answered to the machine's setup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answer {
    /// Nothing so far.
    #[default]
    None,
    /// Nothing, for longer than it should take: the machine was ended for that.
    Late,
    /// It could not do it.
    Refused,
    /// It is done. The command may have started.
    SetUp,
}

/// What the agent has answered, and the wait for that.
#[derive(Clone, Debug, Default)]
pub struct Answered(Arc<(Mutex<Answer>, Condvar)>);

impl Answered {
    fn set(&self, answer: Answer) {
        *self.lock() = answer;
        self.0.1.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Answer> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is so far.
    pub fn get(&self) -> Answer {
        *self.lock()
    }

    /// Waits for an answer, but not longer than a time: then it is late, which is returned.
    fn is_late(&self, timeout: Duration) -> bool {
        let none = |answer: &mut Answer| *answer == Answer::None;
        let waited = self.0.1.wait_timeout_while(self.lock(), timeout, none);
        let (mut answer, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            *answer = Answer::Late;
        }
        waited.timed_out()
    }
}

/// What the threads share.
struct Shared {
    link: Mutex<Option<Link>>,
    why: Why,
    answered: Answered,
    machine: StopHandle,
}

impl Shared {
    /// Ends the machine, whatever the guest does.
    fn end(&self, why: SessionEnd) {
        let mut first = self.why.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(why);
        drop(first);
        self.machine.stop();
    }

    /// Takes note whether the agent has made the machine what its image says.
    fn note_answer(&self, answer: &Result<(), AgentError>) {
        match answer {
            Ok(()) => self.answered.set(Answer::SetUp),
            Err(AgentError::Failed(_)) => self.answered.set(Answer::Refused),
            Err(_) => {}
        }
    }

    fn link(&self) -> Option<Link> {
        let link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        link.clone()
    }
}

impl Session {
    /// Waits for the guest's agent on a thread of its own. Signals are taken from
    /// here on.
    pub fn start(
        options: &Options,
        plan: Plan,
        (listener, name): (UnixListener, Name),
        log: Log,
        Machine {
            stop: machine,
            restored,
            has_frames,
        }: Machine,
    ) -> Result<Self, Failure> {
        let signals = Signals::passed_on().or_internal("blocking signals")?;
        let (why, answered) = (Why::default(), Answered::default());
        let shared = Arc::new(Shared {
            link: Mutex::new(None),
            why: why.clone(),
            answered: answered.clone(),
            machine,
        });
        if restored {
            let shared = shared.clone();
            thread::Builder::new()
                .spawn(move || end_silent(&shared))
                .or_host("starting a thread")?;
        }
        let timeout = plan.timeout;
        let (over, ended) = mpsc::channel();
        let clock = shared.clone();
        let spawn = |name: &str| thread::Builder::new().name(name.to_owned());
        let ours = listener.try_clone().or_host("the agent's socket")?;
        let (detached, passed) = (options.mode() == Mode::Background, shared.clone());
        let options = options.clone();
        let (told, result) = mpsc::channel();
        spawn("session")
            .spawn(move || {
                let begin = match has_frames {
                    true => Begin::Told,
                    false => Begin::Anew,
                };
                let listening = (listener, name);
                drop(told.send(work(&options, plan, begin, listening, &shared, &log)))
            })
            .or_host("starting a thread")?;
        spawn("signals")
            .spawn(move || pass_on(&signals, &passed, detached))
            .or_host("starting a thread")?;
        spawn("clock")
            .spawn(move || watch(&clock, timeout, &ended))
            .or_host("starting a thread")?;
        Ok(Session {
            result,
            over,
            why,
            answered,
            listener: ours,
        })
    }

    /// What the agent has answered, now and later.
    pub fn answered(&self) -> Answered {
        self.answered.clone()
    }

    /// How it ended, when the machine has.
    pub fn end(self) -> SessionEnd {
        drop(self.over);
        // Without an agent it would wait for ever.
        let _ = shutdown(&self.listener, Shutdown::Both);
        // Output may still wait for whoever reads it: for ever, unless it was ended.
        let mut late = Duration::ZERO;
        loop {
            let result = self.result.recv_timeout(PAUSE);
            let why = self.why.lock().unwrap_or_else(PoisonError::into_inner);
            return match (result, why.clone()) {
                (Ok(Ok(exit)), _) => SessionEnd::Exited(exit),
                (Err(RecvTimeoutError::Timeout), None) => continue,
                (Err(RecvTimeoutError::Timeout), Some(_)) if late < END_TIMEOUT => {
                    late += PAUSE;
                    continue;
                }
                (_, Some(why)) => why,
                (Ok(Err(AgentError::Failed(failed))), None) => {
                    SessionEnd::Failed(failed.status, failed.reason)
                }
                (Ok(Err(AgentError::Connection(_))), None) => SessionEnd::Silent,
                (Ok(Err(error)), None) => SessionEnd::Failed(STATUS_FAILED, error.to_string()),
                (Err(_), None) => SessionEnd::Failed(STATUS_FAILED, "a thread failed".into()),
            };
        }
    }
}

/// The machine of a session.
pub struct Machine {
    /// Stops it.
    pub stop: StopHandle,
    /// It went on from a template.
    pub restored: bool,
    /// Its agent has been told already what it is to do.
    pub has_frames: bool,
}

/// Ends a machine from a template whose agent says nothing: there is another way to start.
fn end_silent(shared: &Shared) {
    if shared.answered.is_late(ANSWER_TIMEOUT) {
        shared.end(SessionEnd::Silent);
    }
}

/// How a session begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begin {
    /// The agent gets its order.
    Anew,
    /// It was told in the message that it found when it was restored, and answers.
    Told,
}

/// Everything that is said to the guest, in order.
fn work(
    options: &Options,
    mut plan: Plan,
    begin: Begin,
    (listener, name): (UnixListener, Name),
    shared: &Shared,
    log: &Log,
) -> Result<Exit, AgentError> {
    listener.set_nonblocking(false)?;
    let (stream, _) = listener.accept()?;
    // Nobody else has business there.
    drop((listener, name));
    stream.set_nonblocking(false)?;
    let mut agent = Agent::greet(stream)?;
    let (link, name_of_vm) = (agent.link(), std::mem::take(&mut plan.name));
    let detached = options.mode() == Mode::Background;
    let result = (|| {
        let set_up = match begin {
            Begin::Anew => agent.ask(&HostMessage::Setup(Box::new(plan.setup))),
            Begin::Told => agent.hear_done(),
        };
        shared.note_answer(&set_up);
        set_up?;
        plan.process.terminal = options.terminal.then(terminal_size);
        agent.start(plan.process)?;
        *shared.link.lock().unwrap_or_else(PoisonError::into_inner) = Some(link.clone());
        // Without input its keys stay the host's: Ctrl-C ends the command.
        let terminal = match options.terminal && options.interactive && !detached {
            true => RawTerminal::transparent(&standard(io::stdin())?)?,
            false => None,
        };
        let streams = streams(options, log)?;
        if detached {
            tell_started(&name_of_vm);
        }
        let exit = agent.follow(streams);
        drop(terminal);
        // Nobody leaves a machine that is this process.
        exit?.ok_or(AgentError::Nonsense)
    })();
    // A guest that does not turn off is turned off; the process's end ends this.
    let machine = shared.machine.clone();
    thread::Builder::new().spawn(move || {
        thread::sleep(GRACE_PERIOD);
        machine.stop();
    })?;
    let _ = link.send(&HostMessage::Bye);
    result
}

fn streams(options: &Options, log: &Log) -> io::Result<Streams> {
    let detached = options.mode() == Mode::Background;
    let target = |stream: io::Result<File>| -> io::Result<Box<dyn Write + Send>> {
        match detached {
            true => Ok(Box::new(io::sink())),
            false => Ok(Box::new(BlockingFile(stream?))),
        }
    };
    let input = options.interactive && !detached;
    Ok(Streams {
        input: input
            .then(|| standard(io::stdin()).map(BlockingFile))
            .transpose()?,
        detach: None,
        output: log.tee(1, target(standard(io::stdout()))?),
        errors: log.tee(2, target(standard(io::stderr()))?),
    })
}

/// Passes signals on to the command, as if it were here.
fn pass_on(signals: &Signals, shared: &Shared, detached: bool) {
    let mut force_quit = ForceQuit::default();
    let mut sender: Option<Sender<HostMessage>> = None;
    while let Some(signal) = signals.wait() {
        let Some(link) = shared.link() else {
            if signal != libc::SIGWINCH {
                shared.end(SessionEnd::Signalled(signal));
            }
            continue;
        };
        let message = match signal {
            libc::SIGWINCH if detached => continue,
            libc::SIGWINCH => HostMessage::Resize(terminal_size()),
            signal => HostMessage::Signal(signal),
        };
        if force_quit.heard(signal) {
            shared.end(SessionEnd::Signalled(signal));
        }
        let sender = sender.get_or_insert_with(|| send_apart(link));
        let _ = sender.send(message);
    }
}

/// Ends the machine when its time is over.
fn watch(shared: &Shared, timeout: Option<Duration>, over: &Receiver<()>) {
    let Some(timeout) = timeout else { return };
    if let Err(RecvTimeoutError::Timeout) = over.recv_timeout(timeout) {
        shared.end(SessionEnd::TimedOut(timeout));
    }
}
