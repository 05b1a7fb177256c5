//! What a folder of a store is.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use mayfly_image::Digest;

use super::super::format::FILE_MAX;
use super::entry::{MEMORY, STATE};
use super::host::Host;
use super::key::TemplateKey;
use crate::control::valid_name;
use crate::spec::{DeviceKind, MachineSpec};

/// The version of a template's manifest.
pub const TEMPLATE_VERSION: u32 = 1;

/// What a template is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateManifest {
    /// The version of this document.
    pub version: u32,
    /// What it is for.
    pub key: TemplateKey,
    /// The time at which it was made, in milliseconds since 1970.
    pub made_ms: u64,
    /// The version of the mayfly that made it.
    pub made_by: String,
    /// The length of its memory, in bytes.
    pub memory_bytes: u64,
    /// The length of its state file, in bytes.
    pub state_bytes: u64,
}

/// The time, as manifests have it.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.ok()
        .and_then(|now| u64::try_from(now.as_millis()).ok())
        .unwrap_or(0)
}

/// The version of a snapshot's manifest.
pub const SNAPSHOT_VERSION: u32 = 1;
/// The most bytes of a disk: file systems know no larger files.
const DISK_MAX: u64 = 1 << 60;
/// The longest name of the VM that a snapshot is of, and of a mayfly's version, in bytes.
const TEXT_MAX: usize = 100;

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotManifest {
    /// The version of this document.
    pub version: u32,
    /// What it is called.
    pub name: String,
    /// The name of the VM that it is of.
    pub source: String,
    /// The time at which it was made, in milliseconds since 1970.
    pub made_ms: u64,
    /// The version of the mayfly that made it.
    pub made_by: String,
    /// The machine, as its guest sees it.
    pub machine: MachineSpec,
    /// The host that it was made on.
    pub host: Host,
    /// The guest's memory.
    pub memory: Part,
    /// The rest of its state.
    pub state: Part,
    /// The disks that are kept with it.
    pub disks: Vec<DiskPart>,
}

/// A file of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its length.
    pub bytes: u64,
    /// Its digest: of its blocks of 64 KiB that are not all zeroes, each behind its offset,
    /// and of its length (both numbers have 8 bytes, little-endian).
    pub sha256: Digest,
}

/// A disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskPart {
    /// The name of its device.
    pub device: String,
    /// What is on it.
    pub content: Part,
}

impl SnapshotManifest {
    /// Refuses what no snapshot is, in words: such a document may be anybody's.
    pub fn check(&self) -> Result<(), String> {
        if !valid_name(&self.name) {
            return Err("its name is impossible".into());
        }
        let texts = [&self.source, &self.made_by];
        if texts.iter().any(|text| text.len() > TEXT_MAX) {
            return Err("its texts are too long".into());
        }
        self.machine.check()?;
        if self.memory.bytes != self.machine.memory.size {
            return Err("its memory has another size than its machine's".into());
        }
        let state_max = u64::try_from(FILE_MAX).unwrap_or(u64::MAX);
        if !(1..=state_max).contains(&self.state.bytes) {
            return Err("its state has an impossible length".into());
        }
        for (index, disk) in self.disks.iter().enumerate() {
            let device = self.machine.device(&disk.device);
            let is_disk = device.is_some_and(|it| matches!(it.kind, DeviceKind::Block(_)));
            let mut others = self.disks.iter().take(index);
            if !is_disk || others.any(|other| other.device == disk.device) {
                return Err("it has a disk that its machine has not".into());
            }
            if disk.content.bytes > DISK_MAX {
                return Err("it has a disk of an impossible size".into());
            }
        }
        Ok(())
    }

    /// The names of its files, in the order of an export, and what they hold.
    pub fn parts(&self) -> Vec<(String, Part)> {
        let mut parts = vec![(MEMORY.into(), self.memory), (STATE.into(), self.state)];
        let disks = self.disks.iter().enumerate();
        parts.extend(disks.map(|(index, disk)| (disk_file(index), disk.content)));
        parts
    }
}

/// The file of the disk at a place.
pub fn disk_file(index: usize) -> String {
    format!("disk-{index}")
}
