//! The machine's process: it builds the machine and runs it to its end. What is
//! the host's is its keeper's.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use mayfly_devices::virtio::block::Prepare;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use serde::{Deserialize, Serialize};
use vmm_sys_util::signal::Killable;
use vmm_sys_util::timerfd::TimerFd;

use super::build::{VmEvent, build, duplicate};
use super::control::Commander;
use super::event_loop::{ConsolePump, Control, EventLoop, VirtioWorker};
use super::link::{Errands, Link, Order, Word};
use super::resources::Resources;
use super::signals;
use crate::config::MachineConfig;
use crate::console::{Console, Ends};
use crate::failure::{Class, Failure, OrFail};
use crate::kvm::gate::Gate;
use crate::kvm::vcpu::{self, Buses, ExitCounters, Vcpu};
use crate::logging;
use crate::net::host::Updates;
use crate::sandbox::{self, Inside, Keep, Limits, Role};
use crate::timing::Timeline;
use crate::vsock;

/// The guest's sockets are the most.
const OPEN_FILES: u64 = vsock::OPEN_FILES;
/// What a running machine may still allocate.
const MEMORY: u64 = 256 << 20;
/// Enough for what a vCPU's thread calls.
const VCPU_STACK: usize = 256 << 10;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The guest turned it off.
    PowerOff,
    /// The guest restarted it.
    Reset,
    /// The user ended it at the console.
    Quit,
    /// It did not turn off when the user asked.
    Forced,
    /// A signal ended it.
    Signal(i32),
    /// The guest's kernel panicked.
    Panic,
    /// The guest did not feed its watchdog for so long.
    Hung(Duration),
    /// The guest cannot go on.
    Crash(String),
    /// mayfly cannot go on.
    Internal(String),
}

impl Outcome {
    /// Its name in records and events.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::PowerOff => "power-off",
            Outcome::Reset => "reset",
            Outcome::Quit => "quit",
            Outcome::Forced => "forced-off",
            Outcome::Signal(_) => "signal",
            Outcome::Panic => "panic",
            Outcome::Hung(_) => "hung",
            Outcome::Crash(_) => "crash",
            Outcome::Internal(_) => "internal",
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::Crash(why) | Outcome::Internal(why) => write!(f, "{}: {why}", self.name()),
            _ => f.write_str(self.name()),
        }
    }
}

/// All there is to say about a machine that ended.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ending {
    /// How.
    pub outcome: Outcome,
    /// What the guest's init said of its work.
    pub guest_status: Option<u8>,
    /// The console's last lines, if it is not standard output.
    pub last_lines: Vec<String>,
    /// When.
    pub timeline: Timeline,
}

/// What the machine's process has from its keeper.
pub(super) struct Legacy<'a> {
    /// What it is to be.
    pub config: &'a MachineConfig,
    /// All that was opened for it.
    pub resources: Resources,
    /// Where it logs to.
    pub log: &'a logging::Started,
    /// Until now.
    pub timeline: Timeline,
    /// The keeper's process.
    pub keeper: u32,
    /// To the keeper …
    pub link: Arc<Link>,
    /// … and for what it is to do.
    pub errands: Link,
    /// Where it is.
    pub inside: Inside,
    /// What else the keeper had open.
    pub strays: Vec<RawFd>,
    /// For standard input and output, which are the keeper's.
    pub null: File,
    /// What it says on standard error goes to the keeper.
    pub says: OwnedFd,
}

/// Builds a machine and runs it to its end, in a process of its own. Returns what
/// that is to exit with; the keeper knows more.
pub(super) fn run(legacy: Legacy) -> u8 {
    let link = legacy.link.clone();
    let word = live(legacy).map_or_else(Word::from, Word::Ended);
    // Without a keeper, nobody wants to know.
    u8::from(link.send(&word, &[]).is_err())
}

