//! What the user gave: flags of `mayfly boot`, or the same words as TOML.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use mayfly_sandbox::Mode;
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use super::keys::{FromKeys, Keys, Value};
use super::options::MachineOptions;
use crate::failure::{Failure, OrFail};
use crate::kvm::accept::AcceptKvm;
use crate::spec::BootProtocol;
use crate::spec::check::CPUS_MAX;

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
    pub cpus: Option<Setting>,
    /// Memory: 512M, 2G; a plain number is MiB [default: 512M]
    #[arg(
        long,
        value_name = "SIZE[,hugepages=2M|1G][,prefault][,shared]",
        allow_hyphen_values = true
    )]
    pub memory: Option<Setting>,
    /// A disk image or block device (repeatable); limits are a second's
    #[arg(
        long,
        value_name = "path=F[,ro][,id=S][,format=raw|qcow2][,backing=F][,bw=10M][,iops=500][,queues=N]"
    )]
    pub disk: Vec<Setting>,
    /// A network device on a TAP device, or on sockets by passt (repeatable); limits
    /// are a second's, each way. A user's network may have publish=[[IP:]HOST:]GUEST[/udp],
    /// allow=CIDR|DOMAIN[:PORT], dns=IP (each repeatable), isolated, host-loopback
    #[arg(
        long,
        value_name = "tap=NAME[,queues=N]|user[,KEY=…]…[,mac=…][,bw=10M][,pps=5000]"
    )]
    pub net: Vec<Setting>,
    /// Sockets between guest and host (vsock), as Unix sockets of the host
    #[arg(long, value_name = "cid=N,unix=S")]
    pub vsock: Option<Setting>,
    /// A memory balloon of a size; mayfly ctl changes it
    #[arg(long, value_name = "SIZE[,deflate-on-oom][,reporting]")]
    pub balloon: Option<Setting>,
    /// Console: stdio, file=F, pty, unix=S, none; virtio makes it fast, and know
    /// the terminal's size [default: stdio]
    #[arg(long, value_name = "WHERE[,virtio]")]
    pub console: Option<Setting>,
    /// A channel, /dev/virtio-ports/NAME in the guest (repeatable)
    #[arg(long, value_name = "name=NAME,unix=S|pty|file=F")]
    pub channel: Vec<Setting>,
    /// A watchdog, and what happens if the guest that starts it hangs [default action: crash]
    #[arg(
        long,
        value_name = "action=crash|reset|nmi",
        num_args = 0..=1,
        default_missing_value = "action=crash"
    )]
    pub watchdog: Option<Setting>,
    /// Log messages of a level and above, to standard error or a file [default: warn]
    #[arg(long, value_name = "error|warn|info|debug|trace[,file=F][,json]")]
    pub log: Option<Setting>,
    /// Write mayfly's process id to a file, removed at the end
    #[arg(long, value_name = "F")]
    pub pidfile: Option<PathBuf>,
    /// What surrounds the VMM process: all that the host has (on), all there is, or
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
        }
    }

    /// Reads each option by itself; what is not given has its default. Kernel and initial RAM
    /// disk are for [`GuestFiles::choose`](super::GuestFiles::choose).
    pub fn parse(self) -> Result<MachineOptions, Failure> {
        let default = MachineOptions::default();
        Ok(MachineOptions {
            name: self.name,
            cmdline: self.cmdline,
            no_default_cmdline: self.no_default_cmdline,
            boot_protocol: self.boot_protocol.unwrap_or_default(),
            cpus: match &self.cpus {
                Some(cpus) => parse_cpus(&cpus.to_string())?,
                None => default.cpus,
            },
            memory: parse_one(&self.memory, "--memory")?.unwrap_or_default(),
            disks: parse_all(&self.disk, "--disk")?,
            nets: parse_all(&self.net, "--net")?,
            vsock: parse_one(&self.vsock, "--vsock")?,
            balloon: parse_one(&self.balloon, "--balloon")?,
            console: parse_one(&self.console, "--console")?.unwrap_or_default(),
            channels: parse_all(&self.channel, "--channel")?,
            watchdog: parse_one(&self.watchdog, "--watchdog")?,
            log: parse_one(&self.log, "--log")?.unwrap_or_default(),
            pidfile: self.pidfile,
            sandbox: self.sandbox.unwrap_or_default(),
            nested: self.nested,
            accept_kvm: self.accept_kvm,
            ..default
        })
    }
}

