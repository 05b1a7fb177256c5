//! The process that the user started: the supervisor of a VM. It opened what the machine
//! needs, and starts the VMM process, which may be taken over by its guest. Names, the
//! terminal, clients and the processes beside the VM stay here.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mayfly_devices::poll::{entry, poll, ready};

use super::clients::{About, Clients};
use super::pidfile::PidFile;
use super::resources;
use super::status::StatusBoard;
use super::vmm_process::{KILL_TIMEOUT, StopHandle};
use crate::config::{HostEnd, MachineConfig};
use crate::console::HostConsole;
use crate::control::{Event, Folder, Server};
use crate::disk_lock::DiskLocks;
use crate::failure::{Class, Failure, OrFail};
use crate::helper::Running;
use crate::link::{
    BrokerReply, BrokerRequest, Ending, FromVmm, Link, Origin, Outcome, Part, ToVmm, VmmFailure,
};
use crate::logging;
use crate::net::host::{HostNetworks, Watch};
use crate::signals::Signals;
use crate::timing::Timeline;
use crate::unix_socket::Name;
use crate::vsock;
use mayfly_sandbox::{Cgroup, Layer, Report, Status as LayerStatus, why_not_executed};
use mayfly_text::printable;

/// How long a VMM process may take to build a VM, and as long again to let the guest run.
pub const START_TIMEOUT: Duration = Duration::from_secs(120);
/// What the supervisor was doing when a VMM process could not be executed.
const EXECUTING: &str = "executing the VMM process";
/// How long one that closed its link has to end by itself.
const LAST_WORD_MS: i32 = 1000;
const FOR_EVER: i32 = -1;
pub const LINK: &str = "talking to the VMM process";

/// The supervisor of a machine that is built, and does not run yet.
pub struct Supervisor<'a> {
    pub(super) config: &'a MachineConfig,
    /// Where the machine begins.
    pub(super) origin: Origin,
    pub(super) stop: StopHandle,
    /// For requests to the broker.
    pub(super) broker: Link,
    pub(super) vsock: Option<UnixListener>,
    pub(super) networks: Option<Watch>,
    /// By the names of the devices that they serve.
    pub(super) helpers: BTreeMap<String, Running>,
    pub(super) signals: Option<Signals>,
    pub(super) log: logging::Started,
    pub(super) cgroup: Option<Cgroup>,
    /// Passes on what the VMM process says on standard error, to its end.
    pub(super) stderr: Option<JoinHandle<()>>,
    /// Those of its disks, which are free when it has ended.
    pub(super) locks: DiskLocks,
    pub(super) board: StatusBoard,
    pub(super) timeline: Timeline,
}

impl Drop for Supervisor<'_> {
    fn drop(&mut self) {
        self.stop.0.kill();
        let ended = self.stop.0.wait(KILL_TIMEOUT).is_ok();
        self.locks.release();
        // What one says that does not end, nobody waits for.
        if let Some(stderr) = self.stderr.take().filter(|_| ended) {
            let _ = stderr.join();
        }
    }
}

/// Passes on what the VMM process says on standard error, line by line. A guest may have
/// taken it over: its words are for a terminal, and harmless there.
pub fn pass_on_lines(said: impl Read, mut to: impl Write) {
    const LINE_MAX: u64 = 4096;
    let mut said = BufReader::new(said);
    let mut line = Vec::new();
    // Also when nobody wants to hear it any more, or it could say no more.
    while let Ok(1..) = (&mut said).take(LINE_MAX).read_until(b'\n', &mut line) {
        let _ = to.write_all(printable::lines(&line).as_bytes());
        line.clear();
    }
}

/// Whether a VMM process that ended as this text says was killed, by its user perhaps.
pub fn was_killed(why: &str) -> bool {
    why == died_by(libc::SIGKILL)
}

fn died_by(signal: i32) -> String {
    format!("the VMM process was ended by signal {signal}")
}

/// Whether what was sent found nobody any more.
pub fn has_hung_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionReset)
}

/// Rounded up, so that it is over then.
fn milliseconds_until(deadline: Instant) -> i32 {
    let left = deadline.saturating_duration_since(Instant::now());
    i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX)
}

fn tell_networks(link: &Link, now: &HostNetworks) -> io::Result<()> {
    for message in ToVmm::host_networks(now) {
        link.send(&message, &[])?;
    }
    Ok(())
}

