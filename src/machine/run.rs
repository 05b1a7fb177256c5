//! Running a machine to its end, and cleaning up behind it.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::thread::JoinHandleExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use super::build::{VmEvent, build};
use super::event_loop::{ConsolePump, Control, EventLoop, VirtioWorker};
use super::resources::Resources;
use super::signals::Signals;
use crate::config::MachineConfig;
use crate::console::Console;
use crate::failure::{Failure, OrFail};
use crate::kvm::vcpu::{self, Buses, Vcpu};
use crate::timing::Timeline;

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
    /// A signal ended it.
    Signal(i32),
    /// The guest cannot go on.
    Crash(String),
    /// mayfly cannot go on.
    Internal(String),
}

/// All there is to say about a machine that ended.
pub struct Ending {
    /// How.
    pub outcome: Outcome,
    /// What the guest's init said of its work.
    pub guest_status: Option<u8>,
    /// When.
    pub timeline: Timeline,
}

/// Builds a machine and runs it to its end.
pub fn run(config: &MachineConfig, mut timeline: Timeline) -> Result<Ending, Failure> {
    // Blocked from here on, a signal waits for the event loop.
    let signals = Signals::new().or_internal("blocking signals")?;
    vcpu::install_kick_handler().or_internal("installing a signal handler")?;
    let resources = Resources::open(config)?;
    let machine = build(config, resources, &mut timeline)?;

    // All that can be refused has been; now the host is changed.
    let _pidfile = config.pidfile.as_deref().map(PidFile::create).transpose()?;
    let console = Rc::new(RefCell::new(Console::open(&config.console)?));

    let mut events = EventLoop::new(timeline).or_internal("event loop")?;
    let learnt = events.learnt();
    events.add(Control {
        wake: machine.wake,
        events: machine.events,
        signals,
        learnt: learnt.clone(),
    });
    events.add(ConsolePump {
        console: console.clone(),
        serial: machine.serial.clone(),
        attention: machine.serial_attention,
        learnt: learnt.clone(),
    });

    for slot in &machine.slots {
        events.add(VirtioWorker::new(slot.transport.clone(), learnt.clone()));
    }

    let notifier = Arc::new(machine.notifier);
    let threads = VcpuThreads::start(machine.vcpus, machine.buses, move |end| {
        notifier.send(VmEvent::Vcpu(end));
    })?;
    {
        let mut learnt = learnt.borrow_mut();
        learnt.timeline.vcpus_started = learnt.timeline.now();
    }
    let outcome = events.run();
    threads.stop();
    console.borrow_mut().flush(&machine.serial);
    // What disks have in flight ends here, before their locks are released.
    drop((events, machine.slots, machine.vm));

    let mut learnt = learnt.borrow_mut();
    learnt.timeline.exit = learnt.timeline.now();
    Ok(Ending {
        outcome,
        guest_status: u8::try_from(machine.guest_status.load(Ordering::Relaxed)).ok(),
        timeline: learnt.timeline,
    })
}

/// The threads of a machine's vCPUs; they end with this.
struct VcpuThreads {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl VcpuThreads {
    fn start(
        vcpus: Vec<Vcpu>,
        buses: Buses,
        tell: impl Fn(vcpu::VcpuEnd) + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let stop = Arc::new(AtomicBool::new(false));
        let (buses, tell) = (Arc::new(buses), Arc::new(tell));
        let mut started = VcpuThreads {
            stop: stop.clone(),
            threads: Vec::new(),
        };
        // Nobody runs before all are there: the first one looks for the rest
        // only later, but a failure must find none running.
        let gate = Arc::new(std::sync::RwLock::new(()));
        let closed = gate.write();
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let (stop, buses, tell, gate) =
                (stop.clone(), buses.clone(), tell.clone(), gate.clone());
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(VCPU_STACK)
                .spawn(move || {
                    drop(gate.read());
                    tell(vcpu.run(&buses, &stop));
                });
            match thread {
                Ok(thread) => started.threads.push(thread),
                Err(error) => {
                    started.stop.store(true, Ordering::Release);
                    drop(closed);
                    started.stop();
                    return Err(error).or_host("starting a vCPU's thread");
                }
            }
        }
        drop(closed);
        Ok(started)
    }

    /// Makes every vCPU leave the guest, and waits until they have.
    fn stop(self) {
        self.stop.store(true, Ordering::Release);
        for thread in &self.threads {
            // One is enough: the handler makes KVM return even if the thread
            // is only about to enter the guest.
            // SAFETY: the thread was not joined, so its handle is valid;
            // the signal's handler is installed.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), vcpu::kick_signal()) };
        }
        for thread in self.threads {
            // A panic of the thread ends the process.
            let _ = thread.join();
        }
    }
}

/// A file with this process's id, removed at the end.
struct PidFile {
    path: PathBuf,
    _lock: File,
}

impl PidFile {
    fn create(path: &Path) -> Result<Self, Failure> {
        let flag = format!("--pidfile {}", path.display());
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .or_host(&flag)?;
        // SAFETY: an open descriptor.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            return Err(Failure::host(format!(
                "{flag}: another VM that runs uses it; choose another name"
            )));
        }
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .or_host(&flag)?;
        Ok(PidFile {
            path: path.to_owned(),
            _lock: file,
        })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
