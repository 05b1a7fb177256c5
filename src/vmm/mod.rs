//! The VMM process: it builds the machine and runs it to its end. It is this program executed
//! anew, without environment and with few descriptors, and knows of the host what its
//! supervisor sends it: a guest that takes it over finds nothing of the user's.

mod build;
mod commands;
mod confinement;
mod devices;
mod event_loop;
mod events;
mod platform;
mod request;
mod restore;
mod save;
mod vcpus;

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;

use mayfly_sandbox::{self as sandbox, Keep, Limits, Role, SandboxSetup, ThreadConfinement};
use vmm_sys_util::timerfd::TimerFd;

pub use self::request::{NAME, is_vmm};

use self::build::{Machine, Parts, build};
use self::commands::{CommandHandler, Handles};
use self::confinement::confined;
use self::event_loop::{ConsolePump, Control, EventLoop, VirtioWorker};
use self::events::{VmEvent, duplicate};
use self::request::{Inherited, LINK, Request, Snapshot, unexpected};
use self::restore::{PendingMail, Saved};
use self::save::{Running, Saver};
use self::vcpus::VcpuControl;
use crate::console::{Connection, Console, ConsoleFds};
use crate::failure::{Class, Failure, OrFail};
use crate::kvm::vcpu;
use crate::link::{Ending, FromVmm, Link, Origin, Outcome, ToVmm, VmmFailure};
use crate::logging;
use crate::signals;
use crate::spec::MachineSpec;
use crate::timing::Timeline;
use crate::vsock;

/// The guest's sockets are the most.
const OPEN_FILES: u64 = vsock::OPEN_FILES;
/// How much memory a running machine may still allocate, in bytes.
const MEMORY: u64 = 256 << 20;

/// Builds a machine and runs it to its end, as the supervisor says, and ends the process. The
/// supervisor knows more than its status tells.
pub fn run() -> ! {
    sandbox::exit(serve())
}

fn serve() -> u8 {
    sandbox::end_by_panic();
    // The kernel named it after the file.
    let _ = rustix::thread::set_name(c"mayfly-vmm");
    let inherited = match Inherited::take() {
        Ok(inherited) => inherited,
        Err(error) => {
            eprintln!("mayfly: {NAME} is started by mayfly run and mayfly boot alone: {error}");
            return Class::Config as u8;
        }
    };
    let link = inherited.link.clone();
    let message = live(inherited).map_or_else(FromVmm::from, FromVmm::Ended);
    // Without a supervisor, nobody wants to know.
    u8::from(link.send(&message, &[]).is_err())
}

fn live(inherited: Inherited) -> Result<Ending, VmmFailure> {
    // The guest's sockets, and all else that is open.
    vsock::raise_limit();
    // Signals are the supervisor's.
    signals::leave_to_others().or_internal("blocking signals")?;
    vcpu::install_kick_handler().or_internal("installing a signal handler")?;
    let link = inherited.link.clone();
    let mut request = Request::receive(inherited)?;
    let (saved, saver) = match request.snapshot {
        Snapshot::None => (None, None),
        Snapshot::Save(state, memory) => {
            let saver = Saver::new(state, memory, &request.parts.kvm)?;
            (None, Some(saver))
        }
        Snapshot::Restore(saved) => (Some(saved), None),
    };
    let (machine, mail, origin) = make(&request.spec, request.parts, saved, &mut request.timeline)?;
    link.send(&FromVmm::Built(origin), &[]).or_internal(LINK)?;

    let start = Start::receive(&link, &request.log)?;
    let limits = Limits {
        files: OPEN_FILES,
        // A file that is written to without end has no limit.
        file_size: Some(request.file_size).filter(|_| !start.endless),
        address_space_extra: Some(MEMORY + vcpus::STACK as u64 * u64::from(request.spec.cpus)),
    };
    let mut events = EventLoop::new(request.timeline).or_internal("event loop")?;
    let state = events.state();
    let resized = machine.connections.first();
    let resized = resized.map(|console| duplicate(&console.host_event));
    let consoles = connect(&mut events, machine.connections, start.consoles)?;
    for device in machine.devices.iter() {
        events.add(VirtioWorker::new(device.transport.clone(), state.clone()));
    }

    // Nothing is opened from here on.
    let confinement = close(request.setup, &limits, &link)?;
    let vcpus = {
        let (confinement, notifier) = (confinement.clone(), Arc::new(machine.notifier));
        let role = match saver {
            Some(_) => Role::SavingVcpu,
            None => Role::Vcpu,
        };
        let confine = move || confined(confinement.confine(role));
        let tell = move |end| notifier.send(VmEvent::Vcpu(end));
        VcpuControl::start(machine.vcpus, machine.buses, machine.gate, confine, tell)?
    };
    let vcpus = Arc::new(vcpus);
    let handler = CommandHandler::new(
        &request.spec,
        Handles {
            vcpus: vcpus.clone(),
            devices: machine.devices.clone(),
            balloon: machine.balloon,
            platform: machine.platform.clone(),
            link: link.clone(),
        },
    );
    let handler = Rc::new(RefCell::new(handler.or_host("creating a timer")?));
    events.add(Control {
        wake: machine.wake,
        events: machine.events,
        link: link.clone(),
        panicked: false,
        grace: TimerFd::new().or_host("creating a timer")?,
        resized: resized.transpose()?,
        host: request.host,
        handler: handler.clone(),
        state: state.clone(),
    });
    let role = match saver {
        Some(_) => Role::SavingEventLoop,
        None => Role::EventLoop,
    };
    confinement.confine(role).or_host("seccomp")?;
    link.send(&FromVmm::Running, &[]).or_internal(LINK)?;
    if let Some(mail) = mail {
        mail.deliver(&machine.memory)?;
    }
    vcpus.resume();
    {
        let mut state = state.borrow_mut();
        state.timeline.vcpus_started = state.timeline.now();
    }
    let mut outcome = events.run();
    if let (Outcome::Saved, Some(saver)) = (&outcome, &saver) {
        let machine = Running {
            spec: &request.spec,
            vm: &machine.vm,
            vcpus: &vcpus,
            memory: &machine.memory,
            devices: &machine.devices,
            platform: &machine.platform,
            serial: &machine.serial,
        };
        if let Err(failure) = saver.save(&machine) {
            outcome = Outcome::Internal(format!("saving the machine: {failure}"));
        }
    }

    vcpus.stop();
    for console in &consoles {
        console.borrow_mut().flush();
    }
    // What disks have in flight ends here, before their locks are released.
    drop((events, machine.devices));
    drop((handler, machine.vm));
    let mut state = state.borrow_mut();
    state.timeline.exit = state.timeline.now();
    let console = consoles.first();
    Ok(Ending {
        outcome,
        guest_status: machine.platform.guest_status(),
        last_lines: console.map_or(Vec::new(), |console| console.borrow().last_lines()),
        timeline: state.timeline,
    })
}