/// The VMM process said nothing for this time.
pub fn too_late(what: &str, timeout: Duration) -> Failure {
    let seconds = timeout.as_secs_f32();
    Failure::host(format!("the VMM process did not {what} in {seconds} s"))
}

impl Supervisor<'_> {
    /// Ends the machine, from any thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Where the machine begins.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// What users are told of the machine while it runs.
    pub fn board(&self) -> StatusBoard {
        self.board.clone()
    }

    /// What the VMM process failed of, with the flag of the part that it names.
    pub(super) fn failure(&self, failure: &VmmFailure) -> Failure {
        let message = printable::text(&failure.message);
        let flag = match &failure.part {
            None => return Failure::new(failure.class, message),
            Some(Part::Kernel) => self.config.guest.kernel_flag.clone(),
            Some(Part::Initrd) => {
                let initrd = self.config.guest.initrd.as_deref();
                initrd.map_or("--initrd".to_owned(), resources::initrd_flag)
            }
            Some(Part::Backing(name)) => {
                let disks = &self.config.disks;
                let disk = disks.iter().find(|disk| disk.device == *name);
                disk.map_or_else(|| printable::text(name), |disk| disk.config.backing_flag())
            }
            Some(Part::Device(name)) => match self.config.flags().remove(name) {
                Some(flag) => flag,
                None => printable::text(name),
            },
        };
        Failure::new(failure.class, format!("{flag}: {message}"))
    }

    pub(super) fn link(&self) -> &Link {
        &self.stop.0.link
    }

    /// Runs the machine to its end.
    pub fn run(mut self) -> Result<Ending, Failure> {
        let config = self.config;
        // All that can be refused has been; now the host is changed.
        let log = config.log.open_file()?;
        if let Some(log) = &log {
            let log = log.try_clone().or_host("duplicating a descriptor")?;
            self.log.go_on_in(Some(log));
        }
        let folder = config.control.as_deref();
        let folder = folder.map_or_else(Folder::locate, Folder::at);
        let (listener, socket) = folder.listen(&config.name)?;
        let _pidfile = config.pidfile.as_deref().map(PidFile::create).transpose()?;
        let _vsock = match (&self.vsock, &config.vsock) {
            (Some(socket), Some(vsock)) => Some(Name::give(socket, &vsock.path, &vsock.flag())?),
            _ => None,
        };
        let has_log = log.is_some();
        let mut files: Vec<OwnedFd> = log.into_iter().map(OwnedFd::from).collect();
        let (mut opened, mut consoles) = (Vec::new(), Vec::new());
        for (index, (end, what, flag)) in config.ends().enumerate() {
            let mut console = HostConsole::open(end, &what, &flag)?;
            let mut fds = console.fds.take().unwrap_or_default();
            // What the user sees at once need not be kept.
            fds.tail = index == 0 && *end != HostEnd::Stdio;
            let (flags, its) = fds.into_parts();
            consoles.push(flags);
            files.extend(its);
            opened.push(console);
        }
        let start = ToVmm::Start {
            log: has_log,
            consoles,
        };
        let link = self.link();
        let to_vmm = link.try_clone().or_host("duplicating a descriptor")?;
        let clients = Arc::new(Clients::new(to_vmm, self.board.clone(), About::of(config)));
        let asked = clients.clone();
        let server = Server::start(listener, socket, move |ask| asked.ask(ask))
            .or_host("starting the control thread")?;
        match link.send(&start, &files) {
            // It has ended already; below it says why.
            Err(error) if has_hung_up(&error) => {}
            sent => sent.or_internal(LINK)?,
        }
        if let Some(networks) = self.networks.take() {
            self.tell_of(networks).or_host("starting a thread")?;
        }
        // They are the other process's: a client sees that it closes one.
        drop(files);
        let ending = self.wait_for_end(&clients);
        clients.forget();
        drop(opened);
        server.close();
        ending
    }

    /// Tells the machine of the host's networks, on a thread, as they change.
    fn tell_of(&self, networks: Watch) -> io::Result<()> {
        let link = self.link().try_clone()?;
        let ended = self.stop.0.exited.try_clone()?;
        let tell = move || networks.follow(&ended, |now| tell_networks(&link, now));
        let thread = thread::Builder::new().name("networks".into());
        thread.spawn(tell).map(drop)
    }

    /// Supervises the VMM process to its end, and kills it if it does not end in time when told to.
    fn wait_for_end(&self, clients: &Clients) -> Result<Ending, Failure> {
        let ending = self.handle_messages(clients, START_TIMEOUT);
        self.stop.kill_after_timeout();
        let _ = self.stop.0.wait(self.stop.0.stop_timeout + KILL_TIMEOUT);
        if let Ok(ending) = &ending {
            let how = ending.outcome.to_string();
            self.board.tell(&Event::now("ended", Some(how)));
        }
        ending
    }

    /// Handles the VMM process's messages and requests, and signals, until it has ended.
    fn handle_messages(
        &self,
        clients: &Clients,
        start_timeout: Duration,
    ) -> Result<Ending, Failure> {
        let deadline = Instant::now() + start_timeout;
        let signals = self.signals.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let mut ready = [self.link().as_raw_fd(), self.broker.as_raw_fd(), signals]
            .map(|fd| entry(fd, libc::POLLIN));
        let mut told_to_end = None;
        loop {
            let timeout = match self.runs() {
                true => FOR_EVER,
                false => milliseconds_until(deadline),
            };
            match poll(&mut ready, timeout) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).or_internal(LINK),
                Ok(0) if Instant::now() >= deadline => {
                    return Err(too_late("start the guest", start_timeout));
                }
                Ok(_) => {}
            }
            let [said, asked, signal] = ready.map(|entry| entry.revents != 0);
            if said {
                match self.link().receive() {
                    Ok(Some(FromVmm::Ended(ending))) => return Ok(harmless(ending)),
                    // What never ran leaves nothing behind. One whose guest has run may
                    // have been taken over, and does not have its traces removed so.
                    Ok(Some(FromVmm::Failed(failure))) if !self.runs() => {
                        return Err(self.failure(&failure));
                    }
                    Ok(Some(FromVmm::Failed(VmmFailure { message, .. }))) => {
                        return Ok(self.ended(Outcome::Internal(printable::line(&message))));
                    }
                    Ok(Some(FromVmm::Reply { id, reply })) => clients.answer(id, reply),
                    Ok(Some(FromVmm::Event(event))) => self.board.tell(&event),
                    Ok(Some(FromVmm::Closed(report))) => self.note(clients, report),
                    Ok(Some(FromVmm::Running)) => self.stop.0.runs.store(true, Ordering::Relaxed),
                    Ok(Some(FromVmm::Built(_))) => {}
                    Ok(None) | Err(_) if !self.runs() => {
                        return Err(self.never_ran());
                    }
                    Ok(None) | Err(_) => return Ok(self.died(told_to_end)),
                }
            }
            if asked && self.serve_broker().is_err() {
                // It has no more; how it ended the other link says. Should it wait for an
                // answer, it hears that none comes.
                self.broker.shut_down();
                ready[1].fd = -1;
            }
            if signal {
                told_to_end = self.pass_on()?.or(told_to_end);
            }
        }
    }

    fn runs(&self) -> bool {
        self.stop.0.runs.load(Ordering::Relaxed)
    }

    /// Keeps what was said of the sandbox before the guest ran.
    fn note(&self, clients: &Clients, mut report: Report) {
        let cgroup = self.cgroup.as_ref();
        let status = cgroup.map_or(&LayerStatus::Off, Cgroup::status).clone();
        report.set(Layer::Cgroup, status);
        clients.note_sandbox(report);
    }

    /// Does what the VMM process asks for, and answers. That it, or its answer, fails is an answer, too; an error
    /// is that nobody hears one.
    fn serve_broker(&self) -> io::Result<()> {
        let request = match self.broker.receive() {
            Ok(request) => request.ok_or(io::ErrorKind::UnexpectedEof)?,
            // What makes no sense, as only one says that a guest has taken over.
            Err(error) => return self.refuse_request(&error),
        };
        let done = match request {
            BrokerRequest::Connect(port) => match &self.config.vsock {
                Some(vsock) => vsock::connect_to_port(&vsock.path, port).map(Some),
                None => Err(io::Error::from_raw_os_error(libc::ECONNREFUSED)),
            },
            BrokerRequest::EndHelper(device) => {
                if let Some(helper) = self.helpers.get(&device) {
                    helper.end();
                }
                Ok(None)
            }
        };
        let sent = done.and_then(|socket| {
            let files: Vec<OwnedFd> = socket.into_iter().map(OwnedFd::from).collect();
            self.broker.send(&BrokerReply::Done, &files)
        });
        match sent {
            Ok(()) => Ok(()),
            // A descriptor may be refused where a number is not: too many are on their way.
            Err(error) => self.refuse_request(&error),
        }
    }

    fn refuse_request(&self, error: &io::Error) -> io::Result<()> {
        let code = error.raw_os_error().unwrap_or(libc::EIO);
        self.broker.send(&BrokerReply::Failed(code), &[])
    }

    /// Passes a signal on to the VMM process. Returns it if that is to end now.
    fn pass_on(&self) -> Result<Option<i32>, Failure> {
        let (order, ends) = match self.signals.as_ref().and_then(Signals::next) {
            None => return Ok(None),
            Some(libc::SIGWINCH) => (ToVmm::Resized, None),
            // Nothing is there that could end in order.
            Some(signal) if !self.runs() => return Err(Failure::signalled(signal)),
            Some(signal) => (ToVmm::Signal(signal), Some(signal)),
        };
        if self.link().try_send(&order).is_err() || ends.is_some() {
            self.stop.kill_after_timeout();
        }
        Ok(ends)
    }

    /// The end of a VM whose process has ended without a word about it. One that was killed
    /// after a signal, as it did not end by itself, was ended by that.
    fn died(&self, signal: Option<i32>) -> Ending {
        let why = self.why_died();
        match signal {
            Some(signal) if was_killed(&why) => {
                log::warn!("the VMM process did not end in time, and was killed");
                self.ended(Outcome::Signal(signal))
            }
            _ => self.ended(Outcome::Internal(why)),
        }
    }

    /// An end of which the VMM process did not tell.
    fn ended(&self, outcome: Outcome) -> Ending {
        Ending {
            outcome,
            guest_status: None,
            last_lines: Vec::new(),
            timeline: self.timeline,
        }
    }

    /// The end of a VMM process before its guest ran.
    pub(super) fn never_ran(&self) -> Failure {
        let why = self.why_died();
        match why.starts_with(EXECUTING) {
            true => Failure::host(why),
            false => Failure::new(Class::Internal, why),
        }
    }

    /// Why it does not speak any more. If it lives, it says what makes no sense.
    pub(super) fn why_died(&self) -> String {
        // One that has ended closed its link a moment before.
        ready(self.stop.0.exited.as_raw_fd(), libc::POLLIN, LAST_WORD_MS);
        self.stop.0.kill();
        let what = "the VMM process";
        match self.stop.0.wait(KILL_TIMEOUT) {
            Ok(status) if status.code() == Some(mayfly_sandbox::VIOLATION.into()) => {
                format!("{what} was ended, as it did what its sandbox forbids")
            }
            Ok(status) if status.code() == Some(mayfly_sandbox::PANIC.into()) => {
                format!("{what} failed, as said above")
            }
            Ok(status) => match status.signal() {
                Some(_) if self.cgroup.as_ref().is_some_and(Cgroup::ran_out_of_memory) => {
                    format!("{what} needed more memory than its control group may have")
                }
                Some(signal) => died_by(signal),
                None => match status.code().and_then(why_not_executed) {
                    Some(error) => format!("{EXECUTING}: {error}"),
                    None => format!("{what} ended with {status}"),
                },
            },
            Err(error) => format!("{what}: {error}"),
        }
    }
}

