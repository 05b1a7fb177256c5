//! From raw flags to a machine that makes sense: the only place that validates
//! and has defaults. Messages name the flag and the remedy.

use std::env;
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use mayfly_boot::{Protocol, cmdline, layout};

use crate::failure::{Failure, OrFail};

/// The most vCPUs of a VM.
pub const CPUS_MAX: u8 = 32;
/// The least memory of a VM, in bytes.
pub const MEMORY_MIN: u64 = 32 << 20;
const MEMORY_DEFAULT: u64 = 512 << 20;
/// A disk's id is at most this long (virtio 1.2, 5.2.6, `VIRTIO_BLK_ID_BYTES`).
const DISK_ID_MAX: usize = 20;
/// A network device's name is shorter than this (Linux' `IFNAMSIZ`).
const TAP_NAME_MAX: usize = 16;

/// For a quick and quiet boot: there is one serial port and no PCI, the clock
/// is known and steady, a panic ends the VM, a restart is ACPI's.
const CMDLINE: &str = "quiet loglevel=3 panic=-1 reboot=acpi pci=off 8250.nr_uarts=1 tsc=reliable no_timer_check \
                       cryptomgr.notests rcupdate.rcu_expedited=1";
const CMDLINE_CONSOLE: &str = "console=ttyS0";

/// A machine, valid as far as can be told without opening anything.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The flag that named it, or what stands for it, for messages.
    pub kernel_flag: String,
    /// The initial RAM disk's file.
    pub initrd: Option<PathBuf>,
    /// The whole command line.
    pub cmdline: String,
    /// How to enter the kernel, if not as suits it best.
    pub protocol: Option<Protocol>,
    /// vCPUs.
    pub cpus: u8,
    /// RAM in bytes.
    pub memory: u64,
    /// Disks, in the order of their names in the guest.
    pub disks: Vec<DiskConfig>,
    /// Network devices, in the order of their names in the guest.
    pub nets: Vec<NetConfig>,
    /// Where the serial console is.
    pub console: ConsoleConfig,
    /// Where to write the process's id.
    pub pidfile: Option<PathBuf>,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// The guest may not write.
    pub read_only: bool,
    /// What the guest sees as the serial number.
    pub id: Option<String>,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The TAP device.
    pub tap: String,
    /// The guest's MAC address; else derived from the TAP's name.
    pub mac: Option<[u8; 6]>,
}

/// Where the guest's serial console is on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ConsoleConfig {
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

/// What the user gave.
#[derive(Clone, Debug, Default)]
pub struct RawConfig {
    /// `--kernel`
    pub kernel: Option<PathBuf>,
    /// `--initrd`
    pub initrd: Option<PathBuf>,
    /// `--cmdline`
    pub cmdline: Option<String>,
    /// `--no-default-cmdline`
    pub no_default_cmdline: bool,
    /// `--boot-protocol`
    pub protocol: Option<Protocol>,
    /// `--cpus`
    pub cpus: Option<String>,
    /// `--memory`
    pub memory: Option<String>,
    /// `--disk`
    pub disks: Vec<String>,
    /// `--net`
    pub nets: Vec<String>,
    /// `--console`
    pub console: Option<String>,
    /// `--pidfile`
    pub pidfile: Option<PathBuf>,
}

