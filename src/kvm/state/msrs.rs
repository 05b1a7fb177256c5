//! Model-specific registers: which are saved, and in which order they are set.

use std::ops::RangeInclusive;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::error::StateError;
use super::registers::Msr;
use super::scope::StateScope;
use crate::kvm::error::{KvmError, doing};

/// The time stamp counter, which goes on meanwhile: see `tsc.rs`.
pub(super) const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// How many KVM reads and sets at once: fewer than 256 (`MAX_IO_MSRS`).
const AT_ONCE: usize = 128;

/// What KVM may have without listing it.
const UNLISTED: [RangeInclusive<u32>; 7] = [
    0x200..=0x20f,             // MTRRs of variable size
    0x250..=0x26f,             // MTRRs of fixed size
    0x280..=0x29f,             // IA32_MCi_CTL2
    0x2ff..=0x2ff,             // IA32_MTRR_DEF_TYPE
    0x400..=0x47f,             // machine check banks
    0xda0..=0xda0,             // IA32_XSS
    0x4b56_4d00..=0x4b56_4dff, // KVM's own (Linux, virt/kvm/x86/msr.rst)
];

/// Registers that KVM may list and yet not tell, or not set: none is the guest's to change.
const OPTIONAL: [u32; 0] = [];

fn is_unlisted(index: u32) -> bool {
    UNLISTED.iter().any(|range| range.contains(&index))
}

/// Reads registers; those that KVM does not tell are `None`.
fn read(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, Option<u64>)>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    for chunk in indices.chunks(AT_ONCE) {
        let mut rest = chunk;
        while let [first, behind @ ..] = rest {
            let entries: Vec<_> = rest.iter().map(|&index| entry(index, 0)).collect();
            let mut msrs = pack(&entries)?;
            let count = fd.get_msrs(&mut msrs).map_err(doing("reading MSRs"))?;
            let told = msrs.as_slice().iter().take(count);
            values.extend(told.map(|entry| (entry.index, Some(entry.data))));
            // KVM stops at the first that it does not tell.
            rest = match rest.get(count..) {
                Some([refused, behind @ ..]) => {
                    values.push((*refused, None));
                    behind
                }
                Some([]) => &[],
                None => {
                    values.push((*first, None));
                    behind
                }
            };
        }
    }
    Ok(values)
}

/// Sets registers, in order. Those that KVM does not set are given to `refused`.
fn write(
    fd: &VcpuFd,
    registers: &[Msr],
    mut refused: impl FnMut(Msr) -> Result<(), StateError>,
) -> Result<(), StateError> {
    for chunk in registers.chunks(AT_ONCE) {
        let mut rest = chunk;
        while !rest.is_empty() {
            let entries: Vec<_> = rest.iter().copied().map(kvm_msr_entry::from).collect();
            let count = fd
                .set_msrs(&pack(&entries)?)
                .map_err(doing("setting MSRs"))?;
            rest = match rest.get(count..) {
                Some([register, behind @ ..]) => {
                    refused(*register)?;
                    behind
                }
                _ => &[],
            };
        }
    }
    Ok(())
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn pack(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError {
        operation: "there are too many MSRs",
        source: kvm_ioctls::Error::new(libc::E2BIG),
    })
}

/// The value of one register.
pub(super) fn read_one(fd: &VcpuFd, index: u32) -> Result<u64, StateError> {
    match read(fd, &[index])?.first() {
        Some((_, Some(value))) => Ok(*value),
        _ => Err(StateError::ReadMsr(index)),
    }
}

/// Sets one register.
pub(super) fn write_one(fd: &VcpuFd, index: u32, data: u64) -> Result<(), StateError> {
    write(fd, &[Msr { index, data }], |Msr { index, data }| {
        Err(StateError::WriteMsr { index, data })
    })
}

/// All of a vCPU's registers but the time stamp counter, by their number. Those that KVM does
/// not list are there only if they are not 0, as they are at first.
pub(super) fn save(fd: &VcpuFd, scope: &StateScope) -> Result<Vec<Msr>, StateError> {
    let mut registers = Vec::new();
    for (index, value) in read(fd, &scope.msrs)? {
        match value {
            _ if index == IA32_TSC => {}
            Some(data) => registers.push(Msr { index, data }),
            None if OPTIONAL.contains(&index) => log::debug!("KVM does not tell MSR {index:#x}"),
            None => return Err(StateError::ReadMsr(index)),
        }
    }
    let known = scope.unlisted.get().cloned();
    let unlisted = known.unwrap_or_else(|| {
        let all = UNLISTED.into_iter().flatten();
        all.filter(|index| scope.msrs.binary_search(index).is_err())
            .collect()
    });
    let mut there = Vec::new();
    for (index, value) in read(fd, &unlisted)? {
        let Some(data) = value else { continue };
        there.push(index);
        if data != 0 {
            registers.push(Msr { index, data });
        }
    }
    let _ = scope.unlisted.set(there);
    registers.sort_unstable_by_key(|register| register.index);
    Ok(registers)
}

/// Refuses what [`save`] does not make with this KVM.
pub(super) fn check(registers: &[Msr], scope: &StateScope) -> Result<(), StateError> {
    let ascending = |pair: &[Msr]| matches!(pair, [one, next] if one.index < next.index);
    if !registers.windows(2).all(ascending) {
        return Err(StateError::Malformed("its MSRs are not in order"));
    }
    let known = |index| {
        index != IA32_TSC && (scope.msrs.binary_search(&index).is_ok() || is_unlisted(index))
    };
    match registers.iter().find(|register| !known(register.index)) {
        Some(register) => Err(StateError::UnknownMsr(register.index)),
        None => Ok(()),
    }
}

/// Sets the registers of a vCPU that never ran, where they differ. The local APIC and the
/// time stamp counter are set already, for the deadline of the APIC's timer needs both; the
/// counter is ahead of the saved one by this number.
pub(super) fn restore(fd: &VcpuFd, registers: &[Msr], ahead: u64) -> Result<(), StateError> {
    let indices: Vec<_> = registers.iter().map(|register| register.index).collect();
    let fresh = read(fd, &indices)?;
    let differs =
        |(register, (_, fresh)): &(&Msr, (u32, Option<u64>))| *fresh != Some(register.data);
    let mut changed: Vec<_> = registers
        .iter()
        .zip(fresh)
        .filter(differs)
        .map(|(register, _)| *register)
        .collect();
    changed.sort_by_key(|register| register.index == IA32_TSC_DEADLINE);
    if let Some(last) = changed.last_mut()
        && last.index == IA32_TSC_DEADLINE
        && last.data != 0
    {
        // 0 would turn it off.
        last.data = last.data.wrapping_add(ahead).max(1);
    }
    write(fd, &changed, |Msr { index, data }| {
        if OPTIONAL.contains(&index) {
            log::debug!("KVM does not set MSR {index:#x}");
            return Ok(());
        }
        Err(StateError::WriteMsr { index, data })
    })
}
