//! The start of a VM: its process is executed, the host's files are opened for it, and it
//! builds the machine.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode as FileMode, OFlags, fcntl_setfl, open};
use serde::Serialize;

use super::resources::{OpenedBackend, Resources};
use super::status::StatusBoard;
use super::supervise::{LINK, START_TIMEOUT, Supervisor, has_hung_up, pass_on_lines, too_late};
use super::vmm_process::{STOP_TIMEOUT, StopHandle, VmmProcess};
use crate::config::MachineConfig;
use crate::failure::{Failure, OrFail};
use crate::kvm::{self, vm};
use crate::link::{BuildRequest, FromVmm, Link, Origin, SnapshotUse, ToVmm};
use crate::net::host::{HostNetworks, Watch};
use crate::signals::{Signals, StartSignals};
use crate::timing::Timeline;
use mayfly_sandbox::{
    self as sandbox, Cgroup, Child, Mode, Policy, PreparedSandbox, Program, Share, Status,
};
use mayfly_text::printable;

/// How many bytes of memory a VMM process touches in a second, at the least, where all are
/// touched before the guest runs.
const PREFAULTED_PER_S: u64 = 64 << 20;
/// The name of the VMM process.
const VMM_NAME: &std::ffi::CStr = c"mayfly-vmm";

/// The files of a snapshot that a machine goes on from, or that is made of it.
#[derive(Debug, Default)]
pub enum SnapshotFiles {
    /// There is none: the machine boots.
    #[default]
    None,
    /// It boots, is saved when its guest has come to the snapshot point, and ends.
    Save {
        /// The state file, empty.
        state: File,
        /// The memory file, empty.
        memory: File,
    },
    /// It goes on as one that was saved, or boots if that cannot be.
    Restore {
        /// The state file.
        state: File,
        /// The memory file.
        memory: File,
        /// The message for its guest.
        mail: File,
    },
}

impl SnapshotFiles {
    /// What is to be done, and with which descriptors.
    fn into_parts(self) -> (SnapshotUse, Vec<OwnedFd>) {
        match self {
            SnapshotFiles::None => (SnapshotUse::None, Vec::new()),
            SnapshotFiles::Save { state, memory } => {
                (SnapshotUse::Save, vec![state.into(), memory.into()])
            }
            SnapshotFiles::Restore {
                state,
                memory,
                mail,
            } => {
                let files = vec![state.into(), memory.into(), mail.into()];
                (SnapshotUse::Restore, files)
            }
        }
    }
}

/// A VMM process that was executed, and builds nothing yet.
struct StartedVmm {
    child: Child,
    prepared: PreparedSandbox,
    link: Link,
    /// Ours, and its, for requests to the broker.
    broker: (Link, Link),
    /// What it says on standard error.
    stderr: io::PipeReader,
}

impl StartedVmm {
    /// Executes this program anew. May only be called while this process has one thread.
    fn spawn(mode: Mode) -> io::Result<Self> {
        let executable = open_own_program()?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let (link, its_link) = Link::pair()?;
        let broker = Link::pair()?;
        // A VMM process that asks and does not listen holds up no supervisor.
        set_nonblocking(&broker.0)?;
        let (stderr, its_stderr) = io::pipe()?;
        // Rather than wait for who reads it, the process loses a line.
        set_nonblocking(&its_stderr)?;
        let policy = Policy {
            // Also with a TAP, which the supervisor opens.
            new_net: true,
            mode,
        };
        let descriptors = [
            null.as_fd(),
            null.as_fd(),
            its_stderr.as_fd(),
            its_link.as_fd(),
        ];
        let program = Program {
            executable: executable.as_fd(),
            name: VMM_NAME,
            descriptors: &descriptors,
        };
        let (child, prepared) = sandbox::spawn_program(&policy, &program)?;
        Ok(StartedVmm {
            child,
            prepared,
            link,
            broker,
            stderr,
        })
    }
}

/// This program's file, to be executed; to be read, too, if its owner lets this user.
fn open_own_program() -> io::Result<OwnedFd> {
    let open = |flags| open("/proc/self/exe", flags | OFlags::CLOEXEC, FileMode::empty());
    Ok(open(OFlags::RDONLY).or_else(|_| open(OFlags::PATH))?)
}

