//! What of the host a machine's options are checked against and completed by.

use std::fs;
use std::net::IpAddr;

use crate::net::user::HostNetwork;
use crate::spec::HugePages;

/// Facts of the host, looked up once a start, so that all who ask agree.
#[derive(Clone, Debug, Default)]
pub struct HostFacts {
    /// Memory and swap in bytes.
    pub memory: u64,
    /// Free huge pages, of 2 MiB and of 1 GiB.
    pub huge_pages: [u64; 2],
    /// The host's machine ID (machine-id(5)), or nothing.
    pub machine_id: Vec<u8>,
    /// What a user network has of the host's.
    pub network: HostNetwork,
}

impl HostFacts {
    /// Looks them up.
    pub fn look_up() -> Self {
        HostFacts {
            memory: memory(),
            huge_pages: [HugePages::Mib2, HugePages::Gib1].map(free_huge_pages),
            machine_id: fs::read("/etc/machine-id").unwrap_or_default(),
            network: HostNetwork::look_up(),
        }
    }

    /// How many huge pages of a size are free.
    pub fn free_huge_pages(&self, pages: HugePages) -> u64 {
        let [mib2, gib1] = self.huge_pages;
        match pages {
            HugePages::Mib2 => mib2,
            HugePages::Gib1 => gib1,
        }
    }

    /// The MAC address of a network device whose user names none: the same whenever the same
    /// host gives the guest the same network, and hardly ever another's.
    pub fn mac_address(&self, network: &str) -> [u8; 6] {
        /// Locally administered, of one device (IEEE 802).
        const LOCAL: u8 = 0x02;
        let seed = [&self.machine_id[..], network.as_bytes()].concat();
        let [a, b, c, d, e, ..] = fnv_1a(&seed).to_le_bytes();
        [LOCAL, a, b, c, d, e]
    }

    /// The host's resolvers.
    pub fn resolvers(&self) -> &[IpAddr] {
        &self.network.resolvers
    }
}

/// The Fowler-Noll-Vo hash: stable, unlike the standard library's.
fn fnv_1a(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn memory() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| -> Option<u64> {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches(" kB").parse().ok()
    };
    match kib("MemTotal:") {
        Some(memory) => (memory + kib("SwapTotal:").unwrap_or(0)) << 10,
        None => u64::MAX,
    }
}

fn free_huge_pages(pages: HugePages) -> u64 {
    let path = format!(
        "/sys/kernel/mm/hugepages/hugepages-{}kB/free_hugepages",
        pages.bytes() >> 10
    );
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_stable_and_local() {
        let host = HostFacts {
            machine_id: b"0123\n".into(),
            ..HostFacts::default()
        };
        let derived = host.mac_address("tap0");
        assert_eq!(derived, host.mac_address("tap0"));
        assert_ne!(derived, host.mac_address("tap1"));
        assert_ne!(derived, HostFacts::default().mac_address("tap0"));
        assert_eq!(derived[0], 2);
        assert_eq!(fnv_1a(b"a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn this_host_has_memory() {
        assert!(HostFacts::look_up().memory > 1 << 20);
    }
}
