//! The boot recipe, from top to bottom.

use std::fs::File;
use std::mem;
use std::sync::{Arc, Mutex};
use std::thread;

use kvm_ioctls::Kvm;
use mayfly_boot::{Boot, KernelError, MmioDevice, Protocol, initrd, kernel, layout};
use mayfly_devices::mailbox::Mailbox;
use mayfly_devices::serial::{Serial, SerialState};
use mayfly_devices::virtio::balloon::BalloonHandle;
use mayfly_devices::virtio::block::Prepare;
use vmm_sys_util::eventfd::EventFd;

use super::devices::{self, AttachedDevice, AttachedDevices, DeviceBackends, DeviceContext};
use super::events::{Notifier, VmEvent, duplicate, event};
use super::platform::{self, PlatformHandle};
use crate::console::Connection;
use crate::failure::{Class, Failure, OrFail};
use crate::kvm::cpuid;
use crate::kvm::gate::Gate;
use crate::kvm::memory::{GuestMemory, exclude_from_dumps, guest_memory, prefault};
use crate::kvm::vcpu::{Buses, Vcpu};
use crate::kvm::vm::Vm;
use crate::link::{BlamePart, Broker, Part, VmmFailure};
use crate::net::host::KnownHost;
use crate::snapshot::machine::PlatformState;
use crate::spec::{BootProtocol, MachineSpec};
use crate::timing::Timeline;

/// What a machine is built from, beside its specification.
pub struct Parts {
    /// KVM, which can run Linux.
    pub kvm: Kvm,
    /// The kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The host's backends of devices.
    pub backends: DeviceBackends,
    /// What is done outside for devices.
    pub broker: Arc<Broker>,
    /// Prepares the threads of disks.
    pub prepare: Arc<dyn Prepare>,
    /// What networks' filters know of the host.
    pub host: KnownHost,
    /// The machine is saved when its guest has come to the snapshot point.
    pub saves: bool,
}

/// A machine that is ready to run.
pub struct Machine {
    /// Dropped last: the vCPUs and their memory live in it.
    pub vm: Vm,
    /// One for each CPU.
    pub vcpus: Vec<Vcpu>,
    /// What the vCPUs' accesses leave to.
    pub buses: Buses,
    /// The virtio devices.
    pub devices: Arc<[AttachedDevice]>,
    /// The console, then the channels.
    pub connections: Vec<Connection>,
    /// Commands the balloon.
    pub balloon: Option<BalloonHandle>,
    /// Power button, watchdog, …
    pub platform: PlatformHandle,
    /// Where events are sent …
    pub notifier: Notifier,
    /// … and received …
    pub events: Mailbox<VmEvent>,
    /// … after this has woken the loop up.
    pub wake: EventFd,
    /// What the vCPUs pass on their way to the guest.
    pub gate: Arc<Gate>,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The serial port.
    pub serial: Arc<Mutex<Serial>>,
}

