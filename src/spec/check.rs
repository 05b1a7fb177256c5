//! What a specification must be that comes from a file: nothing says that `config` made it.

use mayfly_boot::layout::{CMDLINE_MAX, PAGE_SIZE, VIRTIO_MAX};
use mayfly_devices::virtio::console::CHANNELS_MAX;

use super::{BlockSpec, DeviceKind, DeviceSpec, MachineSpec, VERSION, check_balloon_size};

/// The most vCPUs of a machine.
pub const CPUS_MAX: u8 = 32;
/// The least memory of a machine, in bytes.
pub const MEMORY_MIN: u64 = 32 << 20;
/// The most memory, in bytes: beyond that, not every CPU has addresses.
const MEMORY_MAX: u64 = 16 << 40;
/// The longest name of a device, and the longest tag of a shared directory (virtio 1.2,
/// 5.11.4), in bytes.
const NAME_MAX: usize = 64;
const TAG_MAX: usize = 36;
/// The longest serial number of a disk, in bytes (virtio 1.2, 5.2.6).
const ID_MAX: usize = 20;
/// The first address of a guest's sockets (virtio 1.2, 5.10.4).
const CID_MIN: u32 = 3;

impl MachineSpec {
    /// Refuses a specification that no machine has, in words.
    pub fn check(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!(
                "the machine's specification has version {}, which this mayfly does not read",
                self.version
            ));
        }
        let memory = self.memory.size;
        let whole = memory.is_multiple_of(PAGE_SIZE);
        if !(MEMORY_MIN..=MEMORY_MAX).contains(&memory) || !whole {
            return Err(format!("no machine has {memory} bytes of memory"));
        }
        if !(1..=CPUS_MAX).contains(&self.cpus) {
            return Err(format!("no machine has {} CPUs", self.cpus));
        }
        let cmdline_max = usize::try_from(CMDLINE_MAX).unwrap_or(usize::MAX);
        if self.cmdline.len() >= cmdline_max || self.cmdline.contains('\0') {
            return Err("no kernel has such a command line".into());
        }
        if self.devices.len() > VIRTIO_MAX {
            return Err(format!("no machine has {} devices", self.devices.len()));
        }
        for (index, device) in self.devices.iter().enumerate() {
            let mut others = self.devices.iter().take(index);
            if !is_name(&device.name) || others.any(|it| it.name == device.name) {
                return Err("a device has an impossible name, or another's".into());
            }
            if !self.may_have(device) {
                return Err(format!("no machine has such a device as {}", device.name));
            }
        }
        Ok(())
    }

    fn may_have(&self, device: &DeviceSpec) -> bool {
        let queues = 1..=self.cpus;
        match &device.kind {
            DeviceKind::Block(BlockSpec {
                id, queues: number, ..
            }) => queues.contains(number) && id.len() <= ID_MAX && id.is_ascii(),
            DeviceKind::Net(net) => queues.contains(&net.queues),
            DeviceKind::Fs { tag } => (1..=TAG_MAX).contains(&tag.len()) && !tag.contains('\0'),
            DeviceKind::Vsock { cid } => (CID_MIN..u32::MAX).contains(cid),
            DeviceKind::Rng | DeviceKind::Console => true,
            DeviceKind::Balloon { size, .. } => check_balloon_size(*size, self.memory.size).is_ok(),
            DeviceKind::Channels { names } => {
                (1..=CHANNELS_MAX).contains(&names.len()) && names.iter().all(|it| is_name(it))
            }
        }
    }
}

fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{BootProtocol, MemorySpec, NetSpec};

    fn spec() -> MachineSpec {
        let device = |name: &str, kind| DeviceSpec {
            name: name.into(),
            kind,
        };
        let disk = DeviceKind::Block(BlockSpec {
            queues: 1,
            ..Default::default()
        });
        MachineSpec {
            version: VERSION,
            cpus: 2,
            memory: MemorySpec::default(),
            cmdline: "quiet".into(),
            boot_protocol: BootProtocol::Auto,
            nested: false,
            watchdog: None,
            devices: vec![
                device("scratch", disk),
                device(
                    "net0",
                    DeviceKind::Net(NetSpec {
                        mac: [2, 0, 0, 0, 0, 1],
                        queues: 2,
                        limits: Default::default(),
                    }),
                ),
                device("vsock", DeviceKind::Vsock { cid: 3 }),
                device("share", DeviceKind::Fs { tag: "t".into() }),
                device("rng", DeviceKind::Rng),
            ],
        }
    }

    /// What somebody may write into a file.
    type Change = fn(&mut MachineSpec);

    #[test]
    fn what_no_machine_is_is_refused() {
        spec().check().unwrap();
        let changes: [Change; 19] = [
            |it| it.version = 0,
            |it| it.cpus = 0,
            |it| it.cpus = 33,
            |it| it.memory.size = 0,
            |it| it.memory.size += 1,
            |it| it.memory.size = !4095,
            |it| it.cmdline = "x".repeat(3000),
            |it| it.cmdline = "a\0b".into(),
            |it| it.devices = vec![it.devices[4].clone(); 2],
            |it| it.devices[4].name = "../x".into(),
            |it| it.devices[4].name = String::new(),
            |it| it.devices[4].kind = DeviceKind::Channels { names: Vec::new() },
            |it| it.devices[2].kind = DeviceKind::Vsock { cid: 2 },
            |it| {
                it.devices[3].kind = DeviceKind::Fs {
                    tag: "x".repeat(37),
                }
            },
            |it| it.cpus = 1,
            |it| it.devices[0].kind = DeviceKind::Block(BlockSpec::default()),
            |it| {
                it.devices[0].kind = DeviceKind::Block(BlockSpec {
                    queues: 1,
                    id: "ä".into(),
                    ..Default::default()
                });
            },
            |it| {
                let names = vec!["a/b".to_owned()];
                it.devices[4].kind = DeviceKind::Channels { names };
            },
            |it| {
                let one = it.devices[4].clone();
                let named = |index| DeviceSpec {
                    name: format!("rng{index}"),
                    ..one.clone()
                };
                it.devices = (0..=VIRTIO_MAX).map(named).collect();
            },
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let mut spec = spec();
            change(&mut spec);
            assert!(spec.check().is_err(), "{index}");
        }
    }
}
