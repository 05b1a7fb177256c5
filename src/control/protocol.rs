//! What goes over the socket. `{"command":"balloon","size":1048576}` is
//! answered by `{"ok":…}` or `{"error":"…"}`; after `{"command":"events"}`
//! follows a line for every event until the VM ends.

use std::time::{SystemTime, UNIX_EPOCH};

use mayfly_devices::rate_limiter::Limits;
use serde::{Deserialize, Serialize};

use crate::timing::milliseconds;

/// What a VM can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "command",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub enum Command {
    /// Stop all vCPUs.
    Pause {},
    /// Let them go on.
    Resume {},
    /// What it is, and how it does.
    Info {},
    /// Every change from now on.
    Events {},
    /// All counters, as Prometheus' text format.
    Metrics {},
    /// Ask the guest to turn off; after the deadline, end it.
    Shutdown {
        /// How long the guest may take, in seconds.
        deadline: u64,
    },
    /// A non-maskable interrupt on every vCPU.
    Nmi {},
    /// Ask the guest for a balloon of a size.
    Balloon {
        /// In bytes.
        size: u64,
    },
    /// What a disk or network may move from now on; none without.
    Limit {
        /// Its name, as `info` tells it.
        device: String,
        /// The limits.
        #[serde(default)]
        limits: Limits,
    },
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Done; what was asked for.
    Ok(serde_json::Value),
    /// Not done, and why.
    Error(String),
}

impl Reply {
    /// Done, with nothing to tell.
    pub fn done() -> Self {
        Reply::Ok(serde_json::Value::Null)
    }
}

/// What happened to a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// `paused`, `resumed`, `guest-init`, `shutdown`, `ended`, …
    pub event: String,
    /// When: milliseconds since 1970.
    pub time_ms: u64,
    /// More about it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub detail: Option<String>,
}

impl Event {
    /// Something that happens now.
    pub fn now(event: &str, detail: Option<String>) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Event {
            event: event.to_owned(),
            time_ms: since.map_or(0, milliseconds),
            detail,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_are_as_documented() {
        let read = |line: &str| serde_json::from_str::<Command>(line);
        assert_eq!(read(r#"{"command":"pause"}"#).unwrap(), Command::Pause {});
        assert_eq!(
            read(r#"{"command":"shutdown","deadline":5}"#).unwrap(),
            Command::Shutdown { deadline: 5 }
        );
        let limit =
            r#"{"command":"limit","device":"disk0","limits":{"bandwidth":{"per-second":5}}}"#;
        let Command::Limit { device, limits } = read(limit).unwrap() else {
            panic!("{limit}");
        };
        assert_eq!(device, "disk0");
        assert_eq!(limits.bandwidth.unwrap().per_second.get(), 5);
        for wrong in [
            "",
            r#"{"command":"limit","device":"disk0","limits":{"bandwidth":{"per-second":0}}}"#,
            r#"{"command":"limit","device":"disk0","limits":{"iops":1}}"#,
            "{}",
            "[]",
            r#"{"command":"fly"}"#,
            r#"{"command":"shutdown"}"#,
            r#"{"command":"balloon","size":"1M"}"#,
            r#"{"command":"shutdown","deadline":-1}"#,
            r#"{"command":"pause","now":true}"#,
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        let line = |reply| serde_json::to_string(&reply).unwrap();
        assert_eq!(line(Reply::done()), r#"{"ok":null}"#);
        assert_eq!(line(Reply::Error("no".into())), r#"{"error":"no"}"#);
    }
}
