//! The process that the user started: the machine's keeper. It opened what the
//! machine needs, and starts the machine's process, which may be taken over by its
//! guest. Names, the terminal, clients and the processes beside the VM stay here.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mayfly_devices::poll::{entry, poll, ready};
use rustix::fs::{OFlags, fcntl_setfl};

use super::clients::Clients;
use super::link::{Done, Errand, Link, Order, Word};
use super::pidfile::PidFile;
use super::resources::Resources;
use super::run::{self, Ending, Legacy, Outcome};
use super::signals::{Signals, StartSignals};
use super::status::StatusBoard;
use super::vmm_process::{STOP_TIMEOUT, StopHandle, VmmProcess};
use crate::config::{MachineConfig, NetConfig};
use crate::console::Opened;
use crate::control::{Event, Folder, Server};
use crate::disk_lock::DiskLocks;
use crate::failure::{Class, Failure, OrFail};
use crate::helper::Running;
use crate::logging;
use crate::net::host::{HostNetworks, Watch};
use crate::net::publish::Reserved;
use crate::sandbox::{self, Cgroup, Child, Layer, Mode, Policy, Report, Share, Status};
use crate::timing::Timeline;
use crate::unix_socket::Name;
use crate::vsock;
use mayfly_text::printable;

/// The VMM process has so long to build a VM, and as long again to let the guest run …
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// … and a second more for each so many bytes that are to be touched before.
const PREFAULTED_PER_S: u64 = 64 << 20;
/// One that closed its link has so long to end by itself.
const LAST_WORD_MS: i32 = 1000;
const FOR_EVER: i32 = -1;
const LINK: &str = "talking to the VMM process";

/// Builds a machine and runs it to its end. Its published ports are chosen, and held
/// until it has them.
pub fn run(
    config: &MachineConfig,
    ports: Vec<Reserved>,
    timeline: Timeline,
) -> Result<Ending, Failure> {
    let signals = StartSignals::take().or_internal("blocking signals")?;
    let keeper = Keeper::start(config, timeline, &signals)?;
    drop(ports);
    keeper.run()
}

/// The keeper of a machine that is built, and does not run yet.
pub struct Keeper<'a> {
    config: &'a MachineConfig,
    stop: StopHandle,
    errands: Link,
    vsock: Option<UnixListener>,
    networks: Option<Watch>,
    helpers: Vec<Running>,
    signals: Option<Signals>,
    log: logging::Started,
    cgroup: Option<Cgroup>,
    /// Passes on what it says on standard error, to its end.
    says: Option<JoinHandle<()>>,
    /// Those of its disks, which are free when it has ended.
    locks: DiskLocks,
    board: StatusBoard,
    timeline: Timeline,
}

impl Drop for Keeper<'_> {
    fn drop(&mut self) {
        self.stop.0.kill();
        let _ = self.stop.0.wait();
        self.locks.release();
        if let Some(says) = self.says.take() {
            let _ = says.join();
        }
    }
}

/// Passes on what the VMM process says on standard error, line by line. A guest may have
/// taken it over: its words are for a terminal, and harmless there.
fn pass_on_words(said: impl Read, mut to: impl Write) {
    const LINE_MAX: u64 = 4096;
    let mut said = BufReader::new(said);
    let mut line = Vec::new();
    // Also when nobody wants to hear it any more, or it could say no more.
    while let Ok(1..) = (&mut said).take(LINE_MAX).read_until(b'\n', &mut line) {
        let _ = to.write_all(printable::lines(&line).as_bytes());
        line.clear();
    }
}

/// Whether what was sent found nobody any more.
fn has_hung_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionReset)
}

fn set_nonblocking(new: &impl AsFd) -> io::Result<()> {
    // A new one has no other flags.
    Ok(fcntl_setfl(new, OFlags::NONBLOCK)?)
}

