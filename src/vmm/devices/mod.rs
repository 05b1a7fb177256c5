//! The virtio devices of a machine: a file a kind, which makes the device of its
//! specification and the host's backend; then each gets its place.

mod balloon;
mod block;
mod console;
mod fs;
mod net;
mod pending;
mod vsock;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use mayfly_boot::{MmioDevice, layout};
use mayfly_devices::rate_limiter::LimitHandle;
use mayfly_devices::serial::Serial;
use mayfly_devices::virtio::balloon::BalloonHandle;
use mayfly_devices::virtio::block::Prepare;
use mayfly_devices::virtio::device::DeviceId;
use mayfly_devices::virtio::mmio::{
    INTERRUPT_ACK_OFFSET, NOTIFY_OFFSET, QUEUES_ACKNOWLEDGED, VirtioMmio,
};
use mayfly_devices::virtio::registers::{RegisterPage, RegisterPages};
use mayfly_devices::virtio::rng::Rng;
use mayfly_devices::virtio::state::VirtioState;
use vmm_sys_util::eventfd::EventFd;

use self::pending::{PendingDevice, first, unfit};
use crate::console::Connection;
use crate::failure::{Class, Failure, OrFail};
use crate::kvm::memory::GuestMemory;
use crate::kvm::vcpu::Buses;
use crate::kvm::vm::Vm;
use crate::link::{BlamePart, Broker, DeviceBackend, Part, VmmFailure};
use crate::net::host::KnownHost;
use crate::spec::{DeviceKind, MachineSpec};
use crate::vmm::events::event;

/// The host's backends of devices, with their descriptors, by the devices' names.
pub type DeviceBackends = BTreeMap<String, (DeviceBackend, Vec<OwnedFd>)>;

/// A virtio device in its place.
pub struct AttachedDevice {
    /// What it is called in metrics and commands: `disk0`, `net0`, `rng`.
    pub name: String,
    /// Its kind.
    pub kind: DeviceId,
    /// Where the guest finds it.
    pub place: MmioDevice,
    /// The device.
    pub transport: Arc<Mutex<VirtioMmio>>,
    /// Changes its limits, if it can have some.
    pub limits: Option<LimitHandle>,
}

/// What devices have of the machine and of its process.
pub struct DeviceContext<'a> {
    /// The virtual machine.
    pub vm: &'a Vm,
    /// Its memory.
    pub memory: &'a GuestMemory,
    /// What is done outside for devices.
    pub broker: &'a Arc<Broker>,
    /// Prepares the threads of disks.
    pub prepare: &'a Arc<dyn Prepare>,
    /// What networks' filters know of the host.
    pub host: &'a KnownHost,
}

/// All virtio devices of a machine, and the ways to them.
#[derive(Default)]
pub struct AttachedDevices {
    /// The devices.
    pub devices: Vec<AttachedDevice>,
    /// The console, then the channels.
    pub connections: Vec<Connection>,
    /// Commands the balloon.
    pub balloon: Option<BalloonHandle>,
    /// What drivers read of the transports, and where.
    pub registers: Vec<(Arc<RegisterPage>, u64)>,
}

/// Makes all devices of a specification, and places them in its order. Those that go on have
/// a state each, in that order, too.
pub fn attach(
    spec: &MachineSpec,
    mut backends: DeviceBackends,
    saved: Vec<VirtioState>,
    serial: (Arc<Mutex<Serial>>, EventFd),
    context: &DeviceContext,
    buses: &mut Buses,
) -> Result<AttachedDevices, VmmFailure> {
    let common = Common {
        vm: context.vm,
        memory: Arc::new(context.memory.clone()),
        registers: RegisterPages::new(spec.devices.len()),
    };
    let mut attached = AttachedDevices::default();
    attached.connections.push(console::on_serial(serial));
    let mut saved = saved.into_iter();
    for (index, device) in spec.devices.iter().enumerate() {
        let name = device.name.as_str();
        let backend = backends.remove(name);
        let pending = make(spec, name, &device.kind, backend, context, &mut attached)?;
        let place = Place {
            index,
            name,
            state: saved.next(),
        };
        let (device, registers) = self::place(place, pending, &common, buses)?;
        attached.registers.push((registers, device.place.addr));
        attached.devices.push(device);
    }
    Ok(attached)
}