impl RawConfig {
    /// Validates everything, and fills in the defaults.
    pub fn validate(self) -> Result<MachineConfig, Failure> {
        let cpus = self.cpus.as_deref().map_or(Ok(1), parse_cpus)?;
        let memory = self
            .memory
            .as_deref()
            .map_or(Ok(MEMORY_DEFAULT), parse_memory)?;
        let disks = parse_all(&self.disks, "--disk")?;
        let nets: Vec<NetConfig> = parse_all(&self.nets, "--net")?;
        let devices = disks.len() + nets.len() + 1; // and the random numbers
        if devices > layout::VIRTIO_MAX {
            return Err(Failure::config(format!(
                "--disk, --net: {} devices are too many; at most {} fit",
                devices - 1,
                layout::VIRTIO_MAX - 1
            )));
        }
        for (index, net) in nets.iter().enumerate() {
            if nets[..index].iter().any(|other| other.tap == net.tap) {
                return Err(Failure::config(format!(
                    "--net tap={}: given twice; a TAP device serves one guest device",
                    net.tap
                )));
            }
        }
        let console = self
            .console
            .as_deref()
            .map_or(Ok(ConsoleConfig::Stdio), parse_console)?;
        let mut parts: Vec<&str> = Vec::new();
        if !self.no_default_cmdline {
            parts.push(CMDLINE);
            if console != ConsoleConfig::None {
                parts.push(CMDLINE_CONSOLE);
            }
        }
        parts.extend(self.cmdline.as_deref());
        let cmdline = parts.join(" ");
        cmdline::validate(&cmdline).or_config("--cmdline")?;
        let guest = GuestFiles::choose(self.kernel, self.initrd)?;
        Ok(MachineConfig {
            kernel: guest.kernel,
            kernel_flag: guest.kernel_flag,
            initrd: guest.initrd,
            cmdline,
            protocol: self.protocol,
            cpus,
            memory,
            disks,
            nets,
            console,
            pidfile: self.pidfile,
        })
    }
}

/// Which kernel and initial RAM disk to boot.
struct GuestFiles {
    kernel: PathBuf,
    kernel_flag: String,
    initrd: Option<PathBuf>,
}

impl GuestFiles {
    fn choose(kernel: Option<PathBuf>, initrd: Option<PathBuf>) -> Result<Self, Failure> {
        if let Some(kernel) = kernel {
            let kernel_flag = format!("--kernel {}", kernel.display());
            return Ok(GuestFiles {
                kernel,
                kernel_flag,
                initrd,
            });
        }
        let (kernel, default_initrd) = default_guest().ok_or_else(|| {
            Failure::config(
                "no kernel to boot: name one with --kernel, or run scripts/mayfly, which fetches one",
            )
        })?;
        Ok(GuestFiles {
            kernel_flag: format!("default kernel {}", kernel.display()),
            kernel,
            initrd: initrd.or(default_initrd),
        })
    }
}