/// What a VMM process says of its end, in words that may be shown: a guest may have taken
/// it over.
fn harmless(mut ending: Ending) -> Ending {
    const LINES_MAX: usize = 50;
    let skipped = ending.last_lines.len().saturating_sub(LINES_MAX);
    ending.last_lines.drain(..skipped);
    for line in &mut ending.last_lines {
        *line = printable::line(line);
    }
    if let Outcome::Crash(why) | Outcome::Internal(why) = &mut ending.outcome {
        *why = printable::line(why);
    }
    ending
}

#[cfg(test)]
mod tests {
    use std::process::{Command as Program, Stdio};
    use std::sync::mpsc;
    use std::time::Instant;

    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::config::MachineOptions;
    use crate::config::testing::validate;
    use crate::signals::{StartSignals, raise};
    use crate::supervisor::start;
    use crate::supervisor::vmm_process::VmmProcess;
    use mayfly_sandbox::Child;

    /// What a VMM process has here, rather than [`STOP_TIMEOUT`].
    const SHORT: Duration = Duration::from_millis(300);
    /// Much more than it should take it to end, and less than [`STOP_TIMEOUT`].
    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn what_a_vmm_process_says_is_harmless() {
        let said = [&b"\x1b[2Jfine\n"[..], &[b'x'; 10_000], b"\x07"].concat();
        let mut passed = Vec::new();
        pass_on_lines(&said[..], &mut passed);
        let expected = [&b"?[2Jfine\n"[..], &[b'x'; 10_000], b"?"].concat();
        assert_eq!(passed, expected);
    }

