//! `--balloon`

use std::str::FromStr;

use mayfly_devices::virtio::balloon::Abilities;

use super::keys::{FromKeys, Keys};
use super::size::parse_size;
use crate::spec::{HugePages, MemorySpec, check_balloon_size};

const SYNTAX: &str = "SIZE[,deflate-on-oom][,reporting], such as 0,reporting";

/// A memory balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonConfig {
    /// The size that it is to have at the start, in bytes.
    pub size: u64,
    /// What it can do.
    pub abilities: Abilities,
}

impl FromStr for BalloonConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::from_text(text.as_ref())
    }
}

impl FromKeys for BalloonConfig {
    const SYNTAX: &'static str = SYNTAX;
    const WORD: Option<&'static str> = Some("size");

    fn from_keys(mut keys: Keys) -> Result<Self, String> {
        let size = keys
            .word()
            .ok_or_else(|| format!("has no size; write {SYNTAX}"))?;
        let balloon = BalloonConfig {
            size: parse_size(&size, 20)?,
            abilities: Abilities {
                deflate_on_oom: keys.flag("deflate-on-oom")?,
                reporting: keys.flag("reporting")?,
            },
        };
        keys.finish()?;
        Ok(balloon)
    }
}

impl BalloonConfig {
    /// Whether it can work with that memory.
    pub fn check(&self, memory: &MemorySpec) -> Result<(), String> {
        check_balloon_size(self.size, memory.size)?;
        match memory.hugepages {
            Some(HugePages::Gib1) => {
                Err("the guest gives nothing as large as a huge page of 1G back".into())
            }
            Some(HugePages::Mib2) if !self.abilities.reporting => {
                Err("huge pages come back by reports only; add ,reporting".into())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balloons() {
        let balloon: BalloonConfig = "64M,reporting,deflate-on-oom".parse().unwrap();
        assert_eq!(balloon.size, 64 << 20);
        assert!(balloon.abilities.reporting && balloon.abilities.deflate_on_oom);
        for bad in ["", "on", "reporting", "0,report", "0,reporting=1", "size=1"] {
            assert!(bad.parse::<BalloonConfig>().is_err(), "{bad}");
        }
        let memory = |size, hugepages| MemorySpec {
            size,
            hugepages,
            ..Default::default()
        };
        assert!(balloon.check(&memory(65 << 20, None)).is_ok());
        assert!(balloon.check(&memory(64 << 20, None)).is_err());
        let huge = Some(HugePages::Mib2);
        assert!(balloon.check(&memory(128 << 20, huge)).is_ok());
        let plain: BalloonConfig = "0".parse().unwrap();
        assert!(plain.check(&memory(128 << 20, huge)).is_err());
        assert!(
            balloon
                .check(&memory(1 << 30, Some(HugePages::Gib1)))
                .is_err()
        );
    }
}
