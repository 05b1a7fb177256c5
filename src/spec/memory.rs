//! The memory of a specification.

use serde::{Deserialize, Serialize};

/// A machine's memory where the user does not say, in bytes.
const DEFAULT_SIZE: u64 = 512 << 20;

/// The guest's memory, and how the host provides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySpec {
    /// Bytes, a multiple of the page size.
    pub size: u64,
    /// Taken from the host's pool of huge pages of a size.
    pub hugepages: Option<HugePages>,
    /// All of it is touched before the guest starts.
    pub prefault: bool,
    /// It is a memory file that other processes can map.
    pub shared: bool,
}

impl Default for MemorySpec {
    fn default() -> Self {
        MemorySpec {
            size: DEFAULT_SIZE,
            hugepages: None,
            prefault: false,
            shared: false,
        }
    }
}

/// The sizes of huge pages on x86-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// 2 MiB.
    Mib2,
    /// 1 GiB.
    Gib1,
}

impl HugePages {
    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            HugePages::Mib2 => 2 << 20,
            HugePages::Gib1 => 1 << 30,
        }
    }
}

/// Whether a balloon may have a size.
pub fn check_balloon_size(size: u64, memory: u64) -> Result<(), String> {
    match size < memory {
        true => Ok(()),
        false => Err(format!(
            "not smaller than the guest's memory of {}M",
            memory >> 20
        )),
    }
}