/// The fetched kernel and its initramfs, or else those that the host runs.
pub fn default_guest() -> Option<(PathBuf, Option<PathBuf>)> {
    let exists = |path: PathBuf| path.exists().then_some(path);
    let fetched = cache_folder().map(|cache| cache.join("default"));
    if let Some(folder) = fetched
        && let Some(kernel) = exists(folder.join("vmlinux"))
    {
        return Some((kernel, exists(folder.join("initramfs.cpio"))));
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let boot = Path::new("/boot");
    let kernel = exists(boot.join(format!("vmlinuz-{}", release.trim())))?;
    Some((
        kernel,
        exists(boot.join(format!("initrd.img-{}", release.trim()))),
    ))
}

/// Where the scripts keep what they fetch and build.
pub fn cache_folder() -> Option<PathBuf> {
    let variable = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("MAYFLY_CACHE").or_else(|| {
        variable("XDG_CACHE_HOME")
            .or_else(|| variable("HOME").map(|home| home.join(".cache")))
            .map(|cache| cache.join("mayfly"))
    })
}

fn parse_all<T: FromStr<Err = String>>(texts: &[String], flag: &str) -> Result<Vec<T>, Failure> {
    let parse = |text: &String| {
        text.parse()
            .map_err(|error| Failure::config(format!("{flag} {text}: {error}")))
    };
    texts.iter().map(parse).collect()
}

fn parse_cpus(text: &str) -> Result<u8, Failure> {
    match text.parse() {
        Ok(cpus @ 1..=CPUS_MAX) => Ok(cpus),
        _ => Err(Failure::config(format!(
            "--cpus {text}: not a number from 1 to {CPUS_MAX}"
        ))),
    }
}

fn parse_memory(text: &str) -> Result<u64, Failure> {
    let refuse = |reason: &dyn Display| Failure::config(format!("--memory {text}: {reason}"));
    let (digits, shift) = match text.strip_suffix(|last: char| last.is_ascii_alphabetic()) {
        None => (text, 20),
        Some(digits) => match text.as_bytes().last().map(u8::to_ascii_uppercase) {
            Some(b'K') => (digits, 10),
            Some(b'M') => (digits, 20),
            Some(b'G') => (digits, 30),
            Some(b'T') => (digits, 40),
            _ => return Err(refuse(&"unknown unit; write 512M or 2G")),
        },
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(refuse(
            &"not a size; write 512M or 2G (a plain number is MiB)",
        ));
    }
    let bytes = digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| refuse(&"too large"))?;
    if bytes < MEMORY_MIN {
        return Err(refuse(&format_args!(
            "too little; a VM needs at least {}M",
            MEMORY_MIN >> 20
        )));
    }
    if bytes % layout::PAGE_SIZE != 0 {
        return Err(refuse(&"not a multiple of 4K"));
    }
    let host = host_memory();
    if bytes > host {
        return Err(refuse(&format_args!(
            "more than the {}M of memory and swap that this host has",
            host >> 20
        )));
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

fn parse_console(text: &str) -> Result<ConsoleConfig, Failure> {
    let path = |path: &str| match path {
        "" => Err(Failure::config(format!("--console {text}: names no file"))),
        _ => Ok(PathBuf::from(path)),
    };
    match text.split_once('=') {
        None if text == "stdio" => Ok(ConsoleConfig::Stdio),
        None if text == "pty" => Ok(ConsoleConfig::Pty),
        None if text == "none" => Ok(ConsoleConfig::None),
        Some(("file", name)) => Ok(ConsoleConfig::File(path(name)?)),
        Some(("unix", name)) => Ok(ConsoleConfig::Unix(path(name)?)),
        _ => Err(Failure::config(format!(
            "--console {text}: not one of stdio, file=F, pty, unix=S, none"
        ))),
    }
}

/// Splits `key=value,flag,…`; a comma in a value is written twice.
fn split_keys(text: &str) -> Vec<(String, Option<String>)> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let last = parts.len() - 1;
        if character != ',' {
            parts[last].push(character);
        } else if characters.next_if_eq(&',').is_some() {
            parts[last].push(',');
        } else {
            parts.push(String::new());
        }
    }
    parts
        .into_iter()
        .map(|part| match part.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (part, None),
        })
        .collect()
}

fn once<T>(slot: &mut Option<T>, key: &str, value: T) -> Result<(), String> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("{key} is given twice")),
    }
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut path, mut id, mut read_only) = (None, None, None);
        for (key, value) in split_keys(text) {
            match (key.as_str(), value) {
                ("path", Some(value)) if !value.is_empty() => once(&mut path, "path", value)?,
                ("ro", None) => once(&mut read_only, "ro", true)?,
                ("id", Some(value)) => {
                    if value.is_empty() || value.len() > DISK_ID_MAX || !value.is_ascii() {
                        return Err(format!("id must have 1 to {DISK_ID_MAX} ASCII characters"));
                    }
                    once(&mut id, "id", value)?;
                }
                _ => {
                    return Err(format!(
                        "{key:?} is not understood; write path=F[,ro][,id=S] (a comma in a name twice)"
                    ));
                }
            }
        }
        Ok(DiskConfig {
            path: path
                .ok_or("names no file; write path=F[,ro][,id=S]")?
                .into(),
            read_only: read_only.unwrap_or(false),
            id,
        })
    }
}

