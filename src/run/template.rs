//! Making a template: a machine with its agent ready, before any image.
//!
//! It is made by a process of its own, in a VM of its own: nothing of a user's VM is in it,
//! nor of a user's environment.

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use kvm_ioctls::Kvm;
use mayfly_protocol::agent::{HostMessage, PORT};
use mayfly_sandbox::Mode;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::agent::{Agent, AgentError};
use crate::config::{
    ConsoleConfig, DiskConfig, GuestFiles, Host, HostEnd, HostFacts, HostNet, LAYERS,
    MachineConfig, VsockConfig,
};
use crate::failure::{Class, Failure, OrFail};
use crate::helper;
use crate::kvm::accept::AcceptKvm;
use crate::link::Outcome;
use crate::logging::LogConfig;
use crate::net::user::{UserConfig, UserNet};
use crate::signals::StartSignals;
use crate::snapshot::store::{Host as SavedHost, NewTemplate, TemplateKey, Templates};
use crate::spec::{DeviceKind, DeviceSpec, MachineSpec};
use crate::supervisor::{SnapshotFiles, StopHandle, Supervisor};
use crate::timing::Timeline;
use crate::unix_socket;

const WHAT: &str = "making a template";
/// The size of a disk that comes with the restore, in bytes: `guest/src/agent/disks.rs` knows
/// it by that.
const DISK: u64 = 512;
/// The name of the socket for clients of the guest.
const SOCKET: &str = "vsock";
/// The longest request, in bytes.
const REQUEST_MAX: u64 = 1 << 20;
/// How long a template's machine may run.
const TIMEOUT: Duration = Duration::from_secs(300);
/// Others' work comes first.
const NICE: i32 = 10;
/// What the process in the background has of its maker's environment: where templates are,
/// and where programs.
const ENVIRONMENT: [&str; 5] = [
    "HOME",
    "XDG_CACHE_HOME",
    "MAYFLY_CACHE",
    "XDG_RUNTIME_DIR",
    "PATH",
];

/// A template that is to be made.
#[derive(Debug, Serialize, Deserialize)]
pub struct TemplateRequest {
    /// The key that it is to have.
    key: TemplateKey,
    /// The machine, with the names of its devices.
    spec: MachineSpec,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    sandbox: Mode,
    accept_kvm: bool,
}

impl TemplateRequest {
    /// The template for a machine.
    pub fn of(config: &MachineConfig, key: TemplateKey) -> Self {
        let mut spec = config.spec.clone();
        let shape = config.spec.shape();
        for (device, shape) in spec.devices.iter_mut().zip(shape.devices) {
            device.kind = shape.kind;
        }
        TemplateRequest {
            key,
            spec,
            kernel: config.guest.kernel.clone(),
            initrd: config.guest.initrd.clone(),
            sandbox: config.sandbox,
            accept_kvm: config.accept_kvm.accept_kvm,
        }
    }
}

/// The key of the template for a machine on this host.
pub fn key(config: &MachineConfig) -> Result<TemplateKey, Failure> {
    let templates = Templates::open_default()?;
    let mut digests = templates.digests();
    let kernel = digests.of(&config.guest.kernel)?;
    let initrd = config.guest.initrd.as_deref();
    let initrd = initrd.ok_or_else(|| Failure::config("it has no initial RAM disk"))?;
    let agent = digests.of(initrd)?;
    templates.keep_digests(&digests)?;
    let host = SavedHost::this(&Kvm::new().or_host("/dev/kvm")?)?;
    TemplateKey::new(config.spec.shape(), kernel, agent, host)
}

/// Starts a process that makes a template, and leaves it.
pub fn make_in_background(request: &TemplateRequest) -> Result<(), Failure> {
    let text = serde_json::to_vec(request).or_internal(WHAT)?;
    // This program, also if another has taken its place.
    let mut command = Command::new("/proc/self/exe");
    command.args(["template", "make", "--request"]).env_clear();
    for name in ENVIRONMENT {
        command.envs(std::env::var_os(name).map(|value| (name, value)));
    }
    command.current_dir("/").stdin(Stdio::piped());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    helper::leave(&mut command).or_internal(WHAT)?;
    let mut child = command.spawn().or_host(WHAT)?;
    match child.stdin.take() {
        Some(mut input) => input.write_all(&text).or_host(WHAT),
        None => Ok(()),
    }
}

/// Makes the template that a request on standard input is of, unless there is one.
pub fn make_requested(timeline: Timeline) -> Result<(), Failure> {
    let mut text = Vec::new();
    io::stdin()
        .take(REQUEST_MAX)
        .read_to_end(&mut text)
        .or_host("standard input")?;
    let request: TemplateRequest = serde_json::from_slice(&text).or_config("standard input")?;
    let _ = rustix::process::nice(NICE);
    make(request, timeline)
}

/// Makes a template, unless there is one.
fn make(request: TemplateRequest, timeline: Timeline) -> Result<(), Failure> {
    let templates = Templates::open_default()?;
    let Some(new) = templates.make(&request.key)? else {
        return Ok(());
    };
    match save_machine(&new, request, timeline) {
        Ok(()) => new.publish().map(drop),
        Err(failure) => {
            new.fail(&failure.to_string())?;
            Err(failure)
        }
    }
}

