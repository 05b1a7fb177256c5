//! What the user gave: flags of `mayfly boot`, or the same words as TOML.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use mayfly_boot::Protocol;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::disk::DiskConfig;
use super::keys::escape;
use crate::failure::{Failure, OrFail};
use crate::kvm::accept::AcceptKvm;
use crate::sandbox::Mode;

/// The raw flags. A file of `--config` has the same names: `cpus = 2`,
/// `disk = ["path=a.img,ro"]` or `[[disk]]` tables with the same keys.
#[derive(clap::Args, Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RawConfig {
    /// What the VM is called by mayfly ctl [default: vm- and the process id]
    #[arg(long, value_name = "NAME", allow_hyphen_values = true)]
    pub name: Option<String>,
    /// Kernel: a vmlinux (ELF) or a bzImage [default: the default guest's; see mayfly guest]
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// Appended to the default kernel command line
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// The command line is --cmdline alone
    #[arg(long)]
    pub no_default_cmdline: bool,
    /// How to enter the kernel [default: auto]
    #[arg(long, value_name = "PROTOCOL", value_enum)]
    pub boot_protocol: Option<BootProtocol>,
    /// vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    #[serde(deserialize_with = "word")]
    pub cpus: Option<String>,
    /// Memory: 512M, 2G; a plain number is MiB [default: 512M]
    #[arg(
        long,
        value_name = "SIZE[,hugepages=2M|1G][,prefault][,shared]",
        allow_hyphen_values = true
    )]
    #[serde(deserialize_with = "word")]
    pub memory: Option<String>,
    /// A disk image or block device (repeatable); limits are a second's
    #[arg(
        long,
        value_name = "path=F[,ro][,id=S][,format=raw|qcow2][,backing=F][,bw=10M][,iops=500][,queues=N]"
    )]
    #[serde(deserialize_with = "os_words")]
    pub disk: Vec<OsString>,
    /// A network device on a TAP device, or on sockets by passt (repeatable); limits
    /// are a second's, each way. A user's network may have publish=[[IP:]HOST:]GUEST[/udp],
    /// allow=CIDR|DOMAIN[:PORT], dns=IP (each repeatable), isolated, host-loopback
    #[arg(
        long,
        value_name = "tap=NAME[,queues=N]|user[,KEY=…]…[,mac=…][,bw=10M][,pps=5000]"
    )]
    #[serde(deserialize_with = "words")]
    pub net: Vec<String>,
    /// Sockets between guest and host (vsock), as Unix sockets of the host
    #[arg(long, value_name = "cid=N,unix=S")]
    #[serde(deserialize_with = "word")]
    pub vsock: Option<String>,
    /// A memory balloon of a size; mayfly ctl changes it
    #[arg(long, value_name = "SIZE[,deflate-on-oom][,reporting]")]
    #[serde(deserialize_with = "word")]
    pub balloon: Option<String>,
    /// Console: stdio, file=F, pty, unix=S, none; virtio makes it fast, and know
    /// the terminal's size [default: stdio]
    #[arg(long, value_name = "WHERE[,virtio]")]
    #[serde(deserialize_with = "word")]
    pub console: Option<String>,
    /// A channel, /dev/virtio-ports/NAME in the guest (repeatable)
    #[arg(long, value_name = "name=NAME,unix=S|pty|file=F")]
    #[serde(deserialize_with = "words")]
    pub channel: Vec<String>,
    /// A watchdog, and what happens if the guest that starts it hangs [default action: crash]
    #[arg(
        long,
        value_name = "action=crash|reset|nmi",
        num_args = 0..=1,
        default_missing_value = "action=crash"
    )]
    #[serde(deserialize_with = "word")]
    pub watchdog: Option<String>,
    /// Log messages of a level and above, to standard error or a file [default: warn]
    #[arg(long, value_name = "error|warn|info|debug|trace[,file=F][,json]")]
    #[serde(deserialize_with = "word")]
    pub log: Option<String>,
    /// Write mayfly's process id to a file, removed at the end
    #[arg(long, value_name = "F")]
    pub pidfile: Option<PathBuf>,
    /// What surrounds the machine's process: all that the host has (on), all there is, or
    /// no VM (require), or nothing (off) [default: on]
    #[arg(long, value_name = "on|require|off")]
    pub sandbox: Option<Mode>,
    /// Let the guest run VMs of its own, if this host's KVM can do that
    #[arg(long)]
    pub nested: bool,
    /// Use a KVM that seems to emulate.
    #[command(flatten)]
    #[serde(skip)]
    pub accept_kvm: AcceptKvm,
    /// The file systems of an image's layers, on one disk before the others
    #[arg(skip)]
    #[serde(skip)]
    pub layers: Vec<PathBuf>,
    /// The disks of an image's volumes, behind those of `--disk`
    #[arg(skip)]
    #[serde(skip)]
    pub volumes: Vec<DiskConfig>,
    /// Signals do not end the machine: whoever runs it takes them
    #[arg(skip)]
    #[serde(skip)]
    pub ignores_signals: bool,
}

/// How to enter the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootProtocol {
    /// Linux' 64-bit entry, or PVH if there is no other
    #[default]
    Auto,
    /// The Linux 64-bit boot protocol
    Linux,
    /// Xen's PVH
    Pvh,
}

impl BootProtocol {
    /// The protocol, if it is not to be chosen.
    pub fn forced(self) -> Option<Protocol> {
        match self {
            BootProtocol::Auto => None,
            BootProtocol::Linux => Some(Protocol::Linux64),
            BootProtocol::Pvh => Some(Protocol::Pvh),
        }
    }
}