/// Makes the machine that was saved go on, with a message for its guest, or one boot.
fn make(
    spec: &MachineSpec,
    parts: Parts,
    saved: Option<Saved>,
    timeline: &mut Timeline,
) -> Result<(Machine, Option<PendingMail>, Origin), VmmFailure> {
    let origin = match saved.map(|saved| restore::resume(spec, &parts.kvm, saved, timeline)) {
        Some(Ok(resumed)) => {
            let (machine, mail) = restore::attach(spec, parts, resumed)?;
            return Ok((machine, Some(mail), Origin::Restored));
        }
        Some(Err(failure)) => Origin::NotRestored {
            why: failure.to_string(),
            unfit: failure.class == Class::Config,
        },
        None => Origin::Boot,
    };
    Ok((build(spec, parts, timeline)?, None, origin))
}

/// What the guest's console and channels have of the host.
struct Start {
    consoles: Vec<ConsoleFds>,
    /// A regular file takes output.
    endless: bool,
}

impl Start {
    /// Waits until the supervisor says that the guest may run, and logs where it says from
    /// then on.
    fn receive(link: &Link, log: &logging::Started) -> Result<Self, VmmFailure> {
        let (message, files) = link.receive_with_files().or_internal(LINK)?;
        let ToVmm::Start {
            log: has_log,
            consoles,
        } = message
        else {
            return Err(unexpected());
        };
        let endless = files.iter().any(|fd| is_regular(fd.as_fd()));
        let mut files = files.into_iter();
        if has_log {
            log.go_on_in(files.next().map(File::from));
        }
        let consoles = consoles.into_iter();
        let consoles = consoles.map(|flags| ConsoleFds::from_parts(flags, &mut files));
        Ok(Start {
            consoles: consoles.collect(),
            endless,
        })
    }
}

fn is_regular(fd: BorrowedFd) -> bool {
    let file = fd.try_clone_to_owned().map(File::from);
    let metadata = file.and_then(|file| file.metadata());
    metadata.is_ok_and(|metadata| metadata.is_file())
}

type SharedConsole = Rc<RefCell<Console>>;

/// Has an event loop move the bytes between the guest's consoles and the host's.
fn connect(
    events: &mut EventLoop,
    connections: Vec<Connection>,
    consoles: Vec<ConsoleFds>,
) -> Result<Vec<SharedConsole>, VmmFailure> {
    let state = events.state();
    let mut all = Vec::new();
    for (connection, fds) in connections.into_iter().zip(consoles) {
        let console = Rc::new(RefCell::new(Console::new(&connection, fds)));
        events.add(ConsolePump {
            console: console.clone(),
            host_event: connection.host_event,
            state: state.clone(),
        });
        all.push(console);
    }
    Ok(all)
}

/// Closes the sandbox, and tells the supervisor how its layers fare.
fn close(
    setup: SandboxSetup,
    limits: &Limits,
    link: &Link,
) -> Result<ThreadConfinement, VmmFailure> {
    let confinement = setup.close(limits, Keep::All).map_err(Failure::from)?;
    confinement.settle();
    let closed = FromVmm::Closed(confinement.report());
    link.send(&closed, &[]).or_internal(LINK)?;
    Ok(confinement)
}
