//! From options to a machine that makes sense.

use super::console::{ChannelConfig, ConsoleConfig, HostEnd};
use super::disk::DiskConfig;
use super::folder::FolderConfig;
use super::guest::GuestFiles;
use super::host::HostFacts;
use super::host_ends::{Host, HostNet};
use super::options::MachineOptions;
use super::size::size_text;
use super::vsock::VsockConfig;
use std::collections::BTreeMap;
use std::iter;
use std::path::{Path, PathBuf};

use mayfly_boot::layout;
use mayfly_devices::virtio::console::CHANNELS_MAX;

use crate::control::{NAME_MAX, valid_name};
use crate::failure::Failure;
use crate::kvm::accept::AcceptKvm;
use crate::logging::LogConfig;
use crate::net::user::UserNet;
use crate::spec::{BlockSpec, DeviceKind, DeviceSpec, MachineSpec, MemorySpec, NetSpec, VERSION};
use mayfly_sandbox::Mode;

/// The most rules of one network: they are sent to the VMM process in one message.
const RULES_MAX: usize = 1000;
/// The name of the disk with an image's layers, and its serial number in the guest.
pub const LAYERS: &str = "layers";

/// A machine, valid as far as can be told without opening anything.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// What the VM is called.
    pub name: String,
    /// All that its guest can see.
    pub spec: MachineSpec,
    /// The kernel and the initial RAM disk.
    pub guest: GuestFiles,
    /// The files of the disk [`LAYERS`].
    pub layers: Vec<PathBuf>,
    /// Disks.
    pub disks: Vec<Host<DiskConfig>>,
    /// Network devices.
    pub nets: Vec<Host<HostNet>>,
    /// Directories.
    pub folders: Vec<Host<FolderConfig>>,
    /// Sockets between guest and host.
    pub vsock: Option<VsockConfig>,
    /// The console.
    pub console: ConsoleConfig,
    /// Named lines beside it.
    pub channels: Vec<ChannelConfig>,
    /// What is logged, and where to.
    pub log: LogConfig,
    /// Where to write the supervisor's process id.
    pub pidfile: Option<PathBuf>,
    /// The folder of its control socket, if it is not listed among the user's VMs.
    pub control: Option<PathBuf>,
    /// How the VMM process is surrounded.
    pub sandbox: Mode,
    /// Whether a KVM that seems to emulate is used.
    pub accept_kvm: AcceptKvm,
    /// Signals do not end it.
    pub ignores_signals: bool,
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
        let disks = self.disks.iter().map(|disk| &disk.config);
        let writable = disks.filter(|disk| !disk.read_only);
        let channels = self.channels.iter();
        writable
            .map(|disk| disk.path.as_path())
            .chain(self.console.end.path())
            .chain(channels.filter_map(|channel| channel.end.path()))
            .chain(self.vsock.as_ref().map(|vsock| vsock.path.as_path()))
            .chain(self.log.file.as_deref())
            .chain(self.pidfile.as_deref())
    }

    /// What asked for each device, by its name, for messages.
    pub fn flags(&self) -> BTreeMap<String, String> {
        let mut flags = BTreeMap::new();
        for device in &self.spec.devices {
            let flag = match &device.kind {
                DeviceKind::Rng => "the entropy device".to_owned(),
                DeviceKind::Balloon { .. } => "--balloon".to_owned(),
                DeviceKind::Console => format!("--console {}", self.console.end),
                DeviceKind::Block(_) => "the image's layers".to_owned(),
                DeviceKind::Channels { .. } => match self.channels.first() {
                    Some(first) => first.flag(),
                    None => "--channel".to_owned(),
                },
                DeviceKind::Net(_) | DeviceKind::Fs { .. } | DeviceKind::Vsock { .. } => continue,
            };
            flags.insert(device.name.clone(), flag);
        }
        let disks = self.disks.iter();
        flags.extend(disks.map(|disk| (disk.device.clone(), disk.config.flag())));
        let nets = self.nets.iter();
        flags.extend(nets.map(|net| (net.device.clone(), net.config.config.flag())));
        let folders = self.folders.iter();
        flags.extend(folders.map(|folder| (folder.device.clone(), folder.config.flag.clone())));
        flags.extend(self.vsock.iter().map(|it| ("vsock".to_owned(), it.flag())));
        flags
    }
}

