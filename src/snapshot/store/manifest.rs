//! What a folder of a store is.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::key::TemplateKey;

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