    /// Keeps a shell's script that stands in for a VMM process: its standard input
    /// is the link, its standard output the one for requests, and a message is one
    /// `printf`. Returns how it ended, after how long.
    fn keep(
        script: &'static str,
        message: String,
        act: fn(&Supervisor),
    ) -> (Result<Ending, Failure>, Duration) {
        keep_while(script, message, move |supervisor, clients, _| {
            supervisor.stop.0.runs.store(true, Ordering::Relaxed);
            act(supervisor);
            supervisor.wait_for_end(clients)
        })
    }

    /// The same of one whose guest does not run yet.
    fn keep_while(
        script: &'static str,
        message: String,
        keep: impl FnOnce(&Supervisor, &Clients, &StartSignals) -> Result<Ending, Failure>
        + Send
        + 'static,
    ) -> (Result<Ending, Failure>, Duration) {
        let (told, end) = mpsc::sync_channel(1);
        // Signals are this thread's; and one that is held up can be told of.
        thread::spawn(move || {
            let mut config = validate(MachineOptions::default()).unwrap();
            config.log.level = log::LevelFilter::Off;
            let start = StartSignals::take().unwrap();
            let signals = Signals::new().unwrap();
            let (link, its_link) = Link::pair().unwrap();
            let (broker, its_broker) = Link::pair().unwrap();
            start::set_nonblocking(&broker).unwrap();
            let mut program = Program::new("sh");
            program.args(["-c", script, "sh", &message]);
            program.stdin(Stdio::from(OwnedFd::from(its_link)));
            program.stdout(Stdio::from(OwnedFd::from(its_broker)));
            let child = Child::stand_in(&mut program).unwrap();
            // Its end is seen when nobody has its ends any more.
            drop(program);
            let supervisor = Supervisor {
                config: &config,
                origin: Origin::Boot,
                stop: StopHandle(Arc::new(VmmProcess {
                    link,
                    exited: child.pidfd().try_clone_to_owned().unwrap(),
                    child: Mutex::new(child),
                    stopping: AtomicBool::new(false),
                    runs: AtomicBool::new(false),
                    stop_timeout: SHORT,
                })),
                broker,
                vsock: None,
                networks: None,
                helpers: BTreeMap::new(),
                signals: Some(signals),
                log: config.log.start(),
                cgroup: None,
                stderr: None,
                locks: DiskLocks::default(),
                board: StatusBoard::default(),
                timeline: Timeline::start(),
            };
            let to_vmm = supervisor.link().try_clone().unwrap();
            let clients = Clients::new(to_vmm, supervisor.board.clone(), About::default());
            let started = Instant::now();
            let ending = keep(&supervisor, &clients, &start);
            let _ = told.send((ending, started.elapsed()));
        });
        end.recv_timeout(LONG).expect("the supervisor is held up")
    }

