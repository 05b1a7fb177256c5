//! From raw flags to a machine that makes sense: the only place that validates
//! and has defaults. Messages name the flag and the remedy.

mod balloon;
mod console;
mod disk;
mod folder;
mod guest;
mod keys;
mod limits;
mod memory;
mod net;
mod queues;
mod raw;
mod size;
mod vsock;
mod watchdog;

use std::ffi::OsStr;
use std::iter;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use mayfly_boot::{Protocol, cmdline, layout};
use mayfly_devices::virtio::console::CHANNELS_MAX;
use mayfly_protocol::init_words;

pub use self::balloon::{BalloonConfig, check_size as check_balloon_size};
pub use self::console::{ChannelConfig, ConsoleConfig, HostEnd};
pub use self::disk::{BackingConfig, DiskConfig, Format};
pub use self::folder::FolderConfig;
pub use self::keys::{Keys, escape};
pub use self::limits::take_limits;
pub use self::memory::{HugePages, MEMORY_MIN, MemoryConfig};
pub use self::net::{NetConfig, Network, UserConfig, parse_ports};
pub use self::queues::Queues;
pub use self::raw::{BootProtocol, RawConfig};
pub use self::size::parse_size;
pub use self::vsock::VsockConfig;
pub use self::watchdog::WatchdogAction;

use self::guest::GuestFiles;
use crate::control::{NAME_MAX, valid_name};
use crate::failure::{Failure, OrFail};
use crate::kvm::accept::AcceptKvm;
use crate::logging::LogConfig;
use crate::net::user::UserNet;
use crate::sandbox::Mode;

/// The most vCPUs of a VM.
pub const CPUS_MAX: u8 = 32;

/// For a quick and quiet boot of any VM: the clock is known and steady, a panic ends it.
pub const CMDLINE_QUICK: &str = "quiet loglevel=3 panic=-1 tsc=reliable no_timer_check cryptomgr.notests \
                                 rcupdate.rcu_expedited=1";
/// What we have: one serial port and no PCI; a restart is ACPI's.
const CMDLINE_DEVICES: &str = "reboot=acpi pci=off 8250.nr_uarts=1";
const CMDLINE_SERIAL: &str = "console=ttyS0";
/// The driver of the virtio console comes late, by module: until then messages
/// go to the serial port, whose output goes the same way.
const CMDLINE_VIRTIO: &str = "console=hvc0 earlyprintk=ttyS0";

/// A machine, valid as far as can be told without opening anything.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// What the VM is called.
    pub name: String,
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
    /// RAM.
    pub memory: MemoryConfig,
    /// Disks, in the order of their names in the guest.
    pub disks: Vec<DiskConfig>,
    /// Network devices, in the order of their names in the guest.
    pub nets: Vec<NetConfig>,
    /// Folders of the host's; they need memory that is shared.
    pub folders: Vec<FolderConfig>,
    /// Sockets between guest and host.
    pub vsock: Option<VsockConfig>,
    /// A memory balloon, if there is to be one.
    pub balloon: Option<BalloonConfig>,
    /// The console.
    pub console: ConsoleConfig,
    /// Named lines beside it.
    pub channels: Vec<ChannelConfig>,
    /// What a watchdog does, if there is one.
    pub watchdog: Option<WatchdogAction>,
    /// What is logged, and where to.
    pub log: LogConfig,
    /// Where to write the process's id.
    pub pidfile: Option<PathBuf>,
    /// The file systems of an image's layers, lowest first: one disk, before the
    /// others.
    pub layers: Vec<PathBuf>,
    /// Signals do not end it.
    pub ignores_signals: bool,
    /// How its process is surrounded.
    pub sandbox: Mode,
    /// The guest is offered the CPU's means to run VMs.
    pub nested: bool,
    /// Whether a KVM that seems to emulate is used.
    pub accept_kvm: AcceptKvm,
}

impl MachineConfig {
    /// Where the console and the channels end on the host; what each is, and what
    /// asked for it.
    pub fn ends(&self) -> impl Iterator<Item = (&HostEnd, String, String)> {
        let end = &self.console.end;
        let console = (end, "console".to_owned(), format!("--console {end}"));
        let channels = self.channels.iter().map(|channel| {
            let what = format!("channel {}", channel.name);
            (&channel.end, what, channel.flag())
        });
        iter::once(console).chain(channels)
    }