/// Boots the machine of a request, and saves it when its agent is ready.
fn save_machine(
    new: &NewTemplate,
    request: TemplateRequest,
    timeline: Timeline,
) -> Result<(), Failure> {
    let signals = StartSignals::take().or_internal("blocking signals")?;
    // One of its own: the other is locked.
    let folder = new.work().join("machine");
    DirBuilder::new()
        .mode(0o700)
        .create(&folder)
        .or_host(WHAT)?;
    let agent_socket = folder.join(format!("{SOCKET}_{PORT}"));
    let (listener, name) = unix_socket::listen(&agent_socket, WHAT)?;
    let mut disks = Vec::new();
    let wanted = request.key.clone();
    let config = config(request, &folder, &mut disks)?;
    let files = SnapshotFiles::Save {
        state: new.state.try_clone().or_host(WHAT)?,
        memory: new.memory.try_clone().or_host(WHAT)?,
    };
    let key = self::key(&config)?;
    // Before there are other threads.
    let supervisor = Supervisor::start(&config, files, timeline, &signals)?;
    let machine = supervisor.stop_handle();
    thread::Builder::new()
        .spawn(move || attend(listener, machine))
        .or_host("starting a thread")?;
    let ending = supervisor.run()?;
    drop((name, disks));
    match ending.outcome {
        // The kernel and the agent are those that it is said to have, at the beginning and at
        // the end.
        Outcome::Saved if key == wanted && self::key(&config)? == wanted => Ok(()),
        Outcome::Saved => Err(Failure::host(format!(
            "{WHAT}: mayfly, the guest's kernel or its initial RAM disk changed meanwhile"
        ))),
        outcome => {
            let lines = ending.last_lines.join("; ");
            let why = format!("{WHAT}: the machine ended: {outcome} {lines}");
            Err(Failure::new(Class::Internal, why))
        }
    }
}

/// Has the agent come to the snapshot point, or ends the machine when that takes too long.
fn attend(listener: UnixListener, machine: StopHandle) {
    let ended = machine.clone();
    let told = thread::Builder::new().spawn(move || {
        thread::sleep(TIMEOUT);
        ended.stop();
    });
    let stream = told.and_then(|_| {
        listener.set_nonblocking(false)?;
        listener.accept()
    });
    let asked = stream
        .map_err(AgentError::from)
        .and_then(|(stream, _)| send_to_point(stream));
    if let Err(error) = asked {
        log::warn!("{WHAT}: {error}");
        machine.stop();
    }
}

/// Sends the agent to its snapshot point, and waits until it has ended the connection: it is
/// the first to do so.
fn send_to_point(stream: UnixStream) -> Result<(), AgentError> {
    stream.set_nonblocking(false)?;
    let mut ours = stream.try_clone()?;
    let agent = Agent::greet(stream)?;
    agent.link().send(&HostMessage::SnapshotPoint)?;
    let mut nothing = [0];
    let _ = ours.read(&mut nothing)?;
    Ok(())
}

/// The machine of a request, with disks that are still to come.
fn config(
    request: TemplateRequest,
    folder: &Path,
    disks: &mut Vec<File>,
) -> Result<MachineConfig, Failure> {
    let host = HostFacts::look_up();
    let mut layers = Vec::new();
    let (mut named, mut nets, mut sockets) = (Vec::new(), Vec::new(), None);
    for DeviceSpec { name, kind } in &request.spec.devices {
        match kind {
            DeviceKind::Block(block) => {
                let file = File::from(
                    memfd_create("disk", MemfdFlags::CLOEXEC)
                        .map_err(io::Error::from)
                        .or_host(WHAT)?,
                );
                file.set_len(DISK).or_host(WHAT)?;
                let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
                disks.push(file);
                if name == LAYERS {
                    layers.push(path);
                    continue;
                }
                let config = DiskConfig::of_volume(path, block.read_only, WHAT.into(), name);
                named.push(Host {
                    device: name.clone(),
                    config,
                });
            }
            DeviceKind::Net(_) => {
                let user = UserConfig::default();
                nets.push(Host {
                    device: name.clone(),
                    config: HostNet {
                        user: Some(UserNet::new(&user, &host.network)),
                        config: user.into(),
                    },
                });
            }
            DeviceKind::Vsock { cid } => {
                sockets = Some(VsockConfig {
                    cid: *cid,
                    path: folder.join(SOCKET),
                });
            }
            _ => {}
        }
    }
    Ok(MachineConfig {
        name: format!("template-{}", std::process::id()),
        guest: GuestFiles::named(&request.kernel, request.initrd.as_deref()),
        spec: request.spec,
        layers,
        disks: named,
        nets,
        folders: Vec::new(),
        vsock: sockets,
        console: ConsoleConfig {
            end: HostEnd::None,
            virtio: false,
        },
        channels: Vec::new(),
        log: LogConfig::default(),
        pidfile: None,
        control: Some(folder.to_owned()),
        sandbox: request.sandbox,
        accept_kvm: AcceptKvm {
            accept_kvm: request.accept_kvm,
        },
        ignores_signals: false,
    })
}