/// For errands: the keeper's end, and the machine's. Who has them done and hears
/// nothing of them holds up no keeper.
fn errands() -> io::Result<(Link, Link)> {
    let (ours, theirs) = Link::pair()?;
    set_nonblocking(&ours)?;
    Ok((ours, theirs))
}

/// Rounded up, so that it is over then.
fn milliseconds_until(deadline: Instant) -> i32 {
    let left = deadline.saturating_duration_since(Instant::now());
    i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX)
}

/// How long a VM's process may take to build it.
fn start_timeout(config: &MachineConfig) -> Duration {
    let prefaulted = match config.memory.prefault {
        true => config.memory.size / PREFAULTED_PER_S,
        false => 0,
    };
    START_TIMEOUT + Duration::from_secs(prefaulted)
}

/// Listens for changes of the host's networks, if a guest's filter has to know of them.
fn watch_networks(config: &MachineConfig) -> Result<Option<Watch>, Failure> {
    let filtered = config.nets.iter().any(|net| net.user().is_some());
    let watch = filtered.then(Watch::open).transpose();
    watch.or_host("--net user: listening for changes of the host's addresses")
}

fn tell_networks(link: &Link, now: &HostNetworks) -> io::Result<()> {
    let mut parts = now.parts().into_iter().peekable();
    while let Some(part) = parts.next() {
        let more = parts.peek().is_some();
        link.send(&Order::HostNetworks { part, more }, &[])?;
    }
    Ok(())
}

/// A control group for the VMM process and the helpers, if there is to be a sandbox. Disks
/// may take so much memory.
fn make_cgroup(config: &MachineConfig, in_memory: u64) -> Option<Cgroup> {
    let helped = |net: &&NetConfig| net.user().is_some();
    let count = |len: usize| u64::try_from(len).unwrap_or(u64::MAX);
    match config.sandbox {
        Mode::Off => None,
        _ => Some(Cgroup::make(&Share {
            cpus: config.cpus,
            memory: config.memory.size.saturating_add(in_memory),
            nets: count(config.nets.iter().filter(helped).count()),
            folders: count(config.folders.len()),
        })),
    }
}

/// Puts the machine's process into its control group, which the host may not have.
fn confine(child: &Child, cgroup: &mut Cgroup, mode: Mode) -> Result<(), Failure> {
    cgroup.add(child.id());
    match (mode, cgroup.status()) {
        (Mode::Require, Status::Absent(why)) => {
            Err(Failure::host(format!("--sandbox=require: cgroup: {why}")))
        }
        _ => Ok(()),
    }
}

/// What this process opened for the machine's, and gives away.
struct Given {
    resources: Resources,
    link: Link,
    errands: Link,
    strays: Vec<RawFd>,
    null: File,
    says: OwnedFd,
}

impl Given {
    /// Starts the machine's process, which builds it.
    fn spawn(
        self,
        config: &MachineConfig,
        log: &logging::Started,
        timeline: Timeline,
    ) -> io::Result<Child> {
        let policy = Policy {
            // Also with a TAP, which is open already.
            new_net: true,
            mode: config.sandbox,
        };
        let keeper = std::process::id();
        // Both have it until one of them calls it its own.
        let mut given = Some(self);
        let child = sandbox::spawn(&policy, |inside| match given.take() {
            Some(its) => run::run(Legacy {
                config,
                resources: its.resources,
                log,
                timeline,
                keeper,
                link: Arc::new(its.link),
                errands: its.errands,
                inside,
                strays: its.strays,
                null: its.null,
                says: its.says,
            }),
            None => u8::MAX,
        })?;
        if let Some(its) = given {
            // The other process works with them; here nothing may be closed in
            // order, such as an image. Its end is seen when nobody has the rest, which
            // this drops, any more.
            mem::forget(its.resources);
        }
        Ok(child)
    }
}

/// The VMM process said nothing for so long.
fn too_late(what: &str, timeout: Duration) -> Failure {
    let seconds = timeout.as_secs_f32();
    Failure::host(format!("the VMM process did not {what} in {seconds} s"))
}

