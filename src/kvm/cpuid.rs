//! What CPUID tells the guest: what KVM supports, with this VM's topology and
//! clock (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const PERFORMANCE: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const CLOCK: u32 = 0x15;
const TOPOLOGY_V2: u32 = 0x1f;
const HYPERVISOR: u32 = 0x4000_0000;
const HYPERVISOR_CLOCK: u32 = 0x4000_0010;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_CAPACITY: u32 = 0x8000_0008;
const AMD_NESTED: u32 = 0x8000_000a;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_PERFORMANCE: u32 = 0x8000_0022;
const EXTENDED: u32 = 0x8000_0000;

// Leaf 1.
const ECX_VMX: u32 = 1 << 5;
const ECX_SMX: u32 = 1 << 6;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const CLFLUSH_LINE: u32 = 8 << 8; // 64 bytes, in units of 8
// Leaf 0x8000_0001.
const ECX_CMP_LEGACY: u32 = 1 << 1;
const ECX_SVM: u32 = 1 << 2;
const ECX_SKINIT: u32 = 1 << 12;
const ECX_PERF_CORE: u32 = 1 << 23;
const ECX_PERF_NB: u32 = 1 << 24;
const ECX_PERF_LLC: u32 = 1 << 28;

const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// The frequency of the local APICs' timers in KVM.
const APIC_KHZ: u32 = 1_000_000;

/// What a vCPU's CPUID depends on.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// This vCPU's local APIC identifier.
    pub apic_id: u8,
    /// How many vCPUs: each a core, all in one package.
    pub cpus: u8,
    /// The frequency of the time stamp counter, where KVM tells it.
    pub tsc_khz: Option<u32>,
    /// KVM's local APICs have the TSC-deadline mode.
    pub tsc_deadline: bool,
    /// It may run VMs itself.
    pub nested: bool,
}

impl Topology {
    /// How many bits of the APIC identifier number the cores.
    fn core_bits(self) -> u32 {
        u32::from(self.cpus).next_power_of_two().trailing_zeros()
    }
}

/// Whether KVM can let a guest run VMs itself.
pub fn may_nest(supported: &[kvm_cpuid_entry2]) -> bool {
    supported.iter().any(|leaf| match leaf.function {
        FEATURES => leaf.ecx & ECX_VMX != 0,
        AMD_FEATURES => leaf.ecx & ECX_SVM != 0,
        _ => false,
    })
}

/// Takes from a leaf what tells of running VMs: that is the part of KVM with the most holes.
fn clear_nesting(leaf: &mut kvm_cpuid_entry2) {
    match leaf.function {
        FEATURES => leaf.ecx &= !(ECX_VMX | ECX_SMX),
        AMD_FEATURES => leaf.ecx &= !(ECX_SVM | ECX_SKINIT),
        AMD_NESTED => clear(leaf),
        _ => {}
    }
}

