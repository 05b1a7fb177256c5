//! `--memory`

use std::fs;
use std::str::FromStr;

use mayfly_boot::layout;

use super::keys::Keys;
use super::size::parse_size;

/// The least memory of a VM, in bytes.
pub const MEMORY_MIN: u64 = 32 << 20;
const MEMORY_DEFAULT: u64 = 512 << 20;
const SYNTAX: &str = "512M[,hugepages=2M|1G][,prefault][,shared]";

/// The guest's memory, and how the host provides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryConfig {
    /// Bytes.
    pub size: u64,
    /// Taken from the host's pool of huge pages.
    pub hugepages: Option<HugePages>,
    /// All of it is there before the guest starts.
    pub prefault: bool,
    /// A memory file that other processes can map.
    pub shared: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        MemoryConfig {
            size: MEMORY_DEFAULT,
            hugepages: None,
            prefault: false,
            shared: false,
        }
    }
}

/// The sizes of huge pages on x86-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

    /// Pages of this size that the host has free.
    fn free(self) -> u64 {
        let folder = format!(
            "/sys/kernel/mm/hugepages/hugepages-{}kB/free_hugepages",
            self.bytes() >> 10
        );
        let text = fs::read_to_string(folder).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }
}

impl FromStr for MemoryConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut keys = Keys::parse(text, SYNTAX);
        let size = keys
            .word()
            .ok_or_else(|| format!("not a size; write {SYNTAX}"))?;
        let hugepages = match keys.value("hugepages")?.as_deref() {
            None => None,
            Some("2M") => Some(HugePages::Mib2),
            Some("1G") => Some(HugePages::Gib1),
            Some(other) => {
                return Err(format!("hugepages={other}: they have 2M or 1G"));
            }
        };
        let memory = MemoryConfig {
            size: parse_memory(&size)?,
            hugepages,
            prefault: keys.flag("prefault")?,
            shared: keys.flag("shared")?,
        };
        keys.finish()?;
        memory.check_hugepages()?;
        Ok(memory)
    }
}

impl MemoryConfig {
    fn check_hugepages(&self) -> Result<(), String> {
        let Some(pages) = self.hugepages else {
            return Ok(());
        };
        let size = pages.bytes();
        for (_, len) in layout::ram_regions(self.size) {
            if len % size != 0 {
                return Err(format!(
                    "{}M of it cannot be made of huge pages of {}M; choose a multiple",
                    len >> 20,
                    size >> 20
                ));
            }
        }
        let (want, free) = (self.size / size, pages.free());
        if want > free {
            return Err(format!(
                "needs {want} free huge pages of {0}M, the host has {free}; reserve more: \
                 echo {want} | sudo tee /sys/kernel/mm/hugepages/hugepages-{1}kB/nr_hugepages",
                size >> 20,
                size >> 10
            ));
        }
        Ok(())
    }
}

/// Reads and checks the size; a plain number is MiB.
fn parse_memory(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text, 20)?;
    if bytes < MEMORY_MIN {
        return Err(format!(
            "too little; a VM needs at least {}M",
            MEMORY_MIN >> 20
        ));
    }
    if bytes % layout::PAGE_SIZE != 0 {
        return Err("not a multiple of 4K".into());
    }
    let host = host_memory();
    if bytes > host {
        return Err(format!(
            "more than the {}M of memory and swap that this host has",
            host >> 20
        ));
    }
    Ok(bytes)
}

/// The host's memory and swap in bytes.
fn host_memory() -> u64 {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_has_units_and_bounds() {
        assert_eq!(parse_memory("512M").unwrap(), 512 << 20);
        assert_eq!(parse_memory("64").unwrap(), 64 << 20);
        assert_eq!(parse_memory("1g").unwrap(), 1 << 30);
        assert_eq!(parse_memory("32768K").unwrap(), 32 << 20);
        for (text, reason) in [
            ("0", "too little"),
            ("31M", "too little"),
            ("", "not a size"),
            ("M", "not a size"),
            ("-1", "not a size"),
            ("1.5G", "not a size"),
            ("1X", "unknown unit"),
            ("99999999999999999999G", "too large"),
            ("16777216T", "too large"),
            ("32769K", "multiple of 4K"),
            ("1024T", "more than"),
        ] {
            let message = parse_memory(text).unwrap_err();
            assert!(message.contains(reason), "{text}: {message}");
        }
    }

    #[test]
    fn how_the_host_provides_it() {
        let memory: MemoryConfig = "64M,shared,prefault".parse().unwrap();
        assert!(memory.shared && memory.prefault && memory.hugepages.is_none());
        for (text, reason) in [
            ("64M,hugepages=3M", "2M or 1G"),
            ("64M,hugepages", "no value"),
            ("64M,hugepages=1G", "a multiple"),
            ("65M,hugepages=2M", "a multiple"),
            ("1020G,hugepages=2M", "more than"),
            ("64M,share", "not understood"),
            ("shared=64M", "not a size"),
        ] {
            let message = text.parse::<MemoryConfig>().unwrap_err();
            assert!(message.contains(reason), "{text}: {message}");
        }
    }
}
