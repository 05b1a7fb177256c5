//! What a user asks for, each option by itself as it should be.

use std::path::PathBuf;

use super::balloon::BalloonConfig;
use super::console::{ChannelConfig, ConsoleConfig};
use super::disk::DiskConfig;
use super::folder::FolderConfig;
use super::net::NetConfig;
use super::vsock::VsockConfig;
use crate::kvm::accept::AcceptKvm;
use crate::logging::LogConfig;
use crate::spec::{BootProtocol, MemorySpec, WatchdogAction};
use mayfly_sandbox::Mode;

/// The vCPUs of a VM where the user does not say.
pub const CPUS_DEFAULT: u8 = 1;
/// What a user asks for, each option by itself as it should be.
#[derive(Clone, Debug)]
pub struct MachineOptions {
    /// What the VM is called; without it `vm-` and the process's id.
    pub name: Option<String>,
    /// Appended to the default command line.
    pub cmdline: Option<String>,
    /// The command line is that alone.
    pub no_default_cmdline: bool,
    /// How to enter the kernel.
    pub boot_protocol: BootProtocol,
    /// vCPUs.
    pub cpus: u8,
    /// RAM.
    pub memory: MemorySpec,
    /// The file systems of an image's layers, lowest first: one disk, before the others.
    pub layers: Vec<PathBuf>,
    /// Disks, in the order of their names in the guest.
    pub disks: Vec<DiskConfig>,
    /// Network devices, in the order of their names in the guest.
    pub nets: Vec<NetConfig>,
    /// Directories of the host's; they make memory shared.
    pub folders: Vec<FolderConfig>,
    /// Sockets between guest and host.
    pub vsock: Option<VsockConfig>,
    /// A memory balloon, if there is to be one.
    pub balloon: Option<BalloonConfig>,
    /// The console.
    pub console: ConsoleConfig,
    /// Named lines beside it.
    pub channels: Vec<ChannelConfig>,
    /// What a watchdog does, if there is one.
    pub watchdog: Option<WatchdogAction>,
    /// What is logged, and where to.
    pub log: LogConfig,
    /// Where to write the supervisor's process id.
    pub pidfile: Option<PathBuf>,
    /// How the VMM process is surrounded.
    pub sandbox: Mode,
    /// The guest is offered the CPU's means to run VMs.
    pub nested: bool,
    /// Whether a KVM that seems to emulate is used.
    pub accept_kvm: AcceptKvm,
    /// Signals do not end it: whoever runs it takes them.
    pub ignores_signals: bool,
}

impl Default for MachineOptions {
    fn default() -> Self {
        MachineOptions {
            name: None,
            cmdline: None,
            no_default_cmdline: false,
            boot_protocol: BootProtocol::default(),
            cpus: CPUS_DEFAULT,
            memory: MemorySpec::default(),
            layers: Vec::new(),
            disks: Vec::new(),
            nets: Vec::new(),
            folders: Vec::new(),
            vsock: None,
            balloon: None,
            console: ConsoleConfig::default(),
            channels: Vec::new(),
            watchdog: None,
            log: LogConfig::default(),
            pidfile: None,
            sandbox: Mode::default(),
            nested: false,
            accept_kvm: AcceptKvm::default(),
            ignores_signals: false,
        }
    }
}
