//! A vCPU's state, and the order in which KVM tells and takes its parts.

#![allow(
    unsafe_code,
    reason = "KVM does not know how large a state's buffer is"
)]

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_SIPI_RECEIVED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Xsave, kvm_lapic_state,
    kvm_mp_state, kvm_nested_state, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::error::{StateError, VERSION, check_version};
use super::registers::{
    CpuidLeaf, DebugRegisters, Events, GeneralRegisters, Msr, SystemRegisters, Xcr,
};
use super::scope::StateScope;
use super::tsc::{self, TscAnchor, TscState};
use super::{cpuid, msrs};
use crate::kvm::error::{KvmError, doing};

/// How long the registers of a local APIC are (`KVM_APIC_REG_SIZE`).
const LAPIC_SIZE: usize = 1024;
/// How long `KVM_GET_XSAVE` is, and at least each state of `KVM_GET_XSAVE2`.
const XSAVE_SIZE: usize = size_of::<kvm_xsave>();
const XCRS_MAX: usize = 16;
const EVENT_FLAGS: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING
    | KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | KVM_VCPUEVENT_VALID_SHADOW
    | KVM_VCPUEVENT_VALID_SMM
    | KVM_VCPUEVENT_VALID_PAYLOAD
    | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;

/// All that KVM holds of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// [`VERSION`], when it was written.
    pub version: u16,
    /// What the guest reads by CPUID.
    pub cpuid: Vec<CpuidLeaf>,
    /// Whether it runs, halts, or waits to be started (`KVM_MP_STATE_*`).
    pub mp_state: u32,
    /// The general-purpose registers.
    pub registers: GeneralRegisters,
    /// Segments and control registers.
    pub system: SystemRegisters,
    /// The extended control registers.
    pub xcrs: Vec<Xcr>,
    /// The registers of the FPU and of vectors, in the form of the instruction `XSAVE`
    /// (Intel SDM volume 1, 13.4), without the zeroes at its end.
    pub xsave: Vec<u8>,
    /// The debug registers.
    pub debug: DebugRegisters,
    /// The registers of the local APIC (Intel SDM volume 3, table 11-1): 1,024 bytes.
    pub lapic: Vec<u8>,
    /// The model-specific registers, by their number, without the time stamp counter.
    pub msrs: Vec<Msr>,
    /// The time stamp counter.
    pub tsc: TscState,
    /// What is on its way to the vCPU.
    pub events: Events,
}

/// Reads the state of a vCPU at rest.
pub(crate) fn save(fd: &VcpuFd, scope: &StateScope) -> Result<VcpuState, StateError> {
    refuse_nested(fd, scope)?;
    // First of all: KVM lets the vCPU take a start that is pending.
    let mp_state = fd
        .get_mp_state()
        .map_err(doing("reading a vCPU's activity"))?;
    let cpuid = offered(fd)?;
    let registers = fd.get_regs().map_err(doing("reading registers"))?;
    let system = fd.get_sregs().map_err(doing("reading system registers"))?;
    let xcrs = fd
        .get_xcrs()
        .map_err(doing("reading extended control registers"))?;
    let debug = fd
        .get_debug_regs()
        .map_err(doing("reading debug registers"))?;
    let xsave = save_xsave(fd, scope)?;
    // Before the local APIC: if its timer's deadline passes meanwhile the guest gets one
    // interrupt too many, never one too few.
    let msrs = msrs::save(fd, scope)?;
    let lapic = fd.get_lapic().map_err(doing("reading a local APIC"))?;
    let tsc = tsc::save(fd)?;
    // Last: what was read before may have changed what is pending.
    let events = fd
        .get_vcpu_events()
        .map_err(doing("reading a vCPU's events"))?;
    let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(0);
    Ok(VcpuState {
        version: VERSION,
        cpuid,
        mp_state: mp_state.mp_state,
        registers: registers.into(),
        system: system.into(),
        xcrs: xcrs.xcrs.into_iter().take(count).map(Xcr::from).collect(),
        xsave,
        debug: debug.into(),
        lapic: lapic.regs.map(i8::cast_unsigned).to_vec(),
        msrs,
        tsc,
        events: events.into(),
    })
}

/// Puts a vCPU that never ran into a state.
pub(crate) fn restore(
    fd: &VcpuFd,
    state: &VcpuState,
    scope: &StateScope,
    anchor: TscAnchor,
) -> Result<(), StateError> {
    state.check(scope)?;
    cpuid::check(&state.cpuid, &offered(fd)?)?;
    let lapic = lapic(&state.lapic)?;
    // It holds the local APIC's mode, which must be right before its registers.
    fd.set_sregs(&state.system.into())
        .map_err(doing("setting system registers"))?;
    // KVM forgets pending exceptions here: the events come later.
    fd.set_regs(&state.registers.into())
        .map_err(doing("setting registers"))?;
    fd.set_xcrs(&xcrs(&state.xcrs))
        .map_err(doing("setting extended control registers"))?;
    restore_xsave(fd, &state.xsave, scope)?;
    fd.set_debug_regs(&state.debug.into())
        .map_err(doing("setting debug registers"))?;
    fd.set_lapic(&lapic)
        .map_err(doing("setting a local APIC"))?;
    // The deadline among the MSRs is one of this counter, for that timer.
    let ahead = tsc::restore(fd, &state.tsc, anchor)?;
    msrs::restore(fd, &state.msrs, ahead)?;
    fd.set_vcpu_events(&state.events.into())
        .map_err(doing("setting a vCPU's events"))?;
    fd.set_mp_state(kvm_mp_state {
        mp_state: state.mp_state,
    })
    .map_err(doing("setting a vCPU's activity"))?;
    // The guest's watchdogs learn that it was away. Refused if it has no such clock.
    let _ = fd.kvmclock_ctrl();
    Ok(())
}

