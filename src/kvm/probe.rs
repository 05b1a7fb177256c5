//! Can this KVM run Linux? Under some backends guest code that does not know
//! of them is emulated, a thousand times slower than the CPU: Linux never
//! arrives. A flag of the CPU tells the good case, a measurement the rest.

use std::arch::x86_64::__cpuid;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_regs;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress};

use crate::spec::MemorySpec;

use super::memory::guest_memory;
use super::vm::Vm;

const VMX: u32 = 1 << 5; // CPUID 1, ECX
const SVM: u32 = 1 << 2; // CPUID 0x8000_0001, ECX

const CODE: u64 = 0x1000;
/// mov cx, 0xffff; loop to itself; out through a port (real mode).
const PROGRAM: [u8; 8] = [0xb9, 0xff, 0xff, 0xe2, 0xfe, 0xe6, 0x10, 0xf4];
const PORT: u16 = 0x10;
/// A CPU takes a tenth of a millisecond, an emulator 30 ms or more.
const EMULATED: Duration = Duration::from_millis(10);
const TRIES: usize = 3;

/// How KVM runs guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// On the CPU.
    Hardware,
    /// By an emulator, this long for 65,535 iterations of a loop.
    Emulated(Duration),
    /// The measurement itself failed.
    Unknown,
}

/// The CPU says that it has virtualization (AMD SVM or Intel VT-x).
pub fn cpu_flag() -> Option<&'static str> {
    if __cpuid(1).ecx & VMX != 0 {
        return Some("vmx");
    }
    let extended = __cpuid(0x8000_0000).eax;
    (extended >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & SVM != 0).then_some("svm")
}

/// Measures how KVM runs guest code.
pub fn measure(kvm: &Kvm) -> Backend {
    let times = (0..TRIES).map(|_| run_loop(kvm));
    match times.min_by_key(|time| time.unwrap_or(Duration::MAX)) {
        Some(Some(time)) if time < EMULATED => Backend::Hardware,
        Some(Some(time)) => Backend::Emulated(time),
        _ => Backend::Unknown,
    }
}

fn run_loop(kvm: &Kvm) -> Option<Duration> {
    let memory = guest_memory(&MemorySpec {
        size: 0x2000,
        ..Default::default()
    })
    .ok()?;
    memory.write_slice(&PROGRAM, GuestAddress(CODE)).ok()?;
    let mut vm = Vm::new(kvm).ok()?;
    vm.add_memory(&memory);
    vm.set_memory().ok()?;
    let mut vcpu = vm.create_vcpu(0).ok()?;
    let mut sregs = vcpu.get_sregs().ok()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).ok()?;
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        rflags: 2,
        ..Default::default()
    })
    .ok()?;
    let start = Instant::now();
    match vcpu.run() {
        Ok(VcpuExit::IoOut(PORT, _)) => Some(start.elapsed()),
        _ => None,
    }
}