/// The CPUID of one vCPU, from what KVM supports.
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], topology: Topology) -> Vec<kvm_cpuid_entry2> {
    let cpus = u32::from(topology.cpus);
    let apic_id = u32::from(topology.apic_id);
    let intel = vendor(supported) == *b"GenuineIntel";
    let mut leaves: Vec<_> = supported
        .iter()
        .filter(|leaf| !matches!(leaf.function, TOPOLOGY | TOPOLOGY_V2 | HYPERVISOR_CLOCK))
        .copied()
        .collect();
    for leaf in &mut leaves {
        if !topology.nested {
            clear_nesting(leaf);
        }
        match leaf.function {
            FEATURES => {
                leaf.ebx = leaf.ebx & 0xff | CLFLUSH_LINE | cpus << 16 | apic_id << 24;
                leaf.ecx |= ECX_HYPERVISOR;
                set(&mut leaf.ecx, ECX_TSC_DEADLINE, topology.tsc_deadline);
                set(&mut leaf.edx, EDX_HTT, cpus > 1);
            }
            // Type 0 ends the list. Levels 1 and 2 are each core's own.
            CACHES if leaf.eax & 0x1f != 0 => {
                let sharing = if leaf.eax >> 5 & 0b111 >= 3 {
                    cpus - 1
                } else {
                    0
                };
                leaf.eax = leaf.eax & 0x3fff | sharing << 14 | (cpus - 1).min(63) << 26;
            }
            // No virtual performance counters: they cost, and leak.
            PERFORMANCE | AMD_PERFORMANCE => clear(leaf),
            CLOCK => clear(leaf),
            HYPERVISOR => leaf.eax = leaf.eax.max(HYPERVISOR_CLOCK),
            AMD_FEATURES if !intel => {
                set(&mut leaf.ecx, ECX_CMP_LEGACY, cpus > 1);
                leaf.ecx &= !(ECX_PERF_CORE | ECX_PERF_NB | ECX_PERF_LLC);
            }
            AMD_CAPACITY if !intel => leaf.ecx = topology.core_bits() << 12 | (cpus - 1),
            AMD_TOPOLOGY if !intel => {
                leaf.eax = apic_id;
                leaf.ebx = apic_id; // the core, of one thread
                leaf.ecx = 0; // the node, of one in the package
            }
            _ => {}
        }
    }
    let basic = maximum(supported, 0);
    for function in [TOPOLOGY, TOPOLOGY_V2] {
        if function <= basic {
            leaves.extend(topology_leaves(function, topology));
        }
    }
    if let Some(khz) = topology.tsc_khz {
        leaves.push(kvm_cpuid_entry2 {
            function: HYPERVISOR_CLOCK,
            eax: khz,
            ebx: APIC_KHZ,
            ..Default::default()
        });
    }
    leaves.sort_by_key(|leaf| (leaf.function, leaf.index));
    leaves
}

/// Thread, core, end: each level says how many bits of the x2APIC identifier
/// lie below the next, and how many logical processors it has.
fn topology_leaves(function: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, kind: u32, bits: u32, count: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: bits,
        ebx: count,
        ecx: kind << 8 | index,
        edx: topology.apic_id.into(),
        ..Default::default()
    };
    [
        level(0, LEVEL_SMT, 0, 1),
        level(1, LEVEL_CORE, topology.core_bits(), topology.cpus.into()),
        level(2, 0, 0, 0),
    ]
}

/// The largest leaf of a range, which its first one tells.
fn maximum(leaves: &[kvm_cpuid_entry2], range: u32) -> u32 {
    leaves
        .iter()
        .find(|leaf| leaf.function == range)
        .map_or(0, |leaf| leaf.eax)
}

fn vendor(leaves: &[kvm_cpuid_entry2]) -> [u8; 12] {
    let mut vendor = [0; 12];
    if let Some(leaf) = leaves.iter().find(|leaf| leaf.function == 0) {
        for (part, register) in vendor
            .chunks_exact_mut(4)
            .zip([leaf.ebx, leaf.edx, leaf.ecx])
        {
            part.copy_from_slice(&register.to_le_bytes());
        }
    }
    vendor
}

/// How many bits of physical address the CPU has.
pub fn physical_bits(leaves: &CpuId) -> u32 {
    let leaves = leaves.as_slice();
    if maximum(leaves, EXTENDED) < AMD_CAPACITY {
        return 36;
    }
    leaves
        .iter()
        .find(|leaf| leaf.function == AMD_CAPACITY)
        .map_or(36, |leaf| leaf.eax & 0xff)
}

fn set(register: &mut u32, bits: u32, on: bool) {
    *register = if on {
        *register | bits
    } else {
        *register & !bits
    };
}

