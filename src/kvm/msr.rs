//! Model-specific registers at a vCPU's start.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1 << 0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

const VALUES: [(u32, u64); 2] = [
    (IA32_MISC_ENABLE, FAST_STRINGS),
    // What firmware does: all memory is write-back.
    (IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
];

/// Sets what the host's KVM lets be set: some refuse registers that they list,
/// and a guest gets along without each of these.
pub fn set_boot_msrs(vcpu: &VcpuFd) {
    for (index, data) in VALUES {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let set = Msrs::from_entries(&[entry]).map(|msrs| vcpu.set_msrs(&msrs));
        if !matches!(set, Ok(Ok(1))) {
            log::debug!("KVM does not set MSR {index:#x}");
        }
    }
}
