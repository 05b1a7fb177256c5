//! A vCPU is restored as it was, or not at all: its CPUID must be what this host's KVM and
//! this mayfly would give it. So no snapshot turns on what a guest is not to have.

use super::error::StateError;
use super::registers::CpuidLeaf;

const FEATURES: u32 = 0x1;
const ECX_MONITOR: u32 = 1 << 3;
const ECX_OSXSAVE: u32 = 1 << 27;
const EDX_APIC: u32 = 1 << 9;
const EXTENDED_FEATURES: u32 = 0x7;
const ECX_OSPKE: u32 = 1 << 4;
const XSAVE: u32 = 0xd;
/// The frequencies of the clocks, which a host measures anew when it starts: see `tsc.rs`.
const HYPERVISOR_CLOCK: u32 = 0x4000_0010;

/// A leaf without what follows other registers of the guest.
fn settled(leaf: &CpuidLeaf) -> CpuidLeaf {
    let mut leaf = *leaf;
    match (leaf.function, leaf.index) {
        (FEATURES, _) => {
            leaf.ecx &= !(ECX_MONITOR | ECX_OSXSAVE);
            leaf.edx &= !EDX_APIC;
        }
        (EXTENDED_FEATURES, 0) => leaf.ecx &= !ECX_OSPKE,
        // The size of what is enabled.
        (XSAVE, 0 | 1) => leaf.ebx = 0,
        (HYPERVISOR_CLOCK, _) => leaf.eax = 0,
        _ => {}
    }
    leaf
}

/// Whether a vCPU that was saved with one CPUID can go on with another.
pub(super) fn check(saved: &[CpuidLeaf], offered: &[CpuidLeaf]) -> Result<(), StateError> {
    let differs = |leaf: &CpuidLeaf| StateError::Cpu {
        function: leaf.function,
        index: leaf.index,
    };
    for (saved, offered) in saved.iter().zip(offered) {
        if settled(saved) != settled(offered) {
            return Err(differs(saved));
        }
    }
    let common = saved.len().min(offered.len());
    let further = saved.get(common).or_else(|| offered.get(common));
    further.map_or(Ok(()), |leaf| Err(differs(leaf)))
}