impl<'a> Keeper<'a> {
    /// Opens what a machine needs, and starts its process, which builds it. May only
    /// be called while this process has one thread. Nothing of the host is changed.
    pub fn start(
        config: &'a MachineConfig,
        timeline: Timeline,
        start: &StartSignals,
    ) -> Result<Self, Failure> {
        let log = config.log.start();
        let signals = match config.ignores_signals {
            true => None,
            false => Some(Signals::new().or_internal("blocking signals")?),
        };
        if config.sandbox == Mode::Off {
            eprintln!(
                "mayfly: --sandbox=off: a guest that takes over its monitor has all that you have"
            );
        }
        // The machine's process is not to have it, as others that were open before.
        let networks = watch_networks(config)?;
        let strays = sandbox::descriptors().or_host("listing descriptors")?;
        let (mut resources, mut cgroup, helpers) =
            Resources::open(config, start, |in_memory| make_cgroup(config, in_memory))?;
        let locks = mem::take(&mut resources.locks);
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.or_host("/dev/null")?;
        let vsock = resources.vsock.as_ref().map(UnixListener::try_clone);
        let vsock = vsock.transpose().or_host("duplicating a descriptor")?;
        let (link, its_link) = Link::pair().or_host("a pair of sockets")?;
        let (errands, its_errands) = errands().or_host("a pair of sockets")?;
        let (said, says) = io::pipe().or_host("a pipe")?;
        // Rather than wait for who reads it, the machine loses a line.
        set_nonblocking(&says).or_host("a pipe")?;
        let given = Given {
            resources,
            link: its_link,
            errands: its_errands,
            strays,
            null,
            says: says.into(),
        };
        let child = given.spawn(config, &log, timeline);
        let child = child.or_host("starting the VMM process")?;
        if let Some(cgroup) = &mut cgroup {
            confine(&child, cgroup, config.sandbox)?;
        }
        let says = thread::Builder::new().name("stderr".into());
        let says = says.spawn(move || pass_on_words(said, io::stderr()));
        let exited = child.pidfd().try_clone_to_owned();
        let exited = exited.or_host("duplicating a descriptor")?;
        let board = StatusBoard::default();
        let helpers = helpers.into_iter().map(|helper| {
            let board = board.clone();
            helper.watch(move |problem| board.add_problem(&problem))
        });
        let helpers = helpers.collect::<Result<_, _>>();
        let keeper = Keeper {
            config,
            stop: StopHandle(Arc::new(VmmProcess {
                link,
                child: Mutex::new(child),
                exited,
                stopping: AtomicBool::new(false),
                runs: AtomicBool::new(false),
                stop_timeout: STOP_TIMEOUT,
            })),
            errands,
            vsock,
            networks,
            helpers: helpers.or_host("starting a thread")?,
            signals,
            log,
            cgroup,
            says: Some(says.or_host("starting a thread")?),
            locks,
            board,
            timeline,
        };
        keeper.await_built(start, start_timeout(config))?;
        Ok(keeper)
    }

    /// Hears whether the machine could be built.
    fn await_built(&self, signals: &StartSignals, timeout: Duration) -> Result<(), Failure> {
        if !signals.wait(self.link().as_fd(), timeout)? {
            return Err(too_late("build the VM", timeout));
        }
        match self.link().receive() {
            Ok(Some(Word::Built)) => Ok(()),
            Ok(Some(Word::Failed { class, message })) => {
                Err(Failure::new(class, printable::text(&message)))
            }
            _ => Err(Failure::new(Class::Internal, self.why_died())),
        }
    }

    /// Ends the machine, from any thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// What users are told of the machine while it runs.
    pub fn board(&self) -> StatusBoard {
        self.board.clone()
    }