fn live(legacy: Legacy) -> Result<Ending, Failure> {
    let Legacy {
        config,
        resources,
        log,
        mut timeline,
        keeper,
        link,
        errands,
        inside,
        strays,
        null,
        says,
    } = legacy;
    const LINK: &str = "talking to the keeper";
    // Signals are the keeper's.
    signals::leave_to_others().or_internal("blocking signals")?;
    vcpu::install_kick_handler().or_internal("installing a signal handler")?;
    take_standard_streams(null, says).or_host("standard streams")?;
    close_strays(&inside, &strays).or_host("closing descriptors")?;
    let file_size = resources.file_size();
    let host = Updates::new(resources.known_hosts());
    let errands = Arc::new(Errands::new(errands));
    let prepare: Arc<dyn Prepare> = Arc::new(AtGate(inside.gate()));
    let building = (&errands, &prepare);
    let machine = build(config, resources, building, &mut timeline)?;

    link.send(&Word::Built, &[]).or_internal(LINK)?;
    let (order, files) = link.receive_with_files().or_internal(LINK)?;
    let Order::Start {
        log: has_log,
        ends: natures,
    } = order
    else {
        return Err(Failure::new(Class::Internal, "not told to start"));
    };
    // A file that is written to without end has no limit.
    let endless = files.iter().any(|fd| is_regular(fd.as_fd()));
    let limits = Limits {
        files: OPEN_FILES,
        file_size: file_size.filter(|_| !endless),
        address_space_extra: Some(MEMORY + VCPU_STACK as u64 * u64::from(config.cpus)),
    };
    let mut files = files.into_iter();
    if has_log {
        log.go_on_in(files.next().map(File::from));
    }
    let resized = machine.connections.first();
    let resized = resized.map(|console| duplicate(&console.attention));
    let mut consoles = Vec::new();
    for (connection, nature) in machine.connections.into_iter().zip(natures) {
        let ends = Ends::from_parts(nature, &mut files);
        let console = Console::new(&connection, ends);
        consoles.push((Rc::new(RefCell::new(console)), connection.attention));
    }

    let mut events = EventLoop::new(timeline).or_internal("event loop")?;
    let learnt = events.learnt();
    for (console, attention) in &consoles {
        events.add(ConsolePump {
            console: console.clone(),
            attention: duplicate(attention)?,
            learnt: learnt.clone(),
        });
    }

    for slot in machine.slots.iter() {
        events.add(VirtioWorker::new(slot.transport.clone(), learnt.clone()));
    }

    // Nothing is opened from here on.
    let jail = inside.close(&limits, Keep::All)?;
    jail.settle();
    link.send(&Word::Closed(jail.report()), &[])
        .or_internal(LINK)?;
    let notifier = Arc::new(machine.notifier);
    let vcpus = Arc::new(VcpuControl::start(
        machine.vcpus,
        machine.buses,
        machine.gate,
        {
            let jail = jail.clone();
            move || confined(jail.confine(Role::Vcpu))
        },
        move |end| {
            notifier.send(VmEvent::Vcpu(end));
        },
    )?);
    let commander = Commander::new(
        config,
        keeper,
        vcpus.clone(),
        machine.slots.clone(),
        machine.balloon,
        machine.platform.clone(),
        link.clone(),
    );
    let commander = Rc::new(RefCell::new(commander.or_host("creating a timer")?));
    let started = link.clone();
    events.add(Control {
        wake: machine.wake,
        events: machine.events,
        link,
        panicked: false,
        grace: TimerFd::new().or_host("creating a timer")?,
        resized: resized.transpose()?,
        host,
        commander: commander.clone(),
        learnt: learnt.clone(),
    });
    jail.confine(Role::EventLoop).or_host("seccomp")?;
    started.send(&Word::Running, &[]).or_internal(LINK)?;
    vcpus.resume();
    {
        let mut learnt = learnt.borrow_mut();
        learnt.timeline.vcpus_started = learnt.timeline.now();
    }
    let outcome = events.run();
    vcpus.stop();
    for (console, _) in &consoles {
        console.borrow_mut().flush();
    }
    // What disks have in flight ends here, before their locks are released.
    drop((events, machine.slots));
    drop((commander, machine.vm));

    let mut learnt = learnt.borrow_mut();
    learnt.timeline.exit = learnt.timeline.now();
    Ok(Ending {
        outcome,
        guest_status: machine.platform.guest_status(),
        last_lines: consoles
            .first()
            .map(|(console, _)| console.borrow().last_lines())
            .unwrap_or_default(),
        timeline: learnt.timeline,
    })
}