impl FromStr for NetConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut tap, mut mac) = (None, None);
        for (key, value) in split_keys(text) {
            match (key.as_str(), value) {
                ("tap", Some(value)) => {
                    if value.is_empty()
                        || value.len() >= TAP_NAME_MAX
                        || value.contains(['/', '%', ' ', '\0'])
                    {
                        return Err("tap must be a device's name, of 1 to 15 characters".into());
                    }
                    once(&mut tap, "tap", value)?;
                }
                ("mac", Some(value)) => once(&mut mac, "mac", parse_mac(&value)?)?,
                _ => {
                    return Err(format!(
                        "{key:?} is not understood; write tap=NAME[,mac=XX:XX:XX:XX:XX:XX]"
                    ));
                }
            }
        }
        let tap = tap.ok_or("names no device; write tap=NAME[,mac=…]")?;
        Ok(NetConfig { tap, mac })
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    const MULTICAST: u8 = 1;
    let digits = |part: &str| {
        let plain = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        plain.then(|| u8::from_str_radix(part, 16).ok()).flatten()
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(digits).collect();
    let mac: [u8; 6] = bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| format!("mac {text} is not of the form 02:00:00:00:00:01"))?;
    if mac[0] & MULTICAST != 0 || mac == [0; 6] {
        return Err(format!(
            "mac {text} is not the address of one device; begin with 02"
        ));
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal<T: std::fmt::Debug>(result: Result<T, Failure>) -> String {
        result.unwrap_err().to_string()
    }

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
            let message = refusal(parse_memory(text));
            assert!(message.contains(reason), "{text}: {message}");
            assert!(message.starts_with("--memory"), "{message}");
        }
    }

    #[test]
    fn cpus_have_bounds() {
        assert_eq!(parse_cpus("32").unwrap(), 32);
        for text in ["0", "33", "-1", "two", "", "1.0", "256"] {
            assert!(refusal(parse_cpus(text)).contains("1 to 32"));
        }
    }

    #[test]
    fn disks() {
        let disk: DiskConfig = "path=a=b,,c.img,ro,id=root".parse().unwrap();
        assert_eq!(disk.path, PathBuf::from("a=b,c.img"));
        assert!(disk.read_only);
        assert_eq!(disk.id.as_deref(), Some("root"));
        for bad in [
            "",
            "a.img",
            "path=",
            "path",
            "ro",
            "path=a,ro=1",
            "path=a,path=b",
            "path=a,rw",
            "path=a,",
            "path=a,id=",
            "path=a,id=123456789012345678901",
        ] {
            assert!(bad.parse::<DiskConfig>().is_err(), "{bad}");
        }
    }

    #[test]
    fn networks() {
        let net: NetConfig = "tap=t0,mac=02:00:00:00:00:0a".parse().unwrap();
        assert_eq!(
            (net.tap.as_str(), net.mac),
            ("t0", Some([2, 0, 0, 0, 0, 10]))
        );
        for bad in [
            "",
            "tap=",
            "tap=a/b",
            "tap=a%d",
            "tap=1234567890123456",
            "mac=02:00:00:00:00:0a",
            "tap=a,mac=01:00:00:00:00:00",
            "tap=a,mac=00:00:00:00:00:00",
            "tap=a,mac=2:0:0:0:0:1",
            "tap=a,mac=+2:00:00:00:00:01",
            "tap=a,mac=02:00:00:00:00",
            "tap=a,model=e1000",
        ] {
            assert!(bad.parse::<NetConfig>().is_err(), "{bad}");
        }
    }

    #[test]
    fn consoles() {
        assert_eq!(parse_console("pty").unwrap(), ConsoleConfig::Pty);
        assert_eq!(
            parse_console("file=a=b").unwrap(),
            ConsoleConfig::File("a=b".into())
        );
        for bad in ["", "file", "file=", "unix=", "stdio=1", "serial"] {
            assert!(refusal(parse_console(bad)).starts_with("--console"));
        }
    }

    #[test]
    fn the_command_line_is_appended_or_replaced() {
        let config = |cmdline: &str, no_default_cmdline, console: &str| {
            RawConfig {
                kernel: Some("k".into()),
                cmdline: Some(cmdline.into()),
                no_default_cmdline,
                console: Some(console.into()),
                ..Default::default()
            }
            .validate()
            .map(|config| config.cmdline)
        };
        let line = config("debug", false, "stdio").unwrap();
        assert!(line.starts_with("quiet ") && line.ends_with(" console=ttyS0 debug"));
        assert!(!config("", false, "none").unwrap().contains("console="));
        assert_eq!(config("debug", true, "stdio").unwrap(), "debug");
        assert!(refusal(config(&"x".repeat(2048), true, "none")).starts_with("--cmdline"));
    }

    #[test]
    fn a_tap_serves_one_device() {
        let config = RawConfig {
            kernel: Some("k".into()),
            nets: vec!["tap=a".into(), "tap=a".into()],
            ..Default::default()
        };
        assert!(refusal(config.validate()).contains("twice"));
    }
}