    fn link(&self) -> &Link {
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
        let (listener, socket) = Folder::locate().listen(&config.name)?;
        let _pidfile = config.pidfile.as_deref().map(PidFile::create).transpose()?;
        let _vsock = match (&self.vsock, &config.vsock) {
            (Some(socket), Some(vsock)) => Some(Name::give(socket, &vsock.path, &vsock.flag())?),
            _ => None,
        };
        let has_log = log.is_some();
        let mut files: Vec<OwnedFd> = log.into_iter().map(OwnedFd::from).collect();
        let (mut opened, mut natures) = (Vec::new(), Vec::new());
        for (end, what, flag) in config.ends() {
            let mut console = Opened::open(end, &what, &flag)?;
            let (nature, its) = console.ends.take().unwrap_or_default().into_parts();
            natures.push(nature);
            files.extend(its);
            opened.push(console);
        }
        let start = Order::Start {
            log: has_log,
            ends: natures,
        };
        let link = self.link();
        let to_vmm = link.try_clone().or_host("duplicating a descriptor")?;
        let clients = Arc::new(Clients::new(to_vmm, self.board.clone()));
        let asked = clients.clone();
        let server = Server::start(listener, socket, move |ask| asked.ask(ask))
            .or_host("starting the control thread")?;
        match link.send(&start, &files) {
            // It has ended already: why, is told below.
            Err(error) if has_hung_up(&error) => {}
            sent => sent.or_internal(LINK)?,
        }
        if let Some(networks) = self.networks.take() {
            self.tell_of(networks).or_host("starting a thread")?;
        }
        // They are the other process's: a client sees that it closes one.
        drop(files);
        let ending = self.attend(&clients);
        clients.forget();
        drop(opened);
        server.farewell();
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

    /// Keeps the machine's process to its end, which comes soon after it is told.
    fn attend(&self, clients: &Clients) -> Result<Ending, Failure> {
        let ending = self.follow(clients, START_TIMEOUT);
        self.stop.kill_after_timeout();
        let _ = self.stop.0.wait();
        if let Ok(ending) = &ending {
            let how = ending.outcome.to_string();
            self.board.tell(&Event::now("ended", Some(how)));
        }
        ending
    }

    /// Does what the machine's process asks for, and hears what it says, to its end.
    fn follow(&self, clients: &Clients, start_timeout: Duration) -> Result<Ending, Failure> {
        let deadline = Instant::now() + start_timeout;
        let signals = self.signals.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let mut ready = [self.link().as_raw_fd(), self.errands.as_raw_fd(), signals]
            .map(|fd| entry(fd, libc::POLLIN));
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
            let [said, errand, signal] = ready.map(|entry| entry.revents != 0);
            if said {
                match self.link().receive() {
                    Ok(Some(Word::Ended(ending))) => return Ok(harmless(ending)),
                    // What never ran leaves nothing behind. One whose guest has run may
                    // have been taken over, and does not have its traces removed so.
                    Ok(Some(Word::Failed { class, message })) if !self.runs() => {
                        return Err(Failure::new(class, printable::text(&message)));
                    }
                    Ok(Some(Word::Failed { message, .. })) => {
                        return Ok(self.ended_by(printable::line(&message)));
                    }
                    Ok(Some(Word::Reply { id, reply })) => clients.answer(id, reply),
                    Ok(Some(Word::Event(event))) => self.board.tell(&event),
                    Ok(Some(Word::Closed(report))) => self.note(clients, report),
                    Ok(Some(Word::Running)) => self.stop.0.runs.store(true, Ordering::Relaxed),
                    Ok(Some(Word::Built)) => {}
                    Ok(None) | Err(_) if !self.runs() => {
                        return Err(Failure::new(Class::Internal, self.why_died()));
                    }
                    Ok(None) | Err(_) => return Ok(self.died()),
                }
            }
            if errand && self.run_errand().is_err() {
                // It has no more; how it ended the other link says. Should it wait for an
                // answer, it hears that none comes.
                self.errands.shut_down();
                ready[1].fd = -1;
            }
            if signal {
                self.pass_on()?;
            }
        }
    }

