//! What KVM holds of a guest, saved and restored.
//!
//! The states are plain structs of our own. What is read back is as hostile as a guest: it
//! is checked here as far as KVM does not, and it allocates nothing by a number in it.
//!
//! The order of a restore: the guest's memory is given to KVM, the vCPUs are created, each
//! is restored ([`Vcpu::restore`](super::vcpu::Vcpu::restore)), then the VM
//! ([`Vm::restore`](super::vm::Vm::restore)): its I/O APIC sends what is pending to local
//! APICs that are restored already, and some MSRs name guest memory.

mod cpuid;
mod msrs;
mod registers;
mod scope;
mod tsc;
pub(super) mod vcpu;
pub(super) mod vm;

#[cfg(test)]
mod tests;

pub use registers::{
    CpuidLeaf, DebugRegisters, DescriptorTable, Events, Exception, GeneralRegisters, Interrupt,
    IoapicState, Msr, Nmi, PicState, PitChannel, PitState, SegmentState, Smi, SystemRegisters, Xcr,
};
pub use scope::StateScope;
pub use tsc::TscAnchor;
pub use vcpu::VcpuState;
pub use vm::{ClockState, VmState};

use super::KvmError;

/// The version of [`VcpuState`] and [`VmState`], and all that is in them.
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
fn check_version(version: u16) -> Result<(), StateError> {
    match version {
        VERSION => Ok(()),
        other => Err(StateError::Version(other)),
    }
}