    fn terminate(_: &Supervisor) {
        raise(libc::SIGTERM);
    }

    fn message(message: &impl serde::Serialize) -> String {
        serde_json::to_string(message).unwrap()
    }

    /// One that does nothing, as if it were stopped, before it has built a VM …
    fn is_built(
        supervisor: &Supervisor,
        signals: &StartSignals,
        timeout: Duration,
    ) -> Result<Ending, Failure> {
        supervisor
            .await_built(signals, timeout)
            .map(|_| unreachable!())
    }

    #[test]
    fn a_start_that_hangs_heeds_signals_and_has_an_end() {
        let silent = "exec sleep 60";
        type Keep = fn(&Supervisor, &Clients, &StartSignals) -> Result<Ending, Failure>;
        let keep = |keep: Keep| keep_while(silent, String::new(), keep).0.unwrap_err();
        let signalled = keep(|supervisor, _, signals| {
            terminate(supervisor);
            is_built(supervisor, signals, LONG)
        });
        assert_eq!(signalled.status(), 128 + 15);
        let late = keep(|supervisor, _, signals| is_built(supervisor, signals, SHORT));
        assert!(
            late.to_string().contains("did not build the VM in 0.3 s"),
            "{late}"
        );
        // … and after that, before its guest runs.
        let signalled = keep(|supervisor, clients, _| {
            terminate(supervisor);
            supervisor.wait_for_end(clients)
        });
        assert_eq!(signalled.status(), 128 + 15);
        let late = keep(|supervisor, clients, _| supervisor.handle_messages(clients, SHORT));
        assert!(
            late.to_string()
                .contains("did not start the guest in 0.3 s"),
            "{late}"
        );
        // A session ends it.
        let ended = keep(|supervisor, clients, _| {
            supervisor.stop_handle().stop();
            supervisor.wait_for_end(clients)
        });
        assert!(ended.to_string().contains("ended by signal 9"), "{ended}");
    }

