//! The time stamp counter stands still while a guest is saved, and goes on where it stood.
//! vCPUs whose counters differ (a guest may write to them) go on differing by as much.

#![allow(unsafe_code, reason = "KVM reads and writes a number by its address")]

use std::arch::x86_64::_rdtsc;
use std::ptr;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::error::StateError;
use super::msrs::{self, IA32_TSC};
use crate::kvm::error::doing;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// How far two frequencies may be apart that are one, in millionths: what clocks that NTP
/// corrects stand.
const TOLERANCE_PPM: u64 = 250;

/// How far a counter may be from what it was set to, when it is looked at: some seconds.
const SET_WITHIN: i64 = 1 << 34;

/// A vCPU's time stamp counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TscState {
    /// Its value when it was saved.
    pub value: u64,
    /// What it is ahead of the host's by (`KVM_VCPU_TSC_OFFSET`), from Linux 5.16 on.
    pub offset: Option<u64>,
    /// Its frequency, where KVM tells it.
    pub khz: Option<u32>,
}

/// The moments of saving and of restoring, on the host's time stamp counter. One for all
/// vCPUs of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscAnchor {
    saved: u64,
    now: u64,
}

impl TscAnchor {
    /// From the moment when the VM was saved, on the host's counter
    /// ([`ClockState::host_tsc`](super::ClockState)), to now.
    pub fn new(saved: u64) -> Self {
        TscAnchor {
            saved,
            now: host_tsc(),
        }
    }
}

/// The host's time stamp counter.
pub(super) fn host_tsc() -> u64 {
    // SAFETY: all CPUs with 64 bits have it, and Linux lets processes read it.
    unsafe { _rdtsc() }
}

pub(super) fn save(fd: &VcpuFd) -> Result<TscState, StateError> {
    Ok(TscState {
        value: msrs::read_one(fd, IA32_TSC)?,
        offset: offset(fd),
        khz: fd.get_tsc_khz().ok(),
    })
}

/// Sets the counter. Some backends of KVM cannot: the result is how far ahead of the saved
/// one it is then, or 0.
pub(super) fn restore(fd: &VcpuFd, state: &TscState, anchor: TscAnchor) -> Result<u64, StateError> {
    set(fd, state, anchor)?;
    let ahead = msrs::read_one(fd, IA32_TSC)?.wrapping_sub(state.value);
    match (-SET_WITHIN..SET_WITHIN).contains(&ahead.cast_signed()) {
        true => Ok(0),
        false => Ok(ahead),
    }
}

fn set(fd: &VcpuFd, state: &TscState, anchor: TscAnchor) -> Result<(), StateError> {
    let here = fd.get_tsc_khz().ok();
    let alike = match (state.khz, here) {
        (Some(saved), Some(here)) => is_alike(saved, here),
        _ => true,
    };
    if let (false, Some(saved), Some(here)) = (alike, state.khz, here) {
        fd.set_tsc_khz(saved)
            .map_err(|_| StateError::TscFrequency { saved, here })?;
    }
    match (state.offset, offset(fd)) {
        // A scaled counter's offset is not the one that was saved.
        (Some(saved), Some(_)) if alike => {
            let passed = anchor.now.wrapping_sub(anchor.saved);
            set_offset(fd, saved.wrapping_sub(passed))
        }
        // KVM itself keeps counters equal that are set to similar values at a time.
        _ => msrs::write_one(fd, IA32_TSC, state.value),
    }
}

fn is_alike(one: u32, other: u32) -> bool {
    u64::from(one.abs_diff(other)) * 1_000_000 <= u64::from(one) * TOLERANCE_PPM
}

fn attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value.expose_provenance() as u64,
    }
}

/// The offset, if this KVM has such an attribute.
fn offset(fd: &VcpuFd) -> Option<u64> {
    let mut value = 0;
    let attribute = attribute(&raw mut value);
    // SAFETY: KVM writes 8 bytes, which `value` has, and which lives until it returns.
    match unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attribute) } {
        // SAFETY: a number of ours, which KVM wrote behind the compiler's back.
        0 => Some(unsafe { ptr::read_volatile(&raw const value) }),
        _ => None,
    }
}

fn set_offset(fd: &VcpuFd, mut value: u64) -> Result<(), StateError> {
    let attribute = attribute(&raw mut value);
    // SAFETY: KVM reads 8 bytes, which `value` has, and which lives until it returns.
    match unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(()),
        _ => Err(
            doing("setting the offset of the time stamp counter")(kvm_ioctls::Error::last()).into(),
        ),
    }
}