    /// The files and sockets that the VM writes to or makes.
    pub fn written(&self) -> impl Iterator<Item = &Path> {
        let writable = |disk: &&DiskConfig| !disk.read_only;
        let disks = self.disks.iter().filter(writable);
        let channels = self.channels.iter();
        disks
            .map(|disk| disk.path.as_path())
            .chain(self.console.end.path())
            .chain(channels.filter_map(|channel| channel.end.path()))
            .chain(self.vsock.as_ref().map(|vsock| vsock.path.as_path()))
            .chain(self.log.file.as_deref())
            .chain(self.pidfile.as_deref())
    }
}

impl RawConfig {
    /// Validates everything, and fills in the defaults.
    pub fn validate(self) -> Result<MachineConfig, Failure> {
        let name = match self.name {
            Some(name) if valid_name(&name) => name,
            Some(name) => {
                return Err(Failure::config(format!(
                    "--name {name}: write 1 to {NAME_MAX} letters, digits, and . _ -"
                )));
            }
            None => format!("vm-{}", std::process::id()),
        };
        let cpus = self.cpus.as_deref().map_or(Ok(1), parse_cpus)?;
        let memory: MemoryConfig =
            parse_one(self.memory.as_deref(), "--memory")?.unwrap_or_default();
        let balloon: Option<BalloonConfig> = parse_one(self.balloon.as_deref(), "--balloon")?;
        if let (Some(balloon), Some(text)) = (&balloon, &self.balloon) {
            let fits = balloon.check(&memory);
            fits.map_err(|reason| Failure::config(format!("--balloon {text}: {reason}")))?;
        }
        let mut disks = self.disk.iter().map(|text| disk(text));
        let mut disks: Vec<DiskConfig> = disks.by_ref().collect::<Result<_, _>>()?;
        let nets: Vec<NetConfig> = parse_all(&self.net, "--net")?;
        for (text, disk) in self.disk.iter().zip(&disks) {
            check_queues(disk.queues, cpus, "--disk", &text.to_string_lossy())?;
        }
        disks.extend(self.volumes);
        for (text, net) in self.net.iter().zip(&nets) {
            check_queues(net.queues(), cpus, "--net", text)?;
        }
        let vsock: Option<VsockConfig> = parse_one(self.vsock.as_deref(), "--vsock")?;
        let console: ConsoleConfig =
            parse_one(self.console.as_deref(), "--console")?.unwrap_or_default();
        let channels = channels(&self.channel)?;
        // The entropy device is always there, and channels share one.
        let others = 1
            + usize::from(vsock.is_some())
            + usize::from(balloon.is_some())
            + usize::from(console.virtio)
            + usize::from(!channels.is_empty());
        let devices = disks.len() + nets.len();
        if devices + others > layout::VIRTIO_MAX {
            return Err(Failure::config(format!(
                "{devices} disks and network devices are too many; at most {} fit",
                layout::VIRTIO_MAX - others
            )));
        }
        for (index, net) in nets.iter().enumerate() {
            if nets[..index].iter().any(|other| other.flag() == net.flag()) {
                let reason = match net.user() {
                    None => "a TAP device serves one guest device",
                    Some(_) => "both would have the same addresses",
                };
                let flag = net.flag();
                return Err(Failure::config(format!("{flag}: given twice; {reason}")));
            }
        }
        for (index, disk) in disks.iter().enumerate() {
            let same = |other: &&DiskConfig| other.path == disk.path;
            let other = disks[..index].iter().find(same);
            if other.is_some_and(|other| !(other.read_only && disk.read_only)) {
                return Err(Failure::config(format!(
                    "{}: given twice; only a disk with ,ro can be",
                    disk.flag()
                )));
            }
        }
        let mut parts: Vec<&str> = Vec::new();
        if !self.no_default_cmdline {
            parts.extend([CMDLINE_QUICK, CMDLINE_DEVICES]);
            // Where nobody sees it, too: what a kernel that panics says last is kept.
            parts.push(match console.virtio && console.end != HostEnd::None {
                true => CMDLINE_VIRTIO,
                false => CMDLINE_SERIAL,
            });
        }
        let own = self.cmdline.as_deref().unwrap_or_default();
        let addresses = match self.no_default_cmdline {
            true => None,
            false => addresses(&nets, own),
        };
        parts.extend(addresses.as_deref());
        parts.extend(self.cmdline.as_deref());
        let cmdline = parts.join(" ");
        let guest = GuestFiles::choose(self.kernel, self.initrd)?;
        let cmdline = for_init(cmdline, guest.own_init)?;
        cmdline::validate(&cmdline).or_config("--cmdline")?;
        Ok(MachineConfig {
            name,
            kernel: guest.kernel,
            kernel_flag: guest.kernel_flag,
            initrd: guest.initrd,
            cmdline,
            protocol: self.boot_protocol.and_then(BootProtocol::forced),
            cpus,
            memory,
            disks,
            nets,
            folders: Vec::new(),
            vsock,
            balloon,
            console,
            channels,
            watchdog: parse_one(self.watchdog.as_deref(), "--watchdog")?,
            sandbox: self.sandbox.unwrap_or_default(),
            log: parse_one(self.log.as_deref(), "--log")?.unwrap_or_default(),
            pidfile: self.pidfile,
            layers: self.layers,
            ignores_signals: self.ignores_signals,
            nested: self.nested,
            accept_kvm: self.accept_kvm,
        })
    }
}