    fn runs(&self) -> bool {
        self.stop.0.runs.load(Ordering::Relaxed)
    }

    /// Keeps what was said of the sandbox before the guest ran.
    fn note(&self, clients: &Clients, mut report: Report) {
        let cgroup = self.cgroup.as_ref();
        let status = cgroup.map_or(&Status::Off, Cgroup::status).clone();
        report.set(Layer::Cgroup, status);
        clients.note_sandbox(report);
    }

    /// Does an errand, and answers. That it, or its answer, fails is an answer, too; an error
    /// is that nobody hears one.
    fn run_errand(&self) -> io::Result<()> {
        let errand = match self.errands.receive() {
            Ok(errand) => errand.ok_or(io::ErrorKind::UnexpectedEof)?,
            // What makes no sense, as only one says that a guest has taken over.
            Err(error) => return self.refuse_errand(&error),
        };
        let done = match errand {
            Errand::Connect(port) => match &self.config.vsock {
                Some(vsock) => vsock::connect_to_port(&vsock.path, port).map(Some),
                None => Err(io::Error::from_raw_os_error(libc::ECONNREFUSED)),
            },
            Errand::EndHelper(index) => {
                if let Some(helper) = self.helpers.get(index) {
                    helper.end();
                }
                Ok(None)
            }
        };
        let sent = done.and_then(|socket| {
            let files: Vec<OwnedFd> = socket.into_iter().map(OwnedFd::from).collect();
            self.errands.send(&Done::Done, &files)
        });
        match sent {
            Ok(()) => Ok(()),
            // A descriptor may be refused where a number is not: too many are on their way.
            Err(error) => self.refuse_errand(&error),
        }
    }

    fn refuse_errand(&self, error: &io::Error) -> io::Result<()> {
        let code = error.raw_os_error().unwrap_or(libc::EIO);
        self.errands.send(&Done::Failed(code), &[])
    }

    fn pass_on(&self) -> Result<(), Failure> {
        let order = match self.signals.as_ref().and_then(Signals::next) {
            None => return Ok(()),
            Some(libc::SIGWINCH) => Order::Resized,
            // Nothing is there that could end in order.
            Some(signal) if !self.runs() => return Err(Failure::signalled(signal)),
            Some(signal) => Order::Signal(signal),
        };
        let ends = matches!(order, Order::Signal(_));
        if self.link().try_send(&order).is_err() || ends {
            self.stop.kill_after_timeout();
        }
        Ok(())
    }

    /// The end of a VM whose process has ended without a word about it.
    fn died(&self) -> Ending {
        self.ended_by(self.why_died())
    }

    /// The end of a VM that cannot go on.
    fn ended_by(&self, why: String) -> Ending {
        Ending {
            outcome: Outcome::Internal(why),
            guest_status: None,
            last_lines: Vec::new(),
            timeline: self.timeline,
        }
    }

