//! A KVM that can run Linux.

use kvm_ioctls::Kvm;

use super::accept::AcceptKvm;
use super::probe::{self, Backend};
use super::vm;
use crate::failure::Failure;

/// Opens a KVM that can run Linux, as far as a probe can tell, or as the user says.
pub fn open(accept: AcceptKvm) -> Result<Kvm, Failure> {
    let kvm = vm::open().map_err(|error| Failure::host(error.to_string()))?;
    if !accept.accept_kvm
        && probe::cpu_flag().is_none()
        && let Backend::Emulated(time) = probe::measure(&kvm)
    {
        return Err(Failure::host(format!(
            "this host's /dev/kvm emulates guest code ({} ms for what a CPU does in 0.1 ms) and \
             cannot run Linux; use a host with VT-x or AMD-V, or scripts/mayfly, which has a \
             software lab; --accept-kvm boots all the same",
            time.as_millis()
        )));
    }
    Ok(kvm)
}
