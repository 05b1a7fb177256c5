//! Running a machine to its end, and cleaning up behind it.

use std::cell::RefCell;
use std::os::unix::net::UnixListener;
use std::os::unix::thread::JoinHandleExt;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::build::{VmEvent, build, duplicate};
use super::control::Commander;
use super::event_loop::{ConsolePump, Control, EventLoop, VirtioWorker};
use super::pidfile::PidFile;
use super::resources::Resources;
use super::signals::Signals;
use vmm_sys_util::timerfd::TimerFd;

use crate::config::MachineConfig;
use crate::console::Console;
use crate::control::{Folder, Server};
use crate::failure::{Failure, OrFail};
use crate::kvm::gate::Gate;
use crate::kvm::vcpu::{self, Buses, ExitCounters, Vcpu};
use crate::timing::Timeline;
use crate::unix_socket::Name;

/// Enough for what a vCPU's thread calls.
const VCPU_STACK: usize = 256 << 10;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// All there is to say about a machine that ended.
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

/// Builds a machine and runs it to its end.
pub fn run(config: &MachineConfig, mut timeline: Timeline) -> Result<Ending, Failure> {
    // Blocked from here on, a signal waits for the event loop.
    let log = config.log.start();
    let signals = Signals::new(config.ignores_signals).or_internal("blocking signals")?;
    vcpu::install_kick_handler().or_internal("installing a signal handler")?;
    let resources = Resources::open(config)?;
    let vsock = resources.vsock.as_ref().map(UnixListener::try_clone);
    let vsock = vsock.transpose().or_host("duplicating a descriptor")?;
    let machine = build(config, resources, &mut timeline)?;

    // All that can be refused has been; now the host is changed.
    log.open_file(&config.log)?;
    let (listener, socket) = Folder::locate().listen(&config.name)?;
    let _pidfile = config.pidfile.as_deref().map(PidFile::create).transpose()?;
    let _vsock = match (&vsock, &config.vsock) {
        (Some(socket), Some(vsock)) => Some(Name::give(socket, &vsock.path, &vsock.flag())?),
        _ => None,
    };
    let resized = machine.connections.first();
    let resized = resized.map(|console| duplicate(&console.attention));
    let mut consoles = Vec::new();
    for connection in machine.connections {
        let console = Rc::new(RefCell::new(Console::open(&connection)?));
        consoles.push((console, connection.attention));
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

    let asks = machine
        .notifier
        .try_clone()
        .or_host("duplicating an event descriptor")?;
    let notifier = Arc::new(machine.notifier);
    let vcpus = Arc::new(VcpuControl::start(
        machine.vcpus,
        machine.buses,
        machine.gate,
        move |end| {
            notifier.send(VmEvent::Vcpu(end));
        },
    )?);
    let commander = Commander::new(
        config,
        vcpus.clone(),
        machine.slots.clone(),
        machine.balloon,
        machine.platform.clone(),
    );
    let commander = Rc::new(RefCell::new(commander.or_host("creating a timer")?));
    events.add(Control {
        wake: machine.wake,
        events: machine.events,
        signals,
        panicked: false,
        grace: TimerFd::new().or_host("creating a timer")?,
        resized: resized.transpose()?,
        commander: commander.clone(),
        learnt: learnt.clone(),
    });
    let server = Server::start(listener, socket, move |ask| asks.send(VmEvent::Ask(ask)))
        .or_host("starting the control thread")?;
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
    commander
        .borrow_mut()
        .tell("ended", Some(outcome.name().to_owned()));
    drop((commander, machine.vm));
    drop(machine.helpers);
    server.farewell();

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
        tell: impl Fn(vcpu::VcpuEnd) + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let (buses, tell) = (Arc::new(buses), Arc::new(tell));
        let mut threads = Vec::new();
        let exits = vcpus.iter().map(Vcpu::exits).collect();
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let (its_gate, buses, tell) = (gate.clone(), buses.clone(), tell.clone());
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(VCPU_STACK)
                .spawn(move || tell(vcpu.run(&buses, &its_gate)));
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
            // SAFETY: the thread was not joined, so its handle is valid;
            // the signal's handler is installed.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), vcpu::kick_signal()) };
        }
    }
}
