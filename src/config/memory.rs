//! `--memory`

use std::str::FromStr;

use mayfly_boot::layout;

use super::host::HostFacts;
use super::keys::{FromKeys, Keys};
use super::size::parse_size;
use crate::spec::check::MEMORY_MIN;
use crate::spec::{HugePages, MemorySpec};

const SYNTAX: &str = "512M[,hugepages=2M|1G][,prefault][,shared]";

impl FromStr for MemorySpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::from_text(text.as_ref())
    }
}

impl FromKeys for MemorySpec {
    const SYNTAX: &'static str = SYNTAX;
    const WORD: Option<&'static str> = Some("size");

    fn from_keys(mut keys: Keys) -> Result<Self, String> {
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
        let memory = MemorySpec {
            size: parse_size_of_memory(&size)?,
            hugepages,
            prefault: keys.flag("prefault")?,
            shared: keys.flag("shared")?,
        };
        keys.finish()?;
        check_hugepages(&memory)?;
        Ok(memory)
    }
}

/// Checks that a host has enough memory, and enough free huge pages.
pub fn check(memory: &MemorySpec, host: &HostFacts) -> Result<(), String> {
    if memory.size > host.memory {
        return Err(format!(
            "more than the {}M of memory and swap that this host has",
            host.memory >> 20
        ));
    }
    let Some(pages) = memory.hugepages else {
        return Ok(());
    };
    let size = pages.bytes();
    let (want, free) = (memory.size / size, host.free_huge_pages(pages));
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

fn check_hugepages(memory: &MemorySpec) -> Result<(), String> {
    let Some(pages) = memory.hugepages else {
        return Ok(());
    };
    let size = pages.bytes();
    for (_, len) in layout::ram_regions(memory.size) {
        if len % size != 0 {
            return Err(format!(
                "{}M of it cannot be made of huge pages of {}M; choose a multiple",
                len >> 20,
                size >> 20
            ));
        }
    }
    Ok(())
}

/// Reads and checks the size; a plain number is MiB.
fn parse_size_of_memory(text: &str) -> Result<u64, String> {
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
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_has_units_and_bounds() {
        assert_eq!(parse_size_of_memory("512M").unwrap(), 512 << 20);
        assert_eq!(parse_size_of_memory("64").unwrap(), 64 << 20);
        assert_eq!(parse_size_of_memory("1g").unwrap(), 1 << 30);
        assert_eq!(parse_size_of_memory("32768K").unwrap(), 32 << 20);
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
        ] {
            let message = parse_size_of_memory(text).unwrap_err();
            assert!(message.contains(reason), "{text}: {message}");
        }
    }

    #[test]
    fn how_the_host_provides_it() {
        let memory: MemorySpec = "64M,shared,prefault".parse().unwrap();
        assert!(memory.shared && memory.prefault && memory.hugepages.is_none());
        for (text, reason) in [
            ("64M,hugepages=3M", "2M or 1G"),
            ("64M,hugepages", "no value"),
            ("64M,hugepages=1G", "a multiple"),
            ("65M,hugepages=2M", "a multiple"),
            ("64M,share", "not understood"),
            ("shared=64M", "not a size"),
        ] {
            let message = text.parse::<MemorySpec>().unwrap_err();
            assert!(message.contains(reason), "{text}: {message}");
        }
    }

    #[test]
    fn a_host_has_only_so_much() {
        let host = HostFacts {
            memory: 8 << 30,
            huge_pages: [64, 1],
            ..HostFacts::default()
        };
        let refused = |text: &str| {
            check(&text.parse().unwrap(), &host)
                .err()
                .unwrap_or_default()
        };
        for (text, reason) in [
            ("8G", ""),
            ("128M,hugepages=2M", ""),
            ("1G,hugepages=1G", ""),
            ("1024T", "more than the 8192M"),
            (
                "130M,hugepages=2M",
                "needs 65 free huge pages of 2M, the host has 64",
            ),
            ("2G,hugepages=1G", "needs 2 free huge pages of 1024M"),
        ] {
            let message = refused(text);
            assert!(message.contains(reason), "{text}: {message}");
            assert_eq!(message.is_empty(), reason.is_empty(), "{text}: {message}");
        }
    }
}