fn disk(text: &OsStr) -> Result<DiskConfig, Failure> {
    DiskConfig::parse(text)
        .map_err(|error| Failure::config(format!("--disk {}: {error}", text.display())))
}

fn parse_all<T: FromStr<Err = String>>(texts: &[String], flag: &str) -> Result<Vec<T>, Failure> {
    texts
        .iter()
        .filter_map(|text| parse_one(Some(text), flag).transpose())
        .collect()
}

fn parse_one<T: FromStr<Err = String>>(
    text: Option<&str>,
    flag: &str,
) -> Result<Option<T>, Failure> {
    let parse = |text: &str| {
        text.parse()
            .map_err(|error| Failure::config(format!("{flag} {text}: {error}")))
    };
    text.map(parse).transpose()
}

fn channels(texts: &[String]) -> Result<Vec<ChannelConfig>, Failure> {
    let channels: Vec<ChannelConfig> = parse_all(texts, "--channel")?;
    if channels.len() > CHANNELS_MAX {
        return Err(Failure::config(format!(
            "--channel: {} are too many; at most {CHANNELS_MAX} fit",
            channels.len()
        )));
    }
    for (index, channel) in channels.iter().enumerate() {
        if channels[..index]
            .iter()
            .any(|other| other.name == channel.name)
        {
            return Err(Failure::config(format!(
                "--channel name={}: given twice; choose another name",
                channel.name
            )));
        }
    }
    Ok(channels)
}

/// Sees to it that Linux takes a command line with all its words for init.
fn for_init(cmdline: String, own_init: bool) -> Result<String, Failure> {
    match init_words::count(cmdline.as_bytes()) {
        ..=init_words::WORDS_MAX => Ok(cmdline),
        _ if own_init => Ok(init_words::hidden(&cmdline)),
        number => Err(Failure::config(format!(
            "--cmdline: {number} words behind -- are too many: Linux gives init at most {}; \
             mayfly's own init reads all that stand behind -- --",
            init_words::WORDS_MAX
        ))),
    }
}

/// What the guest's network of sockets needs of the kernel's command line, if
/// that says nothing of addresses.
fn addresses(nets: &[NetConfig], cmdline: &str) -> Option<String> {
    let mut words = cmdline.split_whitespace().take_while(|&word| word != "--");
    if words.any(|word| word.starts_with("ip=")) {
        return None;
    }
    let (index, user) = nets
        .iter()
        .enumerate()
        .find_map(|(index, net)| Some((index, net.user()?)))?;
    Some(UserNet::of(user).cmdline(&format!("eth{index}")))
}

fn check_queues(queues: Queues, cpus: u8, flag: &str, text: &str) -> Result<(), Failure> {
    let checked = queues.check(cpus);
    checked.map_err(|error| Failure::config(format!("{flag} {text}: {error}")))
}

