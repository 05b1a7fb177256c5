//! Why what KVM holds cannot be saved, or restored.

use crate::kvm::error::KvmError;

/// The version of [`VcpuState`](super::VcpuState) and [`VmState`](super::VmState), and all that is in them.
pub const VERSION: u16 = 1;

/// Why what KVM holds cannot be saved, or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Another version of mayfly wrote it.
    #[error("its version is {0}; this mayfly reads {VERSION}")]
    Version(u16),
    /// It contradicts itself.
    #[error("{0}")]
    Malformed(&'static str),
    /// The vCPU would be another one.
    #[error("the CPU differs: leaf {function:#x}, index {index} of CPUID is another one")]
    Cpu {
        /// The leaf.
        function: u32,
        /// Its index.
        index: u32,
    },
    /// The time stamp counter would have another frequency.
    #[error("the time stamp counter ran at {saved} kHz, here it runs at {here}")]
    TscFrequency {
        /// The frequency when it was saved.
        saved: u32,
        /// This host's.
        here: u32,
    },
    /// This KVM does not save or restore such a register.
    #[error("MSR {0:#x} is none that KVM saves here")]
    UnknownMsr(u32),
    /// KVM refuses to read a register that it lists.
    #[error("KVM does not tell MSR {0:#x}")]
    ReadMsr(u32),
    /// KVM refuses a value that it told.
    #[error("KVM does not set MSR {index:#x} to {data:#x}")]
    WriteMsr {
        /// The register.
        index: u32,
        /// Its value.
        data: u64,
    },
    /// The guest runs VMs of its own.
    #[error("the guest runs VMs itself, whose state cannot be saved")]
    Nested,
}

/// Refuses states of other versions.
pub fn check_version(version: u16) -> Result<(), StateError> {
    match version {
        VERSION => Ok(()),
        other => Err(StateError::Version(other)),
    }
}