impl RawConfig {
    /// Reads a file of `--config`.
    pub fn from_file(path: &Path) -> Result<Self, Failure> {
        let flag = format!("--config {}", path.display());
        let text = std::fs::read_to_string(path).or_config(&flag)?;
        RawConfig::from_toml(&text).map_err(|error| Failure::config(format!("{flag}: {error}")))
    }

    /// Reads TOML. A refusal is one line that says where.
    pub fn from_toml(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| {
            let message = error.message().replace('\n', " ");
            match error.span() {
                Some(span) => {
                    let before = text.get(..span.start).unwrap_or_default();
                    format!("line {}: {message}", before.matches('\n').count() + 1)
                }
                None => message,
            }
        })
    }

    /// These flags, and what they leave open as the file says.
    pub fn or(self, file: RawConfig) -> Self {
        fn either<T>(flags: Vec<T>, file: Vec<T>) -> Vec<T> {
            if flags.is_empty() { file } else { flags }
        }
        RawConfig {
            name: self.name.or(file.name),
            kernel: self.kernel.or(file.kernel),
            initrd: self.initrd.or(file.initrd),
            cmdline: self.cmdline.or(file.cmdline),
            no_default_cmdline: self.no_default_cmdline || file.no_default_cmdline,
            boot_protocol: self.boot_protocol.or(file.boot_protocol),
            cpus: self.cpus.or(file.cpus),
            memory: self.memory.or(file.memory),
            disk: either(self.disk, file.disk),
            net: either(self.net, file.net),
            vsock: self.vsock.or(file.vsock),
            balloon: self.balloon.or(file.balloon),
            console: self.console.or(file.console),
            channel: either(self.channel, file.channel),
            watchdog: self.watchdog.or(file.watchdog),
            sandbox: self.sandbox.or(file.sandbox),
            log: self.log.or(file.log),
            pidfile: self.pidfile.or(file.pidfile),
            nested: self.nested || file.nested,
            accept_kvm: self.accept_kvm,
            layers: self.layers,
            volumes: self.volumes,
            ignores_signals: self.ignores_signals,
        }
    }
}

/// One value: a string, or what can be written as one.
struct Word(String);

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl<'de> Visitor<'de> for Words {
            type Value = Word;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a number, or a table of the option's keys")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Word, E> {
                Ok(Word(text.to_owned()))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Word, E> {
                Ok(Word(number.to_string()))
            }

            /// `{ path = "a", ro = true }` is `path=a,ro`.
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Word, A::Error> {
                let mut parts = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    match value {
                        // What may be given several times.
                        Value::List(list) => {
                            let each = list.iter().map(|text| format!("{key}={}", escape(text)));
                            parts.extend(each);
                        }
                        // The word that stands alone: `memory = { size = "2G" }`.
                        Value::Text(text) if key == "size" || key == "level" => {
                            parts.insert(0, escape(&text))
                        }
                        Value::Text(text) => parts.push(format!("{key}={}", escape(&text))),
                        Value::Number(number) => parts.push(format!("{key}={number}")),
                        Value::Flag(true) => parts.push(key),
                        Value::Flag(false) => {}
                    }
                }
                Ok(Word(parts.join(",")))
            }
        }
        deserializer.deserialize_any(Words)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Value {
    Flag(bool),
    Number(i64),
    Text(String),
    List(Vec<String>),
}

fn word<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Word::deserialize(deserializer).map(|word| Some(word.0))
}

fn words<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct List;
    impl<'de> Visitor<'de> for List {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a list of strings or tables")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut words = Vec::new();
            while let Some(Word(text)) = list.next_element()? {
                words.push(text);
            }
            Ok(words)
        }
    }
    deserializer.deserialize_seq(List)
}

fn os_words<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<OsString>, D::Error> {
    words(deserializer).map(|words| words.into_iter().map(OsString::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NetConfig;

    #[test]
    fn toml_says_what_flags_say() {
        let file = RawConfig::from_toml(
            r#"
            kernel = "/k"
            cpus = 2
            memory = { size = "2G", shared = true, prefault = false }
            boot-protocol = "pvh"
            console = "none"
            net = ["tap=t0", { user = true, allow = ["10.0.0.0/8:443", "a.example"] }]
            [[disk]]
            path = "a,b.img"
            ro = true
            id = "root"
            "#,
        )
        .unwrap();
        assert_eq!(file.cpus.as_deref(), Some("2"));
        assert_eq!(file.memory.as_deref(), Some("2G,shared"));
        assert_eq!(file.boot_protocol, Some(BootProtocol::Pvh));
        let disk = DiskConfig::parse(&file.disk[0]).unwrap();
        assert!(file.net[1].parse::<NetConfig>().is_ok());
        assert_eq!(disk.path, Path::new("a,b.img"));
        assert!(disk.read_only && disk.id.as_deref() == Some("root"));
        assert_eq!(
            file.net,
            ["tap=t0", "allow=10.0.0.0/8:443,allow=a.example,user"]
        );

        let flags = RawConfig {
            cpus: Some("4".into()),
            disk: vec!["path=c".into()],
            ..Default::default()
        };
        let both = flags.or(file);
        assert_eq!(both.cpus.as_deref(), Some("4"));
        assert_eq!(both.disk, ["path=c"]);
        assert_eq!(both.kernel, Some("/k".into()));
    }

    #[test]
    fn mistakes_are_told_with_their_line() {
        for (text, expected) in [
            ("cpu = 2", "line 1: unknown field"),
            ("cpus = 1\nmemory = [1]", "line 2"),
            ("cpus = 1\n\ndisk = \"a\"", "line 3"),
            ("cpus =", "line 1"),
            ("[[disk]]\npath = 1.5", "line"),
            ("no-default-cmdline = 1", "line 1"),
        ] {
            let message = RawConfig::from_toml(text).unwrap_err();
            assert!(message.starts_with(expected), "{text}: {message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }
}
