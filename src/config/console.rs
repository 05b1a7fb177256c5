//! `--console` and `--channel`

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::keys::{FromKeys, Keys};
use crate::control::{NAME_MAX, valid_name};

const CONSOLE_SYNTAX: &str = "stdio, file=F, pty, unix=S or none, and ,virtio for a fast one";
const CHANNEL_SYNTAX: &str = "name=NAME,unix=S (or pty, or file=F)";

/// Where a line of the guest is on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum HostEnd {
    /// Standard input and output.
    #[default]
    Stdio,
    /// A file that takes the output.
    File(PathBuf),
    /// A new pseudo-terminal, whose name is printed.
    Pty,
    /// A Unix socket that takes one client at a time.
    Unix(PathBuf),
    /// Nowhere.
    None,
}

impl fmt::Display for HostEnd {
    /// As the user writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostEnd::Stdio => f.write_str("stdio"),
            HostEnd::File(path) => write!(f, "file={}", path.display()),
            HostEnd::Pty => f.write_str("pty"),
            HostEnd::Unix(path) => write!(f, "unix={}", path.display()),
            HostEnd::None => f.write_str("none"),
        }
    }
}

impl HostEnd {
    /// The file or the socket that is made.
    pub fn path(&self) -> Option<&Path> {
        match self {
            HostEnd::File(path) | HostEnd::Unix(path) => Some(path),
            HostEnd::Stdio | HostEnd::Pty | HostEnd::None => None,
        }
    }

    /// Takes the one that is named.
    fn take(keys: &mut Keys, syntax: &str) -> Result<Option<Self>, String> {
        let ends = [
            keys.flag("stdio")?.then_some(HostEnd::Stdio),
            keys.path("file")?.map(HostEnd::File),
            keys.flag("pty")?.then_some(HostEnd::Pty),
            keys.path("unix")?.map(HostEnd::Unix),
            keys.flag("none")?.then_some(HostEnd::None),
        ];
        let mut ends = ends.into_iter().flatten();
        match (ends.next(), ends.next()) {
            (_, Some(_)) => Err(format!("has two ends on the host; write {syntax}")),
            (end, None) => Ok(end),
        }
    }
}

/// The guest's console.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleConfig {
    /// Where it is on the host.
    pub end: HostEnd,
    /// A virtio device, not the serial port.
    pub virtio: bool,
}

impl FromStr for ConsoleConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::from_text(text.as_ref())
    }
}

impl FromKeys for ConsoleConfig {
    const SYNTAX: &'static str = CONSOLE_SYNTAX;

    fn from_keys(mut keys: Keys) -> Result<Self, String> {
        let virtio = keys.flag("virtio")?;
        let end = HostEnd::take(&mut keys, CONSOLE_SYNTAX)?;
        keys.finish()?;
        match end {
            Some(HostEnd::None) if virtio => Err("none is no device; leave virtio out".into()),
            None if !virtio => Err(format!("names no place; write {CONSOLE_SYNTAX}")),
            end => Ok(ConsoleConfig {
                end: end.unwrap_or_default(),
                virtio,
            }),
        }
    }
}

/// A named line between programs of the guest and of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelConfig {
    /// What the guest finds it by.
    pub name: String,
    /// Where it is on the host.
    pub end: HostEnd,
}

impl ChannelConfig {
    /// The flag that asked for it, for messages.
    pub fn flag(&self) -> String {
        format!("--channel name={},{}", self.name, self.end)
    }
}

impl FromStr for ChannelConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::from_text(text.as_ref())
    }
}

impl FromKeys for ChannelConfig {
    const SYNTAX: &'static str = CHANNEL_SYNTAX;

    fn from_keys(mut keys: Keys) -> Result<Self, String> {
        let name = keys.required("name")?;
        let end = HostEnd::take(&mut keys, CHANNEL_SYNTAX)?;
        keys.finish()?;
        // The guest makes a file of this name.
        if !valid_name(&name) {
            return Err(format!(
                "name={name}: write 1 to {NAME_MAX} letters, digits, and . _ -"
            ));
        }
        match end {
            Some(end @ (HostEnd::Unix(_) | HostEnd::Pty | HostEnd::File(_))) => {
                Ok(ChannelConfig { name, end })
            }
            _ => Err(format!("needs a place on the host; write {CHANNEL_SYNTAX}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles() {
        let console = |text: &str| text.parse::<ConsoleConfig>().unwrap();
        let serial = |end| ConsoleConfig { end, virtio: false };
        assert_eq!(console("pty"), serial(HostEnd::Pty));
        assert_eq!(console("file=a=b"), serial(HostEnd::File("a=b".into())));
        assert_eq!(console("unix=a,,b"), serial(HostEnd::Unix("a,b".into())));
        let virtio = |end| ConsoleConfig { end, virtio: true };
        assert_eq!(console("virtio"), virtio(HostEnd::Stdio));
        assert_eq!(console("pty,virtio"), virtio(HostEnd::Pty));
        for bad in [
            "",
            "file",
            "file=",
            "unix=",
            "stdio=1",
            "serial",
            "pty,stdio",
            "none,virtio",
            "virtio,virtio",
        ] {
            assert!(bad.parse::<ConsoleConfig>().is_err(), "{bad}");
        }
    }

    #[test]
    fn channels() {
        let channel: ChannelConfig = "name=org.a_b-0,unix=/s".parse().unwrap();
        assert_eq!(channel.flag(), "--channel name=org.a_b-0,unix=/s");
        let long = "x".repeat(NAME_MAX + 1);
        for bad in [
            "",
            "unix=/s",
            "name=a",
            "name=a,stdio",
            "name=a,none",
            "name=a,unix=/s,pty",
            "name=,pty",
            "name=a/b,pty",
            "name=..,pty",
            "name=ü,pty",
            "name=a,pty,virtio",
            &format!("name={long},pty"),
        ] {
            assert!(bad.parse::<ChannelConfig>().is_err(), "{bad}");
        }
    }
}
