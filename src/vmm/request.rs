//! What the VMM process inherits, and what it is asked to build.

#![allow(unsafe_code, reason = "descriptors that the supervisor left open")]

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use mayfly_sandbox::SandboxSetup;
use rustix::net::SocketType;
use rustix::net::sockopt::socket_type;

use super::build::Parts;
use super::confinement::ConfinedStart;
use super::devices::DeviceBackends;
use super::restore::Saved;
use crate::failure::{Class, Failure, OrFail};
use crate::kvm::vm;
use crate::link::{Broker, BuildRequest, Link, SnapshotUse, ToVmm, VmmFailure};
use crate::logging;
use crate::net::host::{KnownHost, Updates};
use crate::spec::{MachineSpec, VERSION};
use crate::timing::Timeline;

/// The name of the process, its only argument.
pub const NAME: &str = "mayfly-vmm";
/// What is being done when the link fails.
pub const LINK: &str = "talking to the supervisor";
/// Behind the standard streams: the link …
const LINK_FD: RawFd = 3;
/// … and the lifeline.
const LIFELINE_FD: RawFd = 4;

/// Whether this process was executed to be a VMM.
pub fn is_vmm() -> bool {
    std::env::args_os().next().is_some_and(|name| name == NAME)
}

/// What the VMM process inherits.
pub struct Inherited {
    /// To the supervisor.
    pub link: Arc<Link>,
    /// Hangs up when the supervisor has ended.
    lifeline: OwnedFd,
}

impl Inherited {
    /// Takes it, once. Fails in a process that is no VMM.
    pub fn take() -> io::Result<Self> {
        let take = |fd: RawFd| {
            // SAFETY: numbers.
            if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: it is open, and left for this process by the one that executed it.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        };
        let link = take(LINK_FD)?;
        if socket_type(&link)? != SocketType::SEQPACKET {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Inherited {
            link: Arc::new(Link::from(link)),
            lifeline: take(LIFELINE_FD)?,
        })
    }
}

/// What the VMM process is asked to build, ready to be used.
pub struct Request {
    /// The machine.
    pub spec: MachineSpec,
    /// What it is built from.
    pub parts: Parts,
    /// What is done with a snapshot.
    pub snapshot: Snapshot,
    /// The sandbox that is to be closed.
    pub setup: SandboxSetup,
    /// Hears of changes of the host's networks.
    pub host: Updates,
    /// How large in bytes a file that is written to may become.
    pub file_size: u64,
    /// The log that has begun.
    pub log: logging::Started,
    /// When the start began.
    pub timeline: Timeline,
}

/// What is done with a snapshot, and its files.
pub enum Snapshot {
    /// Nothing.
    None,
    /// The machine is saved to a state file and a memory file.
    Save(File, File),
    /// It goes on as one that was saved.
    Restore(Saved),
}

impl Request {
    /// Receives it: the backends of devices and the host's networks, then the rest.
    pub fn receive(inherited: Inherited) -> Result<Self, VmmFailure> {
        let Inherited { link, lifeline } = inherited;
        let mut backends = DeviceBackends::new();
        let known = KnownHost::default();
        let mut host = Updates::new(vec![known.clone()]);
        let (build, files) = loop {
            let (message, files) = link.receive_with_files().or_internal(LINK)?;
            match message {
                ToVmm::DeviceBackend { device, backend } => {
                    backends.insert(device, (backend, files));
                }
                ToVmm::HostNetworks { part, more } => host.take(part, more),
                ToVmm::Build(build) => break (*build, files),
                _ => return Err(unexpected()),
            }
        };
        let BuildRequest {
            spec,
            initrd,
            snapshot,
            sandbox,
            file_size,
            log,
            started_us,
        } = build;
        if spec.version != VERSION {
            return Err(Failure::new(
                Class::Internal,
                format!("a specification of version {}, not {VERSION}", spec.version),
            )
            .into());
        }
        let mut files = files.into_iter();
        let mut next = || files.next().ok_or_else(unexpected);
        let kvm = vm::inherited(next()?);
        let kernel = next()?.into();
        let initrd = match initrd {
            true => Some(File::from(next()?)),
            false => None,
        };
        let broker = Arc::new(Broker::new(next()?.into()));
        let snapshot = match snapshot {
            SnapshotUse::None => Snapshot::None,
            SnapshotUse::Save => Snapshot::Save(next()?.into(), next()?.into()),
            SnapshotUse::Restore => Snapshot::Restore(Saved {
                state: next()?.into(),
                memory: next()?.into(),
                mail: next()?.into(),
            }),
        };
        let setup = SandboxSetup::resume(sandbox, lifeline).or_host("the sandbox")?;
        let prepare = Arc::new(ConfinedStart(setup.barrier()));
        Ok(Request {
            spec,
            parts: Parts {
                kvm,
                kernel,
                initrd,
                backends,
                broker,
                prepare,
                host: known,
                saves: matches!(snapshot, Snapshot::Save(..)),
            },
            snapshot,
            setup,
            host,
            file_size,
            log: log.start(),
            timeline: Timeline::since(started_us),
        })
    }
}

/// The supervisor said something else than what comes next.
pub fn unexpected() -> VmmFailure {
    Failure::new(
        Class::Internal,
        "the supervisor did not keep to the protocol",
    )
    .into()
}
