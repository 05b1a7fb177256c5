//! The section of what KVM holds.

use serde::{Deserialize, Serialize};

use super::format::Section;
use crate::kvm::state::{VERSION, VcpuState, VmState};

/// All that KVM holds of a machine, but its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmState {
    /// The VM beside its vCPUs.
    pub vm: VmState,
    /// Each vCPU, by its index.
    pub vcpus: Vec<VcpuState>,
}

impl Section for KvmState {
    const NAME: &'static str = "kvm";
    const VERSION: u16 = VERSION;
}