pub(super) fn set_nonblocking(new: &impl AsFd) -> io::Result<()> {
    // A new one has no other flags.
    Ok(fcntl_setfl(new, OFlags::NONBLOCK)?)
}

/// How long a VMM process may take to build a machine.
fn build_timeout(config: &MachineConfig) -> Duration {
    let memory = &config.spec.memory;
    let prefaulted = match memory.prefault {
        true => memory.size / PREFAULTED_PER_S,
        false => 0,
    };
    START_TIMEOUT + Duration::from_secs(prefaulted)
}

fn is_filtered(config: &MachineConfig) -> bool {
    config.nets.iter().any(|net| net.config.user.is_some())
}

/// Listens for changes of the host's networks, if a guest's filter has to know of them.
fn watch_networks(config: &MachineConfig) -> Result<Option<Watch>, Failure> {
    let watch = is_filtered(config).then(Watch::open).transpose();
    watch.or_host("--net user: listening for changes of the host's addresses")
}

/// A control group for the VMM process and the helpers, if there is to be a sandbox. Disks
/// may take `in_memory` bytes of memory.
fn make_cgroup(config: &MachineConfig, in_memory: u64) -> Option<Cgroup> {
    let count = |len: usize| u64::try_from(len).unwrap_or(u64::MAX);
    let filtered = config.nets.iter().filter(|net| net.config.user.is_some());
    match config.sandbox {
        Mode::Off => None,
        _ => Some(Cgroup::make(&Share {
            cpus: config.spec.cpus,
            memory: config.spec.memory.size.saturating_add(in_memory),
            nets: count(filtered.count()),
            directories: count(config.folders.len()),
        })),
    }
}

/// Puts the VMM process into its control group, which the host may not have.
fn confine(child: &Child, cgroup: &mut Cgroup, mode: Mode) -> Result<(), Failure> {
    cgroup.add(child.id());
    match (mode, cgroup.status()) {
        (Mode::Require, Status::Absent(why)) => {
            Err(Failure::host(format!("--sandbox=require: cgroup: {why}")))
        }
        _ => Ok(()),
    }
}

/// What the VMM process says of where its machine begins, in words that may be shown: it has
/// read the state file.
fn harmless_origin(origin: Origin) -> Origin {
    match origin {
        Origin::NotRestored { why, unfit } => Origin::NotRestored {
            why: printable::line(&why),
            unfit,
        },
        origin => origin,
    }
}