impl MachineOptions {
    /// [Checks](MachineOptions::check) the options, and makes the specification.
    pub fn validate(self, guest: GuestFiles, host: &HostFacts) -> Result<MachineConfig, Failure> {
        self.check(host)?;
        let name = self.name.clone();
        let name = name.unwrap_or_else(|| format!("vm-{}", std::process::id()));
        let memory = self.memory();
        let nets = name_devices("net", &self.nets, |net| HostNet {
            config: net.clone(),
            user: net.user().map(|user| UserNet::new(user, &host.network)),
        });
        let mut disks = name_devices("disk", &self.disks, DiskConfig::clone);
        for disk in &mut disks {
            if let Some(name) = &disk.config.name {
                disk.device = name.clone();
            }
        }
        let folders = name_devices("fs", &self.folders, FolderConfig::clone);
        let devices = self.devices(&disks, &nets, &folders, host);
        check_number(&devices)?;
        let spec = MachineSpec {
            version: VERSION,
            cpus: self.cpus,
            memory,
            cmdline: self.cmdline(&nets, guest.own_init)?,
            boot_protocol: self.boot_protocol,
            nested: self.nested,
            watchdog: self.watchdog,
            devices,
        };
        Ok(MachineConfig {
            name,
            spec,
            guest,
            layers: self.layers,
            disks,
            nets,
            folders,
            vsock: self.vsock,
            console: self.console,
            channels: self.channels,
            log: self.log,
            pidfile: self.pidfile,
            control: None,
            sandbox: self.sandbox,
            accept_kvm: self.accept_kvm,
            ignores_signals: self.ignores_signals,
        })
    }

    /// Checks everything that spans several options, or the host.
    pub fn check(&self, host: &HostFacts) -> Result<(), Failure> {
        if let Some(name) = self.name.as_deref().filter(|name| !valid_name(name)) {
            return Err(Failure::config(format!(
                "--name {name}: write 1 to {NAME_MAX} letters, digits, and . _ -"
            )));
        }
        self.check_memory(&self.memory(), host)?;
        self.check_queues()?;
        self.check_doubles()
    }

    /// RAM, which another process is to see where it serves directories.
    fn memory(&self) -> MemorySpec {
        MemorySpec {
            shared: self.memory.shared || !self.folders.is_empty(),
            ..self.memory
        }
    }

    fn check_memory(&self, memory: &MemorySpec, host: &HostFacts) -> Result<(), Failure> {
        let fits = super::memory::check(memory, host);
        fits.map_err(|reason| {
            Failure::config(format!("--memory {}: {reason}", size_text(memory.size)))
        })?;
        let fits = self.balloon.map_or(Ok(()), |balloon| balloon.check(memory));
        let balloon = self.balloon.map_or(0, |balloon| balloon.size);
        fits.map_err(|reason| {
            Failure::config(format!("--balloon {}: {reason}", size_text(balloon)))
        })
    }

    fn check_queues(&self) -> Result<(), Failure> {
        let disks = self.disks.iter().map(|disk| (disk.queues, disk.flag()));
        let nets = self.nets.iter().map(|net| (net.queues(), net.flag()));
        for (queues, flag) in disks.chain(nets) {
            let checked = queues.check(self.cpus);
            checked.map_err(|error| Failure::config(format!("{flag}: {error}")))?;
        }
        Ok(())
    }

    /// Refuses what can be had only once, and is asked for twice.
    fn check_doubles(&self) -> Result<(), Failure> {
        for (index, net) in self.nets.iter().enumerate() {
            if self.nets[..index].iter().any(|it| it.flag() == net.flag()) {
                let reason = match net.user() {
                    None => "a TAP device serves one guest device",
                    Some(_) => "both would have the same addresses",
                };
                let flag = net.flag();
                return Err(Failure::config(format!("{flag}: given twice; {reason}")));
            }
        }
        for (index, disk) in self.disks.iter().enumerate() {
            let same = |other: &&DiskConfig| other.path == disk.path;
            let other = self.disks[..index].iter().find(same);
            if other.is_some_and(|other| !(other.read_only && disk.read_only)) {
                return Err(Failure::config(format!(
                    "{}: given twice; only a disk with ,ro can be",
                    disk.flag()
                )));
            }
        }
        let rules = self.nets.iter().filter_map(|net| net.user());
        if let Some(number) = rules
            .map(|user| user.allow.len())
            .find(|it| *it > RULES_MAX)
        {
            return Err(Failure::config(format!(
                "--net user: {number} rules of allow are too many; at most {RULES_MAX} fit"
            )));
        }
        if self.channels.len() > CHANNELS_MAX {
            return Err(Failure::config(format!(
                "--channel: {} are too many; at most {CHANNELS_MAX} fit",
                self.channels.len()
            )));
        }
        for (index, channel) in self.channels.iter().enumerate() {
            let name = &channel.name;
            if self.channels[..index].iter().any(|it| it.name == *name) {
                return Err(Failure::config(format!(
                    "--channel name={name}: given twice; choose another name"
                )));
            }
        }
        Ok(())
    }