/// Makes the machine; nothing of the host is changed yet.
pub fn build(
    spec: &MachineSpec,
    mut parts: Parts,
    timeline: &mut Timeline,
) -> Result<Machine, VmmFailure> {
    let mut vm = Vm::new(&parts.kvm).or_host("--cpus")?;
    timeline.kvm_ready = timeline.now();

    let memory = guest_memory(&spec.memory).or_host(memory_flag(spec))?;
    vm.add_memory(&memory);
    timeline.memory_mapped = timeline.now();

    let events = Mailbox::default();
    let wake = event()?;
    let notifier = Notifier::new(&events, &wake)?;

    let mut buses = Buses::default();
    let state = PlatformState::default();
    let (serial, serial_event) = attach_serial(&vm, &mut buses, state.serial.clone())?;
    let gate = Arc::new(Gate::new(spec.cpus.into()));
    let platform_context = platform::PlatformContext {
        vm: &vm,
        memory: &memory,
        notifier: &notifier,
        gate: &gate,
        saves: parts.saves,
    };
    let watchdog = spec.watchdog.is_some();
    let platform = platform::attach(&platform_context, &mut buses, watchdog, &state)?;
    let context = DeviceContext {
        vm: &vm,
        memory: &memory,
        broker: &parts.broker,
        prepare: &parts.prepare,
        host: &parts.host,
    };
    let backends = mem::take(&mut parts.backends);
    let line = (serial.clone(), serial_event);
    let attached = devices::attach(spec, backends, Vec::new(), line, &context, &mut buses)?;
    let AttachedDevices {
        devices,
        connections,
        balloon,
        registers,
    } = attached;
    vm.add_registers(registers);
    let virtio: Vec<MmioDevice> = devices.iter().map(|device| device.place).collect();

    // KVM waits while it is given memory; meanwhile that is filled.
    let entry = thread::scope(|scope| {
        let given = thread::Builder::new()
            .name("memory".into())
            .spawn_scoped(scope, || vm.set_memory().and_then(|()| vm.set_registers()))
            .or_host("starting a thread")?;
        let entry = load(spec, &mut parts, &memory, &virtio)?;
        if spec.memory.prefault {
            prefault(&memory).or_host(memory_flag(spec))?;
        }
        match given.join() {
            Ok(given) => given.or_host("--memory")?,
            Err(_) => return Err(Failure::new(Class::Internal, "a thread failed").into()),
        }
        Ok::<_, VmmFailure>(entry)
    })?;
    exclude_from_dumps(&memory).or_host(memory_flag(spec))?;
    timeline.kernel_loaded = timeline.now();

    if spec.nested && !cpuid::may_nest(vm.supported_cpuid.as_slice()) {
        return Err(Failure::host(
            "--nested: this host's KVM lets no guest run VMs; the parameter \"nested\" of the \
             modules kvm_intel and kvm_amd allows it",
        )
        .into());
    }
    let vcpus = (0..spec.cpus)
        .map(|index| Vcpu::new(&vm, index, spec.cpus, spec.nested))
        .collect::<Result<Vec<_>, _>>()
        .or_host(format_args!("--cpus {}", spec.cpus))?;
    if let Some(first) = vcpus.first() {
        first.set_entry(&entry).or_host("the first vCPU")?;
    }
    Ok(Machine {
        vm,
        vcpus,
        buses,
        devices: devices.into(),
        connections,
        balloon,
        platform,
        notifier,
        events,
        wake,
        gate,
        memory,
        serial,
    })
}

pub(super) fn memory_flag(spec: &MachineSpec) -> String {
    format!("--memory {}M", spec.memory.size >> 20)
}

/// Fills guest memory.
fn load(
    spec: &MachineSpec,
    parts: &mut Parts,
    memory: &GuestMemory,
    virtio: &[MmioDevice],
) -> Result<mayfly_boot::EntryState, VmmFailure> {
    let protocol = match spec.boot_protocol {
        BootProtocol::Auto => None,
        BootProtocol::Linux => Some(Protocol::Linux64),
        BootProtocol::Pvh => Some(Protocol::Pvh),
    };
    let kernel = match kernel::load(memory, &mut parts.kernel, protocol) {
        Err(error @ KernelError::DoesNotFit { .. }) => {
            let failed = Err(error).or_config(memory_flag(spec));
            return failed.map_err(|failure| VmmFailure {
                part: Some(Part::Kernel),
                ..failure.into()
            });
        }
        loaded => loaded.or_config_of(Part::Kernel)?,
    };
    let initrd = match &mut parts.initrd {
        None => None,
        Some(file) => {
            let loaded = initrd::load(memory, file, kernel.start..kernel.end);
            Some(loaded.or_config_of(Part::Initrd)?)
        }
    };
    let boot = Boot {
        cmdline: &spec.cmdline,
        initrd,
        cpus: spec.cpus,
        virtio,
        watchdog: spec.watchdog.is_some(),
        ram_size: spec.memory.size,
    };
    Ok(mayfly_boot::finish(memory, &kernel, &boot).or_config("--kernel, --cmdline")?)
}

/// Returns the port in a state, and what it signals when the host's side is to look.
pub(super) fn attach_serial(
    vm: &Vm,
    buses: &mut Buses,
    state: SerialState,
) -> Result<(Arc<Mutex<Serial>>, EventFd), Failure> {
    let (interrupt, host_event) = (event()?, event()?);
    vm.connect_interrupt(&interrupt, layout::SERIAL_IRQ)
        .or_host("serial port")?;
    let listener = duplicate(&host_event)?;
    let serial = Serial::new(state, interrupt, host_event);
    let serial = Arc::new(Mutex::new(serial));
    buses
        .io
        .insert(
            layout::SERIAL_PORT.into(),
            layout::SERIAL_PORT_LEN.into(),
            serial.clone(),
        )
        .or_internal("serial port")?;
    Ok((serial, listener))
}
