//! What this host's KVM has of a vCPU's state.

use std::sync::OnceLock;

use kvm_ioctls::{Cap, Kvm};

use crate::kvm::error::{KvmError, doing};

/// Hyper-V's registers: a guest whose CPUID does not offer Hyper-V has none, and asking for
/// them makes KVM set Hyper-V up.
const HYPERV: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// The registers and sizes of a vCPU's state with this host's KVM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateScope {
    /// The MSRs that KVM lists.
    pub(super) msrs: Vec<u32>,
    /// Those that it has besides, once a vCPU was asked: most of a few hundred are refused, one
    /// by one.
    pub(super) unlisted: OnceLock<Vec<u32>>,
    /// How many bytes `KVM_GET_XSAVE2` yields, or 0 if KVM has only `KVM_GET_XSAVE`.
    pub(super) xsave: usize,
    /// KVM tells the state of a guest that runs VMs itself.
    pub(super) nested: bool,
}

impl StateScope {
    /// Asks KVM.
    pub fn of(kvm: &Kvm) -> Result<Self, KvmError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(doing("listing the MSRs to save"))?;
        let mut msrs: Vec<_> = list.as_slice().to_vec();
        msrs.retain(|index| !HYPERV.contains(index));
        msrs.sort_unstable();
        msrs.dedup();
        let size = |cap| u32::try_from(kvm.check_extension_int(cap)).unwrap_or(0);
        Ok(StateScope {
            msrs,
            unlisted: OnceLock::new(),
            xsave: usize::try_from(size(Cap::Xsave2)).unwrap_or(0),
            nested: size(Cap::NestedState) > 0,
        })
    }
}