    /// The virtio devices, in the order of their addresses.
    fn devices(
        &self,
        disks: &[Host<DiskConfig>],
        nets: &[Host<HostNet>],
        folders: &[Host<FolderConfig>],
        host: &HostFacts,
    ) -> Vec<DeviceSpec> {
        let device = |name: &str, kind| DeviceSpec {
            name: name.to_owned(),
            kind,
        };
        let layers = (!self.layers.is_empty()).then(|| {
            let block = BlockSpec {
                read_only: true,
                id: LAYERS.to_owned(),
                queues: 1,
                ..BlockSpec::default()
            };
            device(LAYERS, DeviceKind::Block(block))
        });
        let disks = disks.iter().map(|disk| {
            let block = DeviceKind::Block(disk.config.spec(self.cpus));
            device(&disk.device, block)
        });
        let nets = nets.iter().map(|net| {
            let config = &net.config.config;
            let spec = NetSpec {
                mac: config
                    .mac
                    .unwrap_or_else(|| host.mac_address(config.seed())),
                queues: config.queues().number(self.cpus),
                limits: config.limits,
            };
            device(&net.device, DeviceKind::Net(spec))
        });
        let folders = folders.iter().map(|folder| {
            let tag = folder.config.tag.clone();
            device(&folder.device, DeviceKind::Fs { tag })
        });
        let vsock = self.vsock.as_ref();
        let vsock = vsock.map(|vsock| device("vsock", DeviceKind::Vsock { cid: vsock.cid }));
        let balloon = self.balloon.map(|balloon| {
            let (size, abilities) = (balloon.size, balloon.abilities);
            device("balloon", DeviceKind::Balloon { size, abilities })
        });
        let console = self.console.virtio;
        let console = console.then(|| device("console", DeviceKind::Console));
        let channels = (!self.channels.is_empty()).then(|| {
            let names = self.channels.iter().map(|it| it.name.clone()).collect();
            device("channels", DeviceKind::Channels { names })
        });
        let others = [vsock, Some(device("rng", DeviceKind::Rng)), balloon];
        let lines = [console, channels];
        layers
            .into_iter()
            .chain(disks)
            .chain(nets)
            .chain(folders)
            .chain(others.into_iter().flatten())
            .chain(lines.into_iter().flatten())
            .collect()
    }
}

/// Names each `KIND0`, `KIND1` and so on.
fn name_devices<T, U>(kind: &str, all: &[T], of: impl Fn(&T) -> U) -> Vec<Host<U>> {
    let named = all.iter().enumerate().map(|(index, config)| Host {
        device: format!("{kind}{index}"),
        config: of(config),
    });
    named.collect()
}