/// Makes a device: one arm a kind.
fn make(
    spec: &MachineSpec,
    name: &str,
    kind: &DeviceKind,
    backend: Option<(DeviceBackend, Vec<OwnedFd>)>,
    context: &DeviceContext,
    attached: &mut AttachedDevices,
) -> Result<PendingDevice, VmmFailure> {
    let broker = context.broker;
    match (kind, backend) {
        (DeviceKind::Block(block), Some((DeviceBackend::Disk(layout), files))) => {
            block::make(name, block, &layout, files, context.prepare)
        }
        (DeviceKind::Net(net), Some((DeviceBackend::Tap, taps))) => net::on_taps(name, net, taps),
        (DeviceKind::Net(net), Some((DeviceBackend::Stream(policy), socket))) => {
            net::on_stream(name, net, socket, policy, context.host)
        }
        (DeviceKind::Fs { tag }, Some((DeviceBackend::Fs(features), socket))) => {
            fs::make(name, tag, features, socket, broker)
        }
        (DeviceKind::Vsock { cid }, Some((DeviceBackend::Vsock, listener))) => {
            vsock::make(name, *cid, listener, broker)
        }
        (DeviceKind::Rng, Some((DeviceBackend::Rng, source))) => {
            let source = File::from(first(name, source)?);
            Ok(PendingDevice::new(Rng::new(source)))
        }
        (DeviceKind::Balloon { size, abilities }, None) => {
            let (pending, handle) = balloon::make(*size, *abilities, context.memory, &spec.memory)?;
            attached.balloon = Some(handle);
            Ok(pending)
        }
        (DeviceKind::Console, None) => match attached.connections.first_mut() {
            Some(connection) => console::make(connection),
            None => Err(unfit(name)),
        },
        (DeviceKind::Channels { names }, None) => {
            let (pending, connections) = console::make_channels(names)?;
            attached.connections.extend(connections);
            Ok(pending)
        }
        _ => Err(unfit(name)),
    }
}

/// What all transports have in common.
struct Common<'a> {
    vm: &'a Vm,
    memory: Arc<GuestMemory>,
    registers: RegisterPages,
}

/// Where a device is to be, and as what it goes on, if it does.
struct Place<'a> {
    index: usize,
    name: &'a str,
    state: Option<VirtioState>,
}

/// Gives a device its address, its interrupt and its notifications. Returns what its driver
/// reads of the transport, too.
fn place(
    Place { index, name, state }: Place,
    pending: PendingDevice,
    common: &Common,
    buses: &mut Buses,
) -> Result<(AttachedDevice, Arc<RegisterPage>), VmmFailure> {
    let PendingDevice { device, limits } = pending;
    let (vm, memory) = (common.vm, common.memory.clone());
    let registers = (&common.registers, index);
    let part = || Part::Device(name.to_owned());
    let kind = device.id();
    let (Some(addr), Some(irq)) = (layout::virtio_address(index), layout::virtio_irq(index)) else {
        return Err(Failure::config(format!("{name}: too many devices")).into());
    };
    let interrupt = vm.interrupt_line(irq).or_host_of(part())?;
    let transport = match state {
        None => {
            VirtioMmio::with_registers(device, memory, interrupt, registers).or_host_of(part())?
        }
        Some(state) => {
            // The state is of this specification, and yet does not fit its device.
            VirtioMmio::restore_with_registers(device, memory, interrupt, registers, state)
                .map_err(|error| VmmFailure::of(&error, Class::Internal, part()))?
        }
    };
    let registers = transport.registers().clone();
    for (queue, kick) in (0..).zip(transport.kicks()) {
        vm.connect_notification(kick, addr + NOTIFY_OFFSET, queue)
            .or_host_of(part())?;
    }
    // KVM keeps the event, which nobody waits for.
    vm.connect_notification(&event()?, addr + INTERRUPT_ACK_OFFSET, QUEUES_ACKNOWLEDGED)
        .or_host_of(part())?;
    let transport = Arc::new(Mutex::new(transport));
    buses
        .mmio
        .insert(addr, layout::VIRTIO_MMIO_SIZE.into(), transport.clone())
        .or_internal(name)?;
    let device = AttachedDevice {
        name: name.to_owned(),
        kind,
        place: MmioDevice { addr, irq },
        transport,
        limits,
    };
    Ok((device, registers))
}