/// The keeper's standard streams are not this process's.
fn take_standard_streams(null: File, says: OwnedFd) -> io::Result<()> {
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    Ok(dup2_stderr(&says)?)
}

/// Closes what the keeper had open before it opened this machine's.
fn close_strays(inside: &Inside, strays: &[RawFd]) -> io::Result<()> {
    let stays = |fd: &RawFd| *fd <= libc::STDERR_FILENO || !strays.contains(fd);
    let keep: Vec<_> = sandbox::descriptors()?.into_iter().filter(stays).collect();
    inside.close_strays(&keep)
}

fn is_regular(fd: BorrowedFd) -> bool {
    let file = fd.try_clone_to_owned().map(File::from);
    let metadata = file.and_then(|file| file.metadata());
    metadata.is_ok_and(|metadata| metadata.is_file())
}

/// Threads of disks start before the sandbox is closed, and wait for that.
struct AtGate(sandbox::Gate);

impl Prepare for AtGate {
    fn first(&self) -> Box<dyn FnOnce() + Send> {
        let place = self.0.pending();
        Box::new(move || confined(place.confine(Role::Io)))
    }

    fn give_up(&self) {
        self.0.give_up();
    }
}

/// A thread that is not confined must not go on.
fn confined(result: io::Result<()>) {
    if let Err(error) = result {
        log::error!("confining a thread: {error}");
        std::process::exit(sandbox::PANIC.into());
    }
}

/// A machine's vCPUs, each on a thread of its own; they end with this.
pub struct VcpuControl {
    gate: Arc<Gate>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    exits: Vec<Arc<ExitCounters>>,
}

impl VcpuControl {
    /// Starts the threads; their vCPUs wait.
    pub(super) fn start(
        vcpus: Vec<Vcpu>,
        buses: Buses,
        gate: Arc<Gate>,
        begin: impl Fn() + Send + Sync + 'static,
        tell: impl Fn(vcpu::VcpuEnd) + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let (buses, tell, begin) = (Arc::new(buses), Arc::new(tell), Arc::new(begin));
        let mut threads = Vec::new();
        let exits = vcpus.iter().map(Vcpu::exits).collect();
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let (its_gate, buses) = (gate.clone(), buses.clone());
            let (begin, tell) = (begin.clone(), tell.clone());
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(VCPU_STACK)
                .spawn(move || {
                    begin();
                    tell(vcpu.run(&buses, &its_gate));
                });
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    gate.stop();
                    return Err(error).or_host("starting a vCPU's thread");
                }
            }
        }
        Ok(VcpuControl {
            gate,
            threads: Mutex::new(threads),
            exits,
        })
    }

    /// What each vCPU left the guest for.
    pub fn exits(&self) -> &[Arc<ExitCounters>] {
        &self.exits
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.gate.open();
    }

    /// Makes every vCPU leave the guest; false if one did not.
    pub fn pause(&self) -> bool {
        const PATIENCE: Duration = Duration::from_secs(10);
        self.gate.close();
        self.kick();
        self.gate.closed(PATIENCE)
    }

    /// Interrupts every vCPU, maskable or not.
    pub fn interrupt(&self) {
        self.gate.interrupt();
        self.kick();
    }

    /// Ends the vCPUs, and waits until they have.
    fn stop(&self) {
        self.gate.stop();
        self.kick();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // A panic of the thread ends the process.
            let _ = thread.join();
        }
    }

    /// Makes the vCPUs leave the guest and look at their orders.
    fn kick(&self) {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.iter() {
            // One is enough: the handler makes KVM return even if the thread
            // is only about to enter the guest.
            let _ = thread.kill(vcpu::kick_signal());
        }
    }
}