    /// Why it does not speak any more. If it lives, it says what makes no sense.
    fn why_died(&self) -> String {
        // One that has ended closed its link a moment before.
        ready(self.stop.0.exited.as_raw_fd(), libc::POLLIN, LAST_WORD_MS);
        self.stop.0.kill();
        let what = "the VMM process";
        match self.stop.0.wait() {
            Ok(status) if status.code() == Some(sandbox::VIOLATION.into()) => {
                format!("{what} was ended, as it did what its sandbox forbids")
            }
            Ok(status) if status.code() == Some(sandbox::PANIC.into()) => {
                format!("{what} failed, as said above")
            }
            Ok(status) => match status.signal() {
                Some(_) if self.cgroup.as_ref().is_some_and(Cgroup::ran_out_of_memory) => {
                    format!("{what} needed more memory than its control group may have")
                }
                Some(signal) => format!("{what} was ended by signal {signal}"),
                None => format!("{what} ended with {status}"),
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

    use super::*;
    use crate::config::RawConfig;

    use crate::machine::signals::raise;

    /// What a machine's process has here, rather than [`STOP_TIMEOUT`].
    const SHORT: Duration = Duration::from_millis(300);
    /// Much more than it should take it to end, and less than [`STOP_TIMEOUT`].
    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn what_a_vmm_process_says_is_harmless() {
        let said = [&b"\x1b[2Jfine\n"[..], &[b'x'; 10_000], b"\x07"].concat();
        let mut passed = Vec::new();
        pass_on_words(&said[..], &mut passed);
        let expected = [&b"?[2Jfine\n"[..], &[b'x'; 10_000], b"?"].concat();
        assert_eq!(passed, expected);
    }

    /// Keeps a shell's script that stands in for a machine's process: its standard input
    /// is the link, its standard output the one for errands, and a message is one
    /// `printf`. Returns how it ended, after how long.
    fn keep(
        script: &'static str,
        message: String,
        act: fn(&Keeper),
    ) -> (Result<Ending, Failure>, Duration) {
        keep_while(script, message, move |keeper, clients, _| {
            keeper.stop.0.runs.store(true, Ordering::Relaxed);
            act(keeper);
            keeper.attend(clients)
        })
    }

    /// The same of one whose guest does not run yet.
    fn keep_while(
        script: &'static str,
        message: String,
        keep: impl FnOnce(&Keeper, &Clients, &StartSignals) -> Result<Ending, Failure> + Send + 'static,
    ) -> (Result<Ending, Failure>, Duration) {
        let (told, end) = mpsc::sync_channel(1);
        // Signals are this thread's; and one that is held up can be told of.
        thread::spawn(move || {
            let mut config = RawConfig {
                kernel: Some("k".into()),
                ..Default::default()
            }
            .validate()
            .unwrap();
            config.log.level = log::LevelFilter::Off;
            let start = StartSignals::take().unwrap();
            let signals = Signals::new().unwrap();
            let (link, its_link) = Link::pair().unwrap();
            let (errands, its_errands) = errands().unwrap();
            let mut program = Program::new("sh");
            program.args(["-c", script, "sh", &message]);
            program.stdin(Stdio::from(OwnedFd::from(its_link)));
            program.stdout(Stdio::from(OwnedFd::from(its_errands)));
            let child = Child::stand_in(&mut program).unwrap();
            // Its end is seen when nobody has its ends any more.
            drop(program);
            let keeper = Keeper {
                config: &config,
                stop: StopHandle(Arc::new(VmmProcess {
                    link,
                    exited: child.pidfd().try_clone_to_owned().unwrap(),
                    child: Mutex::new(child),
                    stopping: AtomicBool::new(false),
                    runs: AtomicBool::new(false),
                    stop_timeout: SHORT,
                })),
                errands,
                vsock: None,
                networks: None,
                helpers: Vec::new(),
                signals: Some(signals),
                log: config.log.start(),
                cgroup: None,
                says: None,
                locks: DiskLocks::default(),
                board: StatusBoard::default(),
                timeline: Timeline::start(),
            };
            let to_vmm = keeper.link().try_clone().unwrap();
            let clients = Clients::new(to_vmm, keeper.board.clone());
            let started = Instant::now();
            let ending = keep(&keeper, &clients, &start);
            let _ = told.send((ending, started.elapsed()));
        });
        end.recv_timeout(LONG).expect("the keeper is held up")
    }

    fn terminate(_: &Keeper) {
        raise(libc::SIGTERM);
    }

    fn message(message: &impl serde::Serialize) -> String {
        serde_json::to_string(message).unwrap()
    }

    /// One that does nothing, as if it were stopped, before it has built a VM …
    fn is_built(
        keeper: &Keeper,
        signals: &StartSignals,
        timeout: Duration,
    ) -> Result<Ending, Failure> {
        keeper
            .await_built(signals, timeout)
            .map(|()| unreachable!())
    }

    #[test]
    fn a_start_that_hangs_heeds_signals_and_has_an_end() {
        let silent = "exec sleep 60";
        type Keep = fn(&Keeper, &Clients, &StartSignals) -> Result<Ending, Failure>;
        let keep = |keep: Keep| keep_while(silent, String::new(), keep).0.unwrap_err();
        let signalled = keep(|keeper, _, signals| {
            terminate(keeper);
            is_built(keeper, signals, LONG)
        });
        assert_eq!(signalled.status(), 128 + 15);
        let late = keep(|keeper, _, signals| is_built(keeper, signals, SHORT));
        assert!(
            late.to_string().contains("did not build the VM in 0.3 s"),
            "{late}"
        );
        // … and after that, before its guest runs.
        let signalled = keep(|keeper, clients, _| {
            terminate(keeper);
            keeper.attend(clients)
        });
        assert_eq!(signalled.status(), 128 + 15);
        let late = keep(|keeper, clients, _| keeper.follow(clients, SHORT));
        assert!(
            late.to_string()
                .contains("did not start the guest in 0.3 s"),
            "{late}"
        );
        // A session ends it.
        let ended = keep(|keeper, clients, _| {
            keeper.stop_handle().stop();
            keeper.attend(clients)
        });
        assert!(ended.to_string().contains("ended by signal 9"), "{ended}");
    }

    #[test]
    fn one_that_dies_before_the_guest_runs_never_ran() {
        let (ending, _) = keep_while("kill -9 $$", String::new(), |keeper, clients, _| {
            keeper.attend(clients)
        });
        let failure = ending.unwrap_err().to_string();
        assert!(failure.contains("ended by signal 9"), "{failure}");
    }

    #[test]
    fn one_that_fails_after_its_guest_ran_did_run() {
        let script = "printf %s \"$1\" >&0; exec sleep 60";
        let failed = message(&Word::Failed {
            class: Class::Config,
            message: "\x1b[2Jforget me".into(),
        });
        let (ending, _) = keep(script, failed.clone(), |_| ());
        let outcome = ending.unwrap().outcome;
        assert_eq!(outcome, Outcome::Internal("?[2Jforget me".into()));
        // Before that, it never ran.
        let (ending, _) = keep_while(script, failed, |keeper, clients, _| keeper.attend(clients));
        assert_eq!(ending.unwrap_err().class, Class::Config);
    }

    #[test]
    fn an_errand_that_makes_no_sense_is_answered_and_the_next_is_run() {
        // It ends when it has had three answers: each is one message, and so one read.
        let script = "printf nonsense; for errand in a b; do printf %s \"$1\"; done; \
                      for answer in a b c; do dd bs=64k count=1 of=/dev/null <&1 2>/dev/null; done; \
                      exit 7";
        let errand = message(&Errand::EndHelper(usize::MAX));
        let (ending, _) = keep(script, errand, |_| ());
        let failure = ending.unwrap().outcome.to_string();
        assert!(failure.contains("status: 7"), "{failure}");
    }

    #[test]
    fn one_that_says_that_it_ended_ends() {
        let word = Word::Ended(Ending {
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
        let reason = "the VMM process was ended by signal 9";
        assert_eq!(ending.unwrap().outcome, Outcome::Internal(reason.into()));
        assert!(time >= SHORT, "{time:?}");
    }

    #[test]
    fn one_that_reads_no_answers_ends() {
        let errand = message(&Errand::EndHelper(usize::MAX));
        let script = "while printf %s \"$1\"; do :; done; exec sleep 60";
        let (ending, time) = keep(script, errand, |keeper| {
            // Until there is no room for more of them.
            let mut errand = [entry(keeper.errands.as_raw_fd(), libc::POLLIN)];
            while poll(&mut errand, -1).is_ok() && keeper.run_errand().is_ok() {}
            terminate(keeper);
        });
        let reason = "the VMM process was ended by signal 9";
        assert_eq!(ending.unwrap().outcome, Outcome::Internal(reason.into()));
        assert!(time >= SHORT, "{time:?}");
    }
}