fn check_number(devices: &[DeviceSpec]) -> Result<(), Failure> {
    let is_users = |device: &&DeviceSpec| {
        matches!(
            device.kind,
            DeviceKind::Block(_) | DeviceKind::Net(_) | DeviceKind::Fs { .. }
        )
    };
    let users = devices.iter().filter(is_users).count();
    let others = devices.len() - users;
    if devices.len() > layout::VIRTIO_MAX {
        return Err(Failure::config(format!(
            "{users} disks, directories and network devices are too many; at most {} fit",
            layout::VIRTIO_MAX - others
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::keys::FromKeys;
    use super::testing::{refusal, validate};
    use super::*;

    fn of<T: FromKeys>(texts: &[&str]) -> Vec<T> {
        let all = texts.iter().map(|text| T::from_text(text.as_ref()));
        all.collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn queues_need_cpus() {
        let options = |queues: &str| MachineOptions {
            cpus: 2,
            disks: of(&[&format!("path=a,queues={queues}")]),
            nets: of(&[&format!("tap=a,queues={queues}")]),
            ..MachineOptions::default()
        };
        assert!(refusal(validate(options("3"))).contains("queues=3 are more than"));
        for queues in ["2", "cpus"] {
            let config = validate(options(queues)).unwrap();
            let all = config.spec.devices.iter().filter_map(|it| match &it.kind {
                DeviceKind::Block(disk) => Some(disk.queues),
                DeviceKind::Net(net) => Some(net.queues),
                _ => None,
            });
            assert_eq!(all.collect::<Vec<_>>(), [2, 2]);
        }
    }

    #[test]
    fn devices_have_names_and_an_order() {
        let options = MachineOptions {
            layers: vec!["l".into()],
            disks: of(&["path=a", "path=b,ro,id=x"]),
            nets: of(&["tap=a", "user"]),
            folders: vec![FolderConfig {
                path: "/f".into(),
                tag: "v0".into(),
                read_only: false,
                flag: "-v /f:/f".into(),
            }],
            vsock: of(&["cid=3,unix=s"]).pop(),
            balloon: of(&["0"]).pop(),
            console: of(&["pty,virtio"]).remove(0),
            channels: of(&["name=a,pty"]),
            ..MachineOptions::default()
        };
        let config = validate(options).unwrap();
        let names: Vec<_> = config.spec.devices.iter().map(|it| &it.name[..]).collect();
        let expected = [
            "layers", "disk0", "disk1", "net0", "net1", "fs0", "vsock", "rng", "balloon",
            "console", "channels",
        ];
        assert_eq!(names, expected);
        assert!(config.spec.memory.shared);
        let flags = config.flags();
        assert!(
            names.iter().all(|name| flags.contains_key(*name)),
            "{flags:?}"
        );
        assert_eq!(flags["disk1"], "--disk path=b");
        assert_eq!(flags["net1"], "--net user");
        assert_eq!(flags["fs0"], "-v /f:/f");
        assert_eq!(flags["channels"], "--channel name=a,pty");
        assert_eq!(config.spec.disk_path("disk1").as_deref(), Some("/dev/vdc"));
    }

    #[test]
    fn more_devices_than_fit_are_refused() {
        let paths: Vec<_> = (0..layout::VIRTIO_MAX)
            .map(|it| format!("path={it}"))
            .collect();
        let paths: Vec<_> = paths.iter().map(String::as_str).collect();
        let options = |number| MachineOptions {
            disks: of(&paths[..number]),
            ..MachineOptions::default()
        };
        assert!(validate(options(layout::VIRTIO_MAX - 1)).is_ok());
        let refused = refusal(validate(options(layout::VIRTIO_MAX)));
        let expected = format!("at most {} fit", layout::VIRTIO_MAX - 1);
        assert!(refused.contains(&expected), "{refused}");
    }

    #[test]
    fn what_there_is_once_is_not_had_twice() {
        let nets = |texts: &[&str]| MachineOptions {
            nets: of(texts),
            ..MachineOptions::default()
        };
        assert!(refusal(validate(nets(&["tap=a", "tap=a"]))).contains("twice"));
        let refused = refusal(validate(nets(&["user", "user"])));
        assert!(refused.contains("same addresses"), "{refused}");
        let disks = |texts: &[&str]| MachineOptions {
            disks: of(texts),
            ..MachineOptions::default()
        };
        assert!(validate(disks(&["path=a,ro", "path=a,ro"])).is_ok());
        assert!(refusal(validate(disks(&["path=a,ro", "path=a"]))).contains("twice"));
    }

    #[test]
    fn channels_are_few_and_have_names_of_their_own() {
        let config = |names: &[String]| {
            let texts: Vec<_> = names
                .iter()
                .map(|name| format!("name={name},pty"))
                .collect();
            let texts: Vec<_> = texts.iter().map(String::as_str).collect();
            validate(MachineOptions {
                channels: of(&texts),
                ..MachineOptions::default()
            })
        };
        let names: Vec<_> = (0..=CHANNELS_MAX).map(|index| index.to_string()).collect();
        assert!(config(&names[1..]).is_ok());
        assert!(refusal(config(&names)).contains("too many"));
        assert!(refusal(config(&["a".into(), "a".into()])).contains("twice"));
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Validates options on a host that has all that they need.
    pub fn validate(options: MachineOptions) -> Result<MachineConfig, Failure> {
        let host = HostFacts {
            memory: u64::MAX,
            ..HostFacts::default()
        };
        options.validate(GuestFiles::named("k".as_ref(), None), &host)
    }

    pub fn refusal<T: std::fmt::Debug>(result: Result<T, Failure>) -> String {
        result.unwrap_err().to_string()
    }
}
