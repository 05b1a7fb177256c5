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
mod error;
mod msrs;
mod registers;
mod scope;
mod tsc;
pub(super) mod vcpu;
pub(super) mod vm;

#[cfg(test)]
mod tests;

pub use error::{StateError, VERSION};
pub use registers::{
    CpuidLeaf, DebugRegisters, DescriptorTable, Events, Exception, GeneralRegisters, Interrupt,
    IoapicState, Msr, Nmi, PicState, PitChannel, PitState, SegmentState, Smi, SystemRegisters, Xcr,
};
pub use scope::StateScope;
pub use tsc::TscAnchor;
pub use vcpu::VcpuState;
pub use vm::{ClockState, VmState};
