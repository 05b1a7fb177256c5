//! Places the virtio devices: one arm a device.

use std::sync::{Arc, Mutex};

use mayfly_boot::{MmioDevice, layout};
use mayfly_devices::line::Line;
use mayfly_devices::rate_limiter::LimitHandle;
use mayfly_devices::serial::Serial;
use mayfly_devices::virtio::balloon::{Balloon, BalloonHandle};
use mayfly_devices::virtio::block::{Block, Prepare};
use mayfly_devices::virtio::console::{Channels, Console};
use mayfly_devices::virtio::device::{DeviceId, VirtioDevice};
use mayfly_devices::virtio::fs::Fs;
use mayfly_devices::virtio::mmio::{
    INTERRUPT_ACK_OFFSET, NOTIFY_OFFSET, QUEUES_ACKNOWLEDGED, VirtioMmio,
};
use mayfly_devices::virtio::net::{Backend, Net};
use mayfly_devices::virtio::rng::Rng;
use mayfly_devices::virtio::vsock::{Vsock, VsockState};
use vmm_sys_util::eventfd::EventFd;

use super::build::{duplicate, event};
use super::link::Errands;
use super::resources::{HostNet, Resources};
use crate::config::{HostEnd, MachineConfig, NetConfig, Network};
use crate::console::Connection;
use crate::failure::{Failure, OrFail};
use crate::kvm::memory::GuestMemory;
use crate::kvm::reclaim::Reclaimer;
use crate::kvm::vcpu::Buses;
use crate::kvm::vm::Vm;
use crate::virtiofsd::Served;

/// A virtio device in its place.
pub struct Slot {
    /// What it is called in metrics and commands: `disk0`, `net0`, `rng`.
    pub name: String,
    /// What asked for it.
    pub flag: String,
    /// Its kind.
    pub kind: DeviceId,
    /// Where the guest finds it.
    pub place: MmioDevice,
    /// The device.
    pub transport: Arc<Mutex<VirtioMmio>>,
    /// Changes its limits, if it can have some.
    pub limits: Option<LimitHandle>,
}

/// A device without a place.
struct Unplaced {
    name: String,
    /// What asked for it, for messages.
    flag: String,
    device: Box<dyn VirtioDevice>,
    limits: Option<LimitHandle>,
}

#[derive(Default)]
struct Devices(Vec<Unplaced>);

impl Devices {
    fn add(
        &mut self,
        name: impl Into<String>,
        flag: impl Into<String>,
        device: impl VirtioDevice + 'static,
    ) {
        self.add_limited(name, flag, device, None);
    }

    fn add_limited(
        &mut self,
        name: impl Into<String>,
        flag: impl Into<String>,
        device: impl VirtioDevice + 'static,
        limits: Option<LimitHandle>,
    ) {
        self.0.push(Unplaced {
            name: name.into(),
            flag: flag.into(),
            device: Box::new(device),
            limits,
        });
    }
}

/// What was attached.
pub struct Attached {
    /// The virtio devices.
    pub slots: Vec<Slot>,
    /// The console, then the channels.
    pub connections: Vec<Connection>,
    /// Commands the balloon.
    pub balloon: Option<BalloonHandle>,
}

/// Makes all devices, in the order of their names in the guest.
pub fn attach(
    config: &MachineConfig,
    resources: &mut Resources,
    serial: (Arc<Mutex<Serial>>, EventFd),
    vm: &Vm,
    memory: &GuestMemory,
    (errands, prepare): (&Arc<Errands>, &Arc<dyn Prepare>),
    buses: &mut Buses,
) -> Result<Attached, Failure> {
    let mut devices = Devices::default();
    if let Some(disk) = resources.layers.take() {
        let device = Block::with_prepared(disk, prepare).or_host("the image's layers")?;
        devices.add("layers", "the image's layers", device);
    }
    for (index, (disk, from)) in resources.disks.drain(..).zip(&config.disks).enumerate() {
        let flag = from.flag();
        let block = Block::with_prepared(disk, prepare).or_host(&flag)?;
        let limits = Some(block.limit_handle());
        devices.add_limited(format!("disk{index}"), flag, block, limits);
    }
    // Those of networks come first.
    let mut helper = 0;
    for (index, (host, from)) in resources.nets.drain(..).zip(&config.nets).enumerate() {
        let flag = from.flag();
        let ends = match host {
            HostNet::Tap(files) => files.into_iter().map(Backend::tap).collect(),
            HostNet::Passt(socket, filter) => {
                helper += 1;
                vec![Backend::stream(socket, Some(filter)).or_host(&flag)?]
            }
        };
        let net = Net::new(ends, mac_address(from), from.limits).or_host(&flag)?;
        let limits = Some(net.limit_handle());
        devices.add_limited(format!("net{index}"), flag, net, limits);
    }
    for (index, (number, served)) in (helper..).zip(resources.folders.drain(..)).enumerate() {
        let Served {
            flag,
            tag,
            frontend,
        } = served;
        let errands = errands.clone();
        let end = Box::new(move || errands.end_helper(number));
        let fs = Fs::new(frontend, &tag, end).or_host(&flag)?;
        devices.add(format!("fs{index}"), flag, fs);
    }
    if let (Some(listener), Some(from)) = (resources.vsock.take(), &config.vsock) {
        let flag = from.flag();
        let state = VsockState::new(from.cid);
        let errands = errands.clone();
        let connector = Box::new(move |port| errands.connect(port));
        let device = Vsock::new(state, listener, connector);
        devices.add("vsock", flag.clone(), device.or_host(&flag)?);
    }
    let random = resources
        .random
        .try_clone()
        .or_host("duplicating a descriptor")?;
    devices.add("rng", "the entropy device", Rng::new(random));
    let mut balloon = None;
    if let Some(from) = &config.balloon {
        let reclaimer = Reclaimer::new(memory, &config.memory);
        let device = Balloon::new(reclaimer, from.abilities, from.size).or_host("--balloon")?;
        balloon = Some(device.handle());
        devices.add("balloon", "--balloon", device);
    }
    let mut connections = vec![attach_console(config, serial, &mut devices)?];
    connections.extend(attach_channels(config, &mut devices)?);

    let memory = Arc::new(memory.clone());
    let mut slots = Vec::new();
    for (index, device) in devices.0.into_iter().enumerate() {
        slots.push(place(index, device, vm, &memory, buses)?);
    }
    Ok(Attached {
        slots,
        connections,
        balloon,
    })
}