fn parse_one<T: FromKeys>(setting: &Option<Setting>, flag: &str) -> Result<Option<T>, Failure> {
    let setting = setting.as_ref();
    setting.map(|setting| setting.parse(flag)).transpose()
}

fn parse_all<T: FromKeys>(settings: &[Setting], flag: &str) -> Result<Vec<T>, Failure> {
    let all = settings.iter().map(|setting| setting.parse(flag));
    all.collect()
}

/// Reads a number of vCPUs.
pub fn parse_cpus(text: &str) -> Result<u8, Failure> {
    match text.parse() {
        Ok(cpus @ 1..=CPUS_MAX) => Ok(cpus),
        _ => Err(Failure::config(format!(
            "--cpus {text}: not a number from 1 to {CPUS_MAX}"
        ))),
    }
}

/// The value of one option, as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Setting {
    /// As in a flag; in TOML a string or a number.
    Text(OsString),
    /// A table of TOML.
    Table(Vec<(String, Value)>),
}

impl From<OsString> for Setting {
    fn from(text: OsString) -> Self {
        Setting::Text(text)
    }
}

impl From<&str> for Setting {
    fn from(text: &str) -> Self {
        Setting::Text(text.into())
    }
}

impl fmt::Display for Setting {
    /// As it would stand in a flag, for messages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = match self {
            Setting::Text(text) => return text.display().fmt(f),
            Setting::Table(entries) => entries,
        };
        let mut separator = "";
        for (key, value) in entries {
            match value {
                Value::Flag(true) => write!(f, "{separator}{key}")?,
                Value::Flag(false) => continue,
                Value::Number(number) => write!(f, "{separator}{key}={number}")?,
                Value::Text(text) => write!(f, "{separator}{key}={text}")?,
                Value::List(list) => {
                    let each = list.iter().map(|text| format!("{key}={text}"));
                    write!(f, "{separator}{}", each.collect::<Vec<_>>().join(","))?;
                }
            }
            separator = ",";
        }
        Ok(())
    }
}

impl Setting {
    fn parse<T: FromKeys>(&self, flag: &str) -> Result<T, Failure> {
        let parsed = match self {
            Setting::Text(text) => T::from_text(text),
            Setting::Table(table) => T::from_keys(Keys::of_table(table, T::WORD, T::SYNTAX)),
        };
        parsed.map_err(|error| Failure::config(format!("{flag} {self}: {error}")))
    }
}

impl clap::builder::ValueParserFactory for Setting {
    type Parser =
        clap::builder::MapValueParser<clap::builder::OsStringValueParser, fn(OsString) -> Setting>;

    fn value_parser() -> Self::Parser {
        use clap::builder::{OsStringValueParser, TypedValueParser};
        OsStringValueParser::new().map(Setting::Text)
    }
}