fn clear(leaf: &mut kvm_cpuid_entry2) {
    (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut all = leaves
            .iter()
            .filter(|leaf| (leaf.function, leaf.index) == (function, index));
        let found = *all.next().unwrap();
        assert!(all.next().is_none(), "leaf {function:#x} is there twice");
        found
    }

    fn topology(apic_id: u8, cpus: u8) -> Topology {
        Topology {
            apic_id,
            cpus,
            tsc_khz: Some(2_500_000),
            tsc_deadline: true,
            nested: false,
        }
    }

    #[test]
    fn each_vcpu_finds_itself_in_one_package() {
        let supported = [
            leaf(0, 0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69), // GenuineIntel
            leaf(1, 0, 0xff00_0042, 0, 0),
            leaf(0xb, 0, 7, 7, 7),
        ];
        let leaves = for_vcpu(&supported, topology(5, 6));
        let features = find(&leaves, 1, 0);
        assert_eq!(features.ebx, 5 << 24 | 6 << 16 | 8 << 8 | 0x42);
        assert_eq!(features.ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE);
        assert_eq!(features.edx, EDX_HTT);
        for function in [TOPOLOGY, TOPOLOGY_V2] {
            let core = find(&leaves, function, 1);
            assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
            assert_eq!(find(&leaves, function, 0).ecx, 0x100);
            assert_eq!(find(&leaves, function, 2).ebx, 0);
        }
        assert_eq!(find(&leaves, HYPERVISOR_CLOCK, 0).eax, 2_500_000);
    }

    #[test]
    fn amd_leaves_count_cores() {
        let supported = [
            leaf(0, 0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65), // AuthenticAMD
            leaf(1, 0, 0, 0, EDX_HTT),
            leaf(AMD_FEATURES, 0, 0, ECX_PERF_CORE, 0),
            leaf(AMD_CAPACITY, 0x3028, 0, 0, 0),
            leaf(AMD_TOPOLOGY, 0, 0, 0, 0),
        ];
        let leaves = for_vcpu(&supported, topology(3, 8));
        assert_eq!(find(&leaves, AMD_FEATURES, 0).ecx, ECX_CMP_LEGACY);
        assert_eq!(find(&leaves, AMD_CAPACITY, 0).ecx, 3 << 12 | 7);
        assert_eq!(find(&leaves, AMD_TOPOLOGY, 0).eax, 3);
        // The vendor's maximum is below the second topology leaf.
        assert!(!leaves.iter().any(|leaf| leaf.function == TOPOLOGY_V2));
        let single = for_vcpu(&supported, topology(0, 1));
        assert_eq!(find(&single, 1, 0).edx & EDX_HTT, 0);
    }

    #[test]
    fn vms_of_its_own_are_offered_only_to_who_asks() {
        let supported = [
            leaf(0, 0xd, 0, 0, 0),
            leaf(FEATURES, 0, 0, ECX_VMX | ECX_SMX | 1, 0),
            leaf(AMD_FEATURES, 0, 0, ECX_SVM | ECX_SKINIT | 1, 0),
            leaf(AMD_NESTED, 1, 8, 0, 0xf),
        ];
        assert!(may_nest(&supported));
        let leaves = for_vcpu(&supported, topology(0, 1));
        assert!(!may_nest(&leaves));
        assert_eq!(find(&leaves, FEATURES, 0).ecx & 0xff, 1);
        assert_eq!(find(&leaves, AMD_FEATURES, 0).ecx, 1);
        let nested = find(&leaves, AMD_NESTED, 0);
        assert_eq!([nested.eax, nested.ebx, nested.ecx, nested.edx], [0; 4]);

        let asked = Topology {
            nested: true,
            ..topology(0, 1)
        };
        let leaves = for_vcpu(&supported, asked);
        assert!(may_nest(&leaves));
        assert_eq!(find(&leaves, AMD_NESTED, 0).edx, 0xf);
    }

    #[test]
    fn there_are_no_performance_counters() {
        let supported = [leaf(0, 0xa, 0, 0, 0), leaf(PERFORMANCE, 7, 7, 7, 7)];
        let counters = find(&for_vcpu(&supported, topology(0, 1)), PERFORMANCE, 0);
        assert_eq!((counters.eax, counters.edx), (0, 0));
    }
}
