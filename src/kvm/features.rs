//! What a host's KVM can give a guest, to be compared with what it could when a snapshot
//! was made.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::Kvm;

use super::error::{KvmError, doing};

const FEATURES: u32 = 0x1;
const TOPOLOGY: u32 = 0xb;
const XSAVE: u32 = 0xd;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

/// What KVM supports, as bytes that are equal where it is equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    /// The leaves of CPUID, without what depends on the CPU that happened to be asked.
    pub cpuid: Vec<u8>,
    /// The registers that KVM saves and restores, and those that tell of features, with
    /// their values.
    pub msrs: Vec<u8>,
}

/// Asks KVM.
pub fn features(kvm: &Kvm) -> Result<Features, KvmError> {
    let leaves = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(doing("get supported CPUID"))?;
    let cpuid = leaves.as_slice().iter().map(without_place).flat_map(bytes);
    let saved = kvm
        .get_msr_index_list()
        .map_err(doing("get the list of MSRs"))?;
    let mut msrs: Vec<u8> = { saved.as_slice().iter() }
        .flat_map(|index| index.to_le_bytes())
        .collect();
    let telling = kvm
        .get_msr_feature_index_list()
        .map_err(doing("get the list of feature MSRs"))?;
    let mut indexes = telling.as_slice();
    // KVM stops at one that it lists and does not tell; it will not tell that again either.
    while let [first, rest @ ..] = indexes {
        let told = values(kvm, indexes);
        msrs.extend(told.iter().flat_map(value_bytes));
        if told.is_empty() {
            msrs.extend(first.to_le_bytes());
        }
        indexes = match told.len() {
            0 => rest,
            count => indexes.get(count..).unwrap_or_default(),
        };
    }
    Ok(Features {
        cpuid: cpuid.collect(),
        msrs,
    })
}

/// The values of registers, up to the first that KVM does not tell.
fn values(kvm: &Kvm, indexes: &[u32]) -> Vec<kvm_msr_entry> {
    let entry = |index: &u32| kvm_msr_entry {
        index: *index,
        ..Default::default()
    };
    let entries: Vec<_> = indexes.iter().map(entry).collect();
    let Ok(mut asked) = Msrs::from_entries(&entries) else {
        return Vec::new();
    };
    let told = kvm.get_msrs(&mut asked).unwrap_or(0);
    asked.as_slice().iter().take(told).copied().collect()
}

fn value_bytes(entry: &kvm_msr_entry) -> impl Iterator<Item = u8> + use<> {
    { entry.index.to_le_bytes().into_iter() }.chain(entry.data.to_le_bytes())
}

/// Clears what says on which CPU the question was asked, or what that one had enabled.
fn without_place(leaf: &kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
    let mut leaf = *leaf;
    match leaf.function {
        // Bits 31 to 24: the local APIC's identifier.
        FEATURES => leaf.ebx &= 0x00ff_ffff,
        TOPOLOGY | TOPOLOGY_V2 => leaf.edx = 0,
        // The size of what is enabled at present; ECX has that of all.
        XSAVE if leaf.index <= 1 => leaf.ebx = 0,
        AMD_TOPOLOGY => (leaf.eax, leaf.ebx, leaf.ecx) = (0, 0, 0),
        _ => {}
    }
    leaf
}

fn bytes(leaf: kvm_cpuid_entry2) -> [u8; 24] {
    let words = [
        leaf.function,
        leaf.index,
        leaf.eax,
        leaf.ebx,
        leaf.ecx,
        leaf.edx,
    ];
    let mut bytes = [0; 24];
    let (places, _) = bytes.as_chunks_mut();
    for (place, word) in places.iter_mut().zip(words) {
        *place = word.to_le_bytes();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_the_same_on_all_cpus_of_a_host() {
        let kvm = Kvm::new().unwrap();
        let first = features(&kvm).unwrap();
        assert!(first.cpuid.len() > 24 && !first.msrs.is_empty());
        for _ in 0..20 {
            std::thread::yield_now();
            let again = std::thread::scope(|scope| {
                let asked = scope.spawn(|| features(&Kvm::new().unwrap()).unwrap());
                asked.join().unwrap()
            });
            assert_eq!(again, first);
        }
    }

    #[test]
    fn where_a_leaf_was_asked_for_does_not_count() {
        let leaf = |function, ebx| kvm_cpuid_entry2 {
            function,
            ebx,
            ..Default::default()
        };
        let one = without_place(&leaf(FEATURES, 0x0100_0800));
        assert_eq!(one, without_place(&leaf(FEATURES, 0x0500_0800)));
        assert_ne!(one, without_place(&leaf(FEATURES, 0x0500_0900)));
        let other = |ebx| bytes(without_place(&leaf(0x7, ebx)));
        assert_ne!(other(1), other(2));
    }
}