    #[test]
    fn one_that_dies_before_the_guest_runs_never_ran() {
        let (ending, _) = keep_while("kill -9 $$", String::new(), |supervisor, clients, _| {
            supervisor.wait_for_end(clients)
        });
        let failure = ending.unwrap_err().to_string();
        assert!(failure.contains("ended by signal 9"), "{failure}");
    }

    #[test]
    fn one_that_fails_after_its_guest_ran_did_run() {
        let script = "printf %s \"$1\" >&0; exec sleep 60";
        let failed = message(&FromVmm::Failed(VmmFailure {
            class: Class::Config,
            part: None,
            message: "\x1b[2Jforget me".into(),
        }));
        let (ending, _) = keep(script, failed.clone(), |_| ());
        let outcome = ending.unwrap().outcome;
        assert_eq!(outcome, Outcome::Internal("?[2Jforget me".into()));
        // Before that, it never ran.
        let (ending, _) = keep_while(script, failed, |supervisor, clients, _| {
            supervisor.wait_for_end(clients)
        });
        assert_eq!(ending.unwrap_err().class, Class::Config);
    }

    #[test]
    fn a_request_that_makes_no_sense_is_answered_and_the_next_is_run() {
        // It ends when it has had three answers: each is one message, and so one read.
        let script = "printf nonsense; for request in a b; do printf %s \"$1\"; done; \
                      for answer in a b c; do dd bs=64k count=1 of=/dev/null <&1 2>/dev/null; done; \
                      exit 7";
        let request = message(&BrokerRequest::EndHelper("none".into()));
        let (ending, _) = keep(script, request, |_| ());
        let failure = ending.unwrap().outcome.to_string();
        assert!(failure.contains("status: 7"), "{failure}");
    }

    #[test]
    fn one_that_says_that_it_ended_ends() {
        let word = FromVmm::Ended(Ending {
            outcome: Outcome::PowerOff,
            guest_status: Some(3),
            last_lines: Vec::new(),
            timeline: Timeline::start(),
        });
        let script = "printf %s \"$1\" >&0; exec sleep 60";
        let (ending, time) = keep(script, message(&word), |_| ());
        assert_eq!(ending.unwrap().guest_status, Some(3));
        assert!(time >= SHORT, "{time:?}");
    }

    #[test]
    fn one_that_ignores_a_signal_ends() {
        let (ending, time) = keep("exec sleep 60", String::new(), terminate);
        assert_eq!(ending.unwrap().outcome, Outcome::Signal(libc::SIGTERM));
        assert!(time >= SHORT, "{time:?}");
    }

    #[test]
    fn one_that_reads_no_answers_ends() {
        let request = message(&BrokerRequest::EndHelper("none".into()));
        let script = "while printf %s \"$1\"; do :; done; exec sleep 60";
        let (ending, time) = keep(script, request, |supervisor| {
            // Until there is no room for more of them.
            let mut asked = [entry(supervisor.broker.as_raw_fd(), libc::POLLIN)];
            while poll(&mut asked, -1).is_ok() && supervisor.serve_broker().is_ok() {}
            terminate(supervisor);
        });
        assert_eq!(ending.unwrap().outcome, Outcome::Signal(libc::SIGTERM));
        assert!(time >= SHORT, "{time:?}");
    }
}