impl<'a> Supervisor<'a> {
    /// Executes the VMM process, opens what the machine needs, and has the process build it.
    /// May only be called while this process has one thread. Nothing of the host is changed.
    pub fn start(
        config: &'a MachineConfig,
        snapshot: SnapshotFiles,
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
        let networks = watch_networks(config)?;
        // It is executed while files are opened.
        let vmm = match StartedVmm::spawn(config.sandbox) {
            Ok(vmm) => vmm,
            Err(error) => {
                // A host that lacks KVM may lack more, and it is KVM that a user looks for.
                kvm::open(config.accept_kvm)?;
                return Err(error).or_host("starting the VMM process");
            }
        };
        let mut resources =
            Resources::open(config, start, |in_memory| make_cgroup(config, in_memory))?;
        if let Some(cgroup) = &mut resources.cgroup {
            confine(&vmm.child, cgroup, config.sandbox)?;
        }
        let StartedVmm {
            child,
            prepared,
            link,
            broker: (broker, its_broker),
            stderr,
        } = vmm;
        let kvm = vm::duplicate(&resources.kvm).or_host("duplicating a descriptor")?;
        let mut files: Vec<OwnedFd> = vec![kvm, resources.kernel.into()];
        let initrd = resources.initrd.map(OwnedFd::from);
        let (snapshot, snapshot_files) = snapshot.into_parts();
        let memory_file = match snapshot {
            SnapshotUse::Save => config.spec.memory.size,
            SnapshotUse::None | SnapshotUse::Restore => 0,
        };
        let request = BuildRequest {
            spec: config.spec.clone(),
            initrd: initrd.is_some(),
            snapshot,
            sandbox: prepared,
            file_size: resources.file_size.max(memory_file),
            log: config.log.style(),
            started_us: timeline.started_us(),
        };
        files.extend(initrd);
        files.push(its_broker.into());
        files.extend(snapshot_files);

        let exited = child.pidfd().try_clone_to_owned();
        let exited = exited.or_host("duplicating a descriptor")?;
        let pass_on = thread::Builder::new().name("stderr".into());
        let pass_on = pass_on.spawn(move || pass_on_lines(stderr, io::stderr()));
        let board = StatusBoard::default();
        let helpers = resources.helpers.into_iter().map(|(device, helper)| {
            let board = board.clone();
            let running = helper.watch(move |problem| board.add_problem(&problem))?;
            Ok((device, running))
        });
        let helpers = helpers.collect::<io::Result<_>>();
        let mut supervisor = Supervisor {
            config,
            origin: Origin::Boot,
            stop: StopHandle(Arc::new(VmmProcess {
                link,
                child: Mutex::new(child),
                exited,
                stopping: AtomicBool::new(false),
                runs: AtomicBool::new(false),
                stop_timeout: STOP_TIMEOUT,
            })),
            broker,
            vsock: resources.vsock,
            networks,
            helpers: helpers.or_host("starting a thread")?,
            signals,
            log,
            cgroup: resources.cgroup,
            stderr: Some(pass_on.or_host("starting a thread")?),
            locks: resources.locks,
            board,
            timeline,
        };
        supervisor.ask_to_build(start, resources.backends, request, files)?;
        supervisor.origin = supervisor.await_built(start, build_timeout(config))?;
        Ok(supervisor)
    }

    /// Sends the VMM process all that it needs to build the machine.
    fn ask_to_build(
        &self,
        signals: &StartSignals,
        backends: Vec<OpenedBackend>,
        request: BuildRequest,
        files: Vec<OwnedFd>,
    ) -> Result<(), Failure> {
        for OpenedBackend {
            device,
            backend,
            files,
        } in backends
        {
            self.tell(signals, &ToVmm::DeviceBackend { device, backend }, &files)?;
        }
        if is_filtered(self.config) {
            let now = HostNetworks::list().or_host("--net user: listing the host's addresses")?;
            for message in ToVmm::host_networks(&now) {
                self.tell(signals, &message, &[])?;
            }
        }
        self.tell(signals, &ToVmm::Build(Box::new(request)), &files)
    }

    /// Tells a VMM process that builds its machine something, and waits until it takes that.
    fn tell(
        &self,
        signals: &StartSignals,
        message: &impl Serialize,
        files: &[OwnedFd],
    ) -> Result<(), Failure> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            match self.link().try_send_with_files(message, files) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if !signals.wait_for_room(self.link().as_fd(), left)? {
                        return Err(too_late("listen", START_TIMEOUT));
                    }
                }
                Err(error) if has_hung_up(&error) => return Err(self.why_not_built()),
                Err(error) => return Err(error).or_internal(LINK),
            }
        }
    }

    /// Hears whether the machine could be built, and where it begins.
    pub(super) fn await_built(
        &self,
        signals: &StartSignals,
        timeout: Duration,
    ) -> Result<Origin, Failure> {
        if !signals.wait(self.link().as_fd(), timeout)? {
            return Err(too_late("build the VM", timeout));
        }
        match self.link().receive() {
            Ok(Some(FromVmm::Built(origin))) => Ok(harmless_origin(origin)),
            Ok(Some(FromVmm::Failed(failure))) => Err(self.failure(&failure)),
            _ => Err(self.never_ran()),
        }
    }

    /// Why a VMM process that closed its link did not build the machine: what it said last, or
    /// how it ended.
    fn why_not_built(&self) -> Failure {
        // There is something to be read, or the end.
        match self.link().receive() {
            Ok(Some(FromVmm::Failed(failure))) => self.failure(&failure),
            _ => self.never_ran(),
        }
    }
}