/// The console is on the serial port, or on a device of its own; then the
/// serial port has the guest's first words.
fn attach_console(
    config: &MachineConfig,
    (serial, attention): (Arc<Mutex<Serial>>, EventFd),
    devices: &mut Devices,
) -> Result<Connection, Failure> {
    let flag = format!("--console {}", config.console.end);
    let mut lines: Vec<Arc<Mutex<dyn Line>>> = vec![serial];
    if config.console.virtio {
        let console = Console::new(duplicate(&attention)?).or_host(&flag)?;
        lines.push(console.port());
        devices.add("console", &flag, console);
    }
    Ok(Connection {
        flag,
        tail: config.console.end != HostEnd::Stdio,
        lines,
        attention,
    })
}

/// All channels are ports of one device.
fn attach_channels(
    config: &MachineConfig,
    devices: &mut Devices,
) -> Result<Vec<Connection>, Failure> {
    let Some(first) = config.channels.first() else {
        return Ok(Vec::new());
    };
    let (mut ports, mut connections) = (Vec::new(), Vec::new());
    for channel in &config.channels {
        let attention = event()?;
        ports.push((channel.name.clone(), duplicate(&attention)?));
        connections.push(Connection {
            flag: channel.flag(),
            tail: false,
            lines: Vec::new(),
            attention,
        });
    }
    let device = Channels::new(ports).or_host(first.flag())?;
    for (connection, port) in connections.iter_mut().zip(device.ports()) {
        connection.lines.push(port);
    }
    devices.add("channels", first.flag(), device);
    Ok(connections)
}

/// Gives a device its address, its interrupt and its notifications.
fn place(
    index: usize,
    unplaced: Unplaced,
    vm: &Vm,
    memory: &Arc<GuestMemory>,
    buses: &mut Buses,
) -> Result<Slot, Failure> {
    let Unplaced {
        name,
        flag,
        device,
        limits,
    } = unplaced;
    let kind = device.id();
    let (Some(addr), Some(irq)) = (layout::virtio_address(index), layout::virtio_irq(index)) else {
        return Err(Failure::config(format!("{flag}: too many devices")));
    };
    let interrupt = event()?;
    vm.connect_interrupt(&interrupt, irq).or_host(&flag)?;
    let transport = VirtioMmio::new(device, memory.clone(), interrupt).or_host(&flag)?;
    for (queue, kick) in (0..).zip(transport.kicks()) {
        vm.connect_notification(kick, addr + NOTIFY_OFFSET, queue)
            .or_host(&flag)?;
    }
    // KVM keeps the event, which nobody waits for.
    vm.connect_notification(&event()?, addr + INTERRUPT_ACK_OFFSET, QUEUES_ACKNOWLEDGED)
        .or_host(&flag)?;
    vm.show_registers(transport.registers(), addr)
        .or_host(&flag)?;
    let transport = Arc::new(Mutex::new(transport));
    buses
        .mmio
        .insert(addr, layout::VIRTIO_MMIO_SIZE.into(), transport.clone())
        .or_internal(&flag)?;
    Ok(Slot {
        name,
        flag,
        kind,
        place: MmioDevice { addr, irq },
        transport,
        limits,
    })
}

/// The address that was given, or one that is the same whenever the same host
/// gives the guest the same TAP, and hardly ever another's. Networks of sockets
/// are apart, so there it may be the same for all guests.
pub fn mac_address(config: &NetConfig) -> [u8; 6] {
    /// Locally administered, of one device (IEEE 802).
    const LOCAL: u8 = 0x02;
    config.mac.unwrap_or_else(|| {
        let host = std::fs::read("/etc/machine-id").unwrap_or_default();
        let name = match &config.network {
            Network::Tap { name, .. } => name,
            Network::User(_) => "user",
        };
        let [a, b, c, d, e, ..] = fnv_1a(&[&host, name.as_bytes()].concat()).to_le_bytes();
        [LOCAL, a, b, c, d, e]
    })
}

/// The Fowler-Noll-Vo hash: stable, unlike the standard library's.
fn fnv_1a(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_stable_and_local() {
        let config = |tap: &str, mac| NetConfig {
            network: Network::Tap {
                name: tap.into(),
                queues: Default::default(),
            },
            mac,
            limits: Default::default(),
        };
        let derived = mac_address(&config("tap0", None));
        assert_eq!(derived, mac_address(&config("tap0", None)));
        assert_ne!(derived, mac_address(&config("tap1", None)));
        assert_eq!(derived[0], 2);
        assert_eq!(
            mac_address(&config("tap0", Some([2, 1, 1, 1, 1, 1]))),
            [2, 1, 1, 1, 1, 1]
        );
        assert_eq!(fnv_1a(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}
