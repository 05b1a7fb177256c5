//! The specification of a machine: all that its guest can see, and nothing of its host.
//!
//! It is made once, by `config`, from flags, TOML or an image's options, and nothing changes
//! it afterwards. The VMM process gets it in a message and builds the machine from it, so it
//! holds no path, no user and no flag. The host's ends of devices are found by their device's
//! name.

pub mod check;
mod device;
mod memory;

use mayfly_devices::rate_limiter::Limits;
use serde::{Deserialize, Serialize};

pub use self::device::{BlockSpec, DeviceKind, DeviceSpec, NetSpec};
pub use self::memory::{HugePages, MemorySpec, check_balloon_size};

/// The version of this format. A VMM process refuses another one.
pub const VERSION: u32 = 1;

/// A machine as its guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// The version of the format, [`VERSION`].
    pub version: u32,
    /// The number of vCPUs, one or more.
    pub cpus: u8,
    /// RAM.
    pub memory: MemorySpec,
    /// The kernel's whole command line.
    pub cmdline: String,
    /// How the kernel is entered.
    pub boot_protocol: BootProtocol,
    /// The guest is offered the CPU's virtualization extensions.
    pub nested: bool,
    /// What an expired watchdog does; without it there is no watchdog device.
    pub watchdog: Option<WatchdogAction>,
    /// The virtio devices. A device's place in this order decides its address and interrupt,
    /// and the name that Linux gives it.
    pub devices: Vec<DeviceSpec>,
}

/// How to enter the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
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

/// What happens when the guest does not feed its watchdog in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WatchdogAction {
    /// The VM ends as one that hung.
    Crash,
    /// The VM ends as one that restarted.
    Reset,
    /// The guest gets a non-maskable interrupt, to show where it is; if it is
    /// late once more, the VM ends as one that hung.
    Nmi,
}

impl MachineSpec {
    /// The device of a name.
    pub fn device(&self, name: &str) -> Option<&DeviceSpec> {
        self.devices.iter().find(|device| device.name == name)
    }

    /// The specification without what may differ between a saved machine and those that go on
    /// from it: what a guest asks for anew each time, and what only the host knows. A machine
    /// can go on as another one if their shapes are equal.
    #[must_use]
    pub fn shape(&self) -> Self {
        let mut shape = self.clone();
        for device in &mut shape.devices {
            match &mut device.kind {
                DeviceKind::Block(block) => {
                    block.id = String::new();
                    block.limits = Limits::default();
                    device.name = String::new();
                }
                DeviceKind::Net(net) => net.limits = Limits::default(),
                DeviceKind::Fs { .. }
                | DeviceKind::Vsock { .. }
                | DeviceKind::Rng
                | DeviceKind::Balloon { .. }
                | DeviceKind::Console
                | DeviceKind::Channels { .. } => {}
            }
        }
        shape
    }

    /// Why no machine of this specification can be saved, or go on from a saved one.
    pub fn why_not_saved(&self) -> Option<&'static str> {
        let device = |device: &DeviceSpec| match device.kind {
            DeviceKind::Fs { .. } => Some("it shares a directory with the host"),
            DeviceKind::Balloon { .. } => Some("it has a memory balloon"),
            DeviceKind::Console | DeviceKind::Channels { .. } => {
                Some("it has a virtio console or channels")
            }
            DeviceKind::Block(_)
            | DeviceKind::Net(_)
            | DeviceKind::Vsock { .. }
            | DeviceKind::Rng => None,
        };
        match self.memory {
            MemorySpec {
                hugepages: Some(_), ..
            } => Some("its memory is of huge pages"),
            MemorySpec { shared: true, .. } => Some("its memory is shared"),
            _ if self.nested => Some("it may run VMs of its own"),
            _ if self.watchdog.is_some() => Some("it has a watchdog"),
            _ => self.devices.iter().find_map(device),
        }
    }

    /// The path that Linux gives a disk, such as `/dev/vda`: the first disk of the order is
    /// `vda`, the one after `vdz` is `vdaa` (`drivers/block/virtio_blk.c`).
    pub fn disk_path(&self, name: &str) -> Option<String> {
        let is_disk = |device: &&DeviceSpec| matches!(device.kind, DeviceKind::Block(_));
        let mut disks = self.devices.iter().filter(is_disk);
        let index = disks.position(|disk| disk.name == name)?;
        Some(format!("/dev/vd{}", letters(index)))
    }
}

/// `a` to `z`, then `aa` and so on.
fn letters(index: usize) -> String {
    const LETTERS: usize = 26;
    let letter = u8::try_from(index % LETTERS).map_or('?', |letter| char::from(b'a' + letter));
    match index / LETTERS {
        0 => letter.to_string(),
        more => format!("{}{letter}", letters(more - 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_have_the_names_that_linux_gives_them() {
        let names: Vec<_> = [0, 1, 25, 26, 51, 52, 701, 702].map(letters).into();
        assert_eq!(names, ["a", "b", "z", "aa", "az", "ba", "zz", "aaa"]);
        let device = |name: &str, kind| DeviceSpec {
            name: name.into(),
            kind,
        };
        let spec = MachineSpec {
            version: VERSION,
            cpus: 1,
            memory: MemorySpec::default(),
            cmdline: String::new(),
            boot_protocol: BootProtocol::Auto,
            nested: false,
            watchdog: None,
            devices: vec![
                device("layers", DeviceKind::Block(BlockSpec::default())),
                device("rng", DeviceKind::Rng),
                device("scratch", DeviceKind::Block(BlockSpec::default())),
            ],
        };
        assert_eq!(spec.disk_path("layers").as_deref(), Some("/dev/vda"));
        assert_eq!(spec.disk_path("scratch").as_deref(), Some("/dev/vdb"));
        assert_eq!(spec.disk_path("rng"), None);
        assert!(spec.device("rng").is_some());
        // It travels unchanged.
        let text = serde_json::to_vec(&spec).unwrap();
        assert_eq!(serde_json::from_slice::<MachineSpec>(&text).unwrap(), spec);
    }
}