impl VcpuState {
    /// Refuses what KVM would misunderstand, or what [`save`] does not make.
    fn check(&self, scope: &StateScope) -> Result<(), StateError> {
        check_version(self.version)?;
        let malformed = |reason| Err(StateError::Malformed(reason));
        if self.mp_state > KVM_MP_STATE_SIPI_RECEIVED {
            return malformed("its vCPU does what no vCPU of this kind does");
        }
        if self.xcrs.len() > XCRS_MAX {
            return malformed("it has too many extended control registers");
        }
        if self.xsave.len() > scope.xsave.max(XSAVE_SIZE) {
            return malformed("its vectors are larger than this KVM's");
        }
        if self.lapic.len() != LAPIC_SIZE {
            return malformed("its local APIC has another size");
        }
        if self.events.flags & !EVENT_FLAGS != 0 {
            return malformed("its events are of an unknown kind");
        }
        msrs::check(&self.msrs, scope)
    }
}

/// The CPUID that a vCPU has.
fn offered(fd: &VcpuFd) -> Result<Vec<CpuidLeaf>, KvmError> {
    let leaves = fd
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(doing("reading CPUID"))?;
    Ok(leaves
        .as_slice()
        .iter()
        .copied()
        .map(CpuidLeaf::from)
        .collect())
}

/// Refuses a guest that runs VMs itself, or is about to.
fn refuse_nested(fd: &VcpuFd, scope: &StateScope) -> Result<(), StateError> {
    if !scope.nested {
        return Ok(());
    }
    let mut state = KvmNestedStateBuffer::empty();
    match fd.nested_state(&mut state) {
        // The state of a vCPU that could, but does not, is a head alone.
        Ok(None) => Ok(()),
        Ok(Some(size)) if size.get() <= size_of::<kvm_nested_state>() => Ok(()),
        Ok(Some(_)) => Err(StateError::Nested),
        // It cannot.
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        Err(error) => Err(doing("asking for nested VMs")(error).into()),
    }
}

/// A buffer as large as KVM's, zeroed.
fn xsave_buffer(scope: &StateScope) -> Result<Xsave, KvmError> {
    let further = scope.xsave.saturating_sub(XSAVE_SIZE);
    Xsave::new(further.div_ceil(size_of::<u32>())).map_err(|_| KvmError {
        operation: "the state of vectors is too large",
        source: kvm_ioctls::Error::new(libc::E2BIG),
    })
}

fn save_xsave(fd: &VcpuFd, scope: &StateScope) -> Result<Vec<u8>, KvmError> {
    let mut buffer = xsave_buffer(scope)?;
    let reading = doing("reading vectors");
    let head = if scope.xsave == 0 {
        fd.get_xsave().map_err(reading)?.region
    } else {
        // SAFETY: it has as many bytes as KVM said, and nothing in this process changes how
        // many those are.
        unsafe { fd.get_xsave2(&mut buffer) }.map_err(reading)?;
        buffer.as_fam_struct_ref().xsave.region
    };
    let words = head.iter().chain(buffer.as_slice());
    let mut bytes: Vec<_> = words.flat_map(|word| word.to_ne_bytes()).collect();
    let used = bytes.iter().rposition(|byte| *byte != 0);
    bytes.truncate(used.map_or(0, |last| last + 1));
    Ok(bytes)
}

fn restore_xsave(fd: &VcpuFd, bytes: &[u8], scope: &StateScope) -> Result<(), KvmError> {
    let mut words = bytes.chunks(size_of::<u32>()).map(|chunk| {
        let mut word = [0; size_of::<u32>()];
        word.iter_mut()
            .zip(chunk)
            .for_each(|(to, from)| *to = *from);
        u32::from_ne_bytes(word)
    });
    let mut buffer = xsave_buffer(scope)?;
    // SAFETY: the length of the array behind it stays as it is.
    let head = unsafe { buffer.as_mut_fam_struct() };
    head.xsave
        .region
        .iter_mut()
        .zip(&mut words)
        .for_each(|(to, from)| *to = from);
    buffer
        .as_mut_slice()
        .iter_mut()
        .zip(words)
        .for_each(|(to, from)| *to = from);
    // SAFETY: it has as many bytes as KVM said, and nothing in this process changes how many
    // those are.
    unsafe { fd.set_xsave2(&buffer) }.map_err(doing("setting vectors"))
}

fn xcrs(registers: &[Xcr]) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs::default();
    for (to, from) in xcrs.xcrs.iter_mut().zip(registers) {
        *to = kvm_xcr::from(*from);
        xcrs.nr_xcrs += 1;
    }
    xcrs
}

fn lapic(bytes: &[u8]) -> Result<kvm_lapic_state, StateError> {
    let regs: [u8; LAPIC_SIZE] = bytes
        .try_into()
        .map_err(|_| StateError::Malformed("its local APIC has another size"))?;
    Ok(kvm_lapic_state {
        regs: regs.map(u8::cast_signed),
    })
}