impl<'de> Deserialize<'de> for Setting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Settings;
        impl<'de> Visitor<'de> for Settings {
            type Value = Setting;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a number, or a table of the option's keys")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Setting, E> {
                Ok(text.into())
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Setting, E> {
                Ok(number.to_string().as_str().into())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Setting, A::Error> {
                let mut table = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, TomlValue>()? {
                    table.push((key, value.into()));
                }
                Ok(Setting::Table(table))
            }
        }
        deserializer.deserialize_any(Settings)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TomlValue {
    Flag(bool),
    Number(i64),
    Text(String),
    List(Vec<String>),
}

impl From<TomlValue> for Value {
    fn from(value: TomlValue) -> Self {
        match value {
            TomlValue::Flag(flag) => Value::Flag(flag),
            TomlValue::Number(number) => Value::Number(number),
            TomlValue::Text(text) => Value::Text(text),
            TomlValue::List(list) => Value::List(list),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;
    use crate::config::testing::refusal;
    use crate::config::{Format, HostEnd};

    fn toml(text: &str) -> RawConfig {
        RawConfig::from_toml(text).unwrap()
    }

    #[test]
    fn toml_says_what_flags_say() {
        let file = toml(
            r#"
            kernel = "/k"
            cpus = 2
            memory = { size = "2G", shared = true, prefault = false }
            boot-protocol = "pvh"
            console = "none"
            log = { level = "debug", file = "l,og" }
            net = ["tap=t0", { user = true, allow = ["10.0.0.0/8:443", "a.example"] }]
            [[disk]]
            path = "a,b.img"
            ro = true
            id = "root"
            iops = 100
            "#,
        );
        let flags = RawConfig {
            kernel: Some("/k".into()),
            cpus: Some("2".into()),
            memory: Some("2G,shared".into()),
            boot_protocol: Some(BootProtocol::Pvh),
            console: Some("none".into()),
            log: Some("debug,file=l,,og".into()),
            net: vec![
                "tap=t0".into(),
                "user,allow=10.0.0.0/8:443,allow=a.example".into(),
            ],
            disk: vec!["path=a,,b.img,ro,id=root,iops=100".into()],
            ..RawConfig::default()
        };
        let parse = |raw: &RawConfig| format!("{:?}", raw.clone().parse().unwrap());
        assert_eq!(parse(&file), parse(&flags));
        let disk = &file.clone().parse().unwrap().disks[0];
        assert_eq!(disk.path, Path::new("a,b.img"));
        assert!(disk.read_only && disk.format == Format::Raw);

        let flags = RawConfig {
            cpus: Some("4".into()),
            disk: vec!["path=c".into()],
            ..Default::default()
        };
        let both = flags.or(file);
        assert_eq!(both.cpus, Some("4".into()));
        assert_eq!(both.disk, ["path=c".into()]);
        assert_eq!(both.kernel, Some("/k".into()));
    }

    #[test]
    fn paths_keep_their_bytes() {
        let setting = |before: &str| {
            let bytes = [before.as_bytes(), b"\xff\xfe,,x"].concat();
            Setting::Text(OsString::from_vec(bytes))
        };
        let path = PathBuf::from(OsString::from_vec(b"\xff\xfe,x".to_vec()));
        let raw = RawConfig {
            disk: vec![setting("format=qcow2,path=a,backing=")],
            vsock: Some(setting("cid=3,unix=")),
            console: Some(setting("file=")),
            channel: vec![setting("name=a,unix=")],
            log: Some(setting("warn,file=")),
            ..RawConfig::default()
        };
        let options = raw.parse().unwrap();
        assert_eq!(options.disks[0].backing.as_ref().unwrap().path, path);
        assert_eq!(options.vsock.unwrap().path, path);
        assert_eq!(options.console.end, HostEnd::File(path.clone()));
        assert_eq!(options.channels[0].end, HostEnd::Unix(path.clone()));
        assert_eq!(options.log.file, Some(path));
    }

    #[test]
    fn cpus_have_bounds() {
        assert_eq!(parse_cpus("32").unwrap(), 32);
        for text in ["0", "33", "-1", "two", "", "1.0", "256"] {
            assert!(refusal(parse_cpus(text)).contains("1 to 32"));
        }
    }

    #[test]
    fn a_refused_table_is_shown() {
        let raw = toml("disk = [{ path = \"a\", ro = true, size = 5 }]");
        let refused = refusal(raw.parse());
        assert!(
            refused.starts_with("--disk path=a,ro,size=5: \"size\" is not"),
            "{refused}"
        );
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
