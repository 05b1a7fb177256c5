//! What can be seen of the host from where a command runs: the probe of a comparison says
//! it, as JSON.

use serde::{Deserialize, Serialize};

/// What isolation leaves visible of the host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Facts {
    /// `uname -r`
    pub kernel: String,
    /// Differs from boot to boot of any kernel; empty if it cannot be seen.
    #[serde(default)]
    pub boot_id: String,
    /// Namespaces' kinds, and what the kernel calls them.
    pub namespaces: Vec<(String, String)>,
    /// The effective ones, a bit each.
    pub capabilities: u64,
    /// seccomp's mode.
    pub seccomp: u32,
    /// Paths of device nodes.
    pub devices: Vec<String>,
    /// All there is, in KiB.
    pub memory_kib: u64,
    /// The number of CPUs.
    pub cpus: u32,
    /// The kernel's.
    pub command_line: String,
    /// The number of loaded kernel modules.
    pub modules: u32,
    /// The number of visible processes.
    pub processes: u32,
    /// How many kinds of system calls no filter refuses.
    pub syscalls: Option<u32>,
}