fn parse_cpus(text: &str) -> Result<u8, Failure> {
    match text.parse() {
        Ok(cpus @ 1..=CPUS_MAX) => Ok(cpus),
        _ => Err(Failure::config(format!(
            "--cpus {text}: not a number from 1 to {CPUS_MAX}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn refusal<T: std::fmt::Debug>(result: Result<T, Failure>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn cpus_have_bounds() {
        assert_eq!(parse_cpus("32").unwrap(), 32);
        for text in ["0", "33", "-1", "two", "", "1.0", "256"] {
            assert!(refusal(parse_cpus(text)).contains("1 to 32"));
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
        let none = config("", false, "none").unwrap();
        assert!(none.contains("console=ttyS0"), "{none}");
        let line = config("", false, "virtio").unwrap();
        assert!(line.contains("console=hvc0") && !line.contains("console=ttyS0"));
        assert_eq!(config("debug", true, "stdio").unwrap(), "debug");
        assert!(refusal(config(&"x".repeat(2048), true, "none")).starts_with("--cmdline"));
    }

    #[test]
    fn linux_is_given_no_more_words_than_it_takes() {
        let words = |number: usize| format!("quiet -- run{}", " x".repeat(number - 1));
        for own_init in [false, true] {
            assert_eq!(for_init(words(32), own_init).unwrap(), words(32));
        }
        assert!(refusal(for_init(words(33), false)).contains("33 words behind -- are too many"));
        let hidden = for_init(words(33), true).unwrap();
        assert!(hidden.starts_with("quiet -- -- run x "), "{hidden}");
        let hidden = words(33).replacen("--", "-- --", 1);
        assert_eq!(for_init(hidden.clone(), false).unwrap(), hidden);
    }

    #[test]
    fn queues_need_cpus() {
        let config = |queues: &str| RawConfig {
            kernel: Some("k".into()),
            cpus: Some("2".into()),
            disk: vec![format!("path=a,queues={queues}").into()],
            net: vec![format!("tap=a,queues={queues}")],
            ..Default::default()
        };
        assert!(refusal(config("3").validate()).contains("queues=3 are more than"));
        for queues in ["2", "cpus"] {
            let config = config(queues).validate().unwrap();
            assert_eq!(config.nets[0].queues().number(config.cpus), 2);
        }
    }

    #[test]
    fn a_tap_serves_one_device() {
        let config = RawConfig {
            kernel: Some("k".into()),
            net: vec!["tap=a".into(), "tap=a".into()],
            ..Default::default()
        };
        assert!(refusal(config.validate()).contains("twice"));
    }

    #[test]
    fn a_network_of_sockets_gives_its_addresses() {
        let config = |nets: &[&str], cmdline: &str, no_default_cmdline| {
            let config = RawConfig {
                kernel: Some("k".into()),
                net: nets.iter().map(|&net| net.to_owned()).collect(),
                cmdline: Some(cmdline.into()),
                no_default_cmdline,
                ..Default::default()
            };
            config.validate().map(|config| config.cmdline)
        };
        let own = "ip=10.0.2.15::10.0.2.2:255.255.255.0::eth1:off:9.9.9.9";
        let nets = ["tap=a", "user,dns=9.9.9.9"];
        let given = config(&nets, "-- ip=x", false).unwrap();
        assert!(given.ends_with(&format!("{own} -- ip=x")), "{given}");
        assert!(!config(&nets, "ip=off", false).unwrap().contains(own));
        assert_eq!(config(&nets, "quiet", true).unwrap(), "quiet");
        assert!(!config(&nets[..1], "", false).unwrap().contains("ip="));
        assert!(refusal(config(&["user", "user"], "", false)).contains("same addresses"));
    }

    #[test]
    fn channels_are_few_and_have_names_of_their_own() {
        let config = |names: &[String]| {
            RawConfig {
                kernel: Some("k".into()),
                channel: names
                    .iter()
                    .map(|name| format!("name={name},pty"))
                    .collect(),
                ..Default::default()
            }
            .validate()
        };
        let names: Vec<_> = (0..=CHANNELS_MAX).map(|index| index.to_string()).collect();
        assert!(config(&names[1..]).is_ok());
        assert!(refusal(config(&names)).contains("too many"));
        assert!(refusal(config(&["a".into(), "a".into()])).contains("twice"));
    }
}
