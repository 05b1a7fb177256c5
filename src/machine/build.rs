//! The boot recipe, from top to bottom.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvm_ioctls::Kvm;
use mayfly_boot::{Boot, KernelError, MmioDevice, initrd, kernel, layout};
use mayfly_devices::mailbox::Mailbox;
use mayfly_devices::platform::PlatformEvent;
use mayfly_devices::pvpanic::GuestPanic;
use mayfly_devices::serial::{Serial, SerialState};
use mayfly_devices::virtio::balloon::BalloonHandle;
use mayfly_devices::virtio::block::Prepare;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::attach::{self, Attached, Slot};
use super::link::Errands;
use super::platform::{self, PlatformHandle};
use super::resources::Resources;
use crate::config::MachineConfig;
use crate::console::Connection;
use crate::failure::{Failure, OrFail};
use crate::kvm::accept::AcceptKvm;
use crate::kvm::cpuid;
use crate::kvm::gate::Gate;
use crate::kvm::memory::{GuestMemory, exclude_from_dumps, guest_memory, prefault};
use crate::kvm::probe::{self, Backend};
use crate::kvm::vcpu::{Buses, Vcpu, VcpuEnd};
use crate::kvm::vm::{self, Vm};
use crate::timing::Timeline;

/// What the vCPUs' threads tell the event loop.
#[derive(Debug)]
pub enum VmEvent {
    /// A vCPU will not run any more.
    Vcpu(VcpuEnd),
    /// The guest asks its platform for something.
    Platform(PlatformEvent, Instant),
    /// The guest's kernel panicked.
    Panic(GuestPanic),
}

/// Sends [`VmEvent`]s.
pub struct Notifier {
    events: Mailbox<VmEvent>,
    wake: EventFd,
}

impl Notifier {
    /// Sends, and wakes the event loop up.
    pub fn send(&self, event: VmEvent) {
        self.events.put(event);
        let _ = self.wake.write(1);
    }

    /// Another sender.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Notifier {
            events: self.events.clone(),
            wake: self.wake.try_clone()?,
        })
    }
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
    pub slots: Arc<[Slot]>,
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
}

/// Makes the machine; nothing of the host is changed yet.
pub fn build(
    config: &MachineConfig,
    mut resources: Resources,
    (errands, prepare): (&Arc<Errands>, &Arc<dyn Prepare>),
    timeline: &mut Timeline,
) -> Result<Machine, Failure> {
    let mut vm = Vm::new(&resources.kvm).or_host("--cpus")?;
    timeline.kvm_ready = timeline.now();

    let memory = guest_memory(&config.memory).or_host(memory_flag(config))?;
    vm.set_memory(&memory).or_host("--memory")?;
    timeline.memory_mapped = timeline.now();

    let events = Mailbox::default();
    let wake = event()?;
    let notifier = Notifier {
        events: events.clone(),
        wake: duplicate(&wake)?,
    };

    let mut buses = Buses::default();
    let serial = attach_serial(&vm, &mut buses)?;
    let watchdog = config.watchdog.is_some();
    let gate = Arc::new(Gate::new(config.cpus.into()));
    let platform = platform::attach(&vm, &memory, &mut buses, &notifier, &gate, watchdog)?;
    let attached = attach::attach(
        config,
        &mut resources,
        serial,
        &vm,
        &memory,
        (errands, prepare),
        &mut buses,
    )?;
    let Attached {
        slots,
        connections,
        balloon,
    } = attached;
    let virtio: Vec<MmioDevice> = slots.iter().map(|slot| slot.place).collect();

    let entry = load(config, &mut resources, &memory, &virtio)?;
    if config.memory.prefault {
        prefault(&memory).or_host(memory_flag(config))?;
    }
    exclude_from_dumps(&memory).or_host(memory_flag(config))?;
    timeline.kernel_loaded = timeline.now();

    if config.nested && !cpuid::may_nest(vm.supported_cpuid.as_slice()) {
        return Err(Failure::host(
            "--nested: this host's KVM lets no guest run VMs; the parameter \"nested\" of the \
             modules kvm_intel and kvm_amd allows it",
        ));
    }
    let vcpus = (0..config.cpus)
        .map(|index| Vcpu::new(&vm, index, config.cpus, config.nested))
        .collect::<Result<Vec<_>, _>>()
        .or_host(format_args!("--cpus {}", config.cpus))?;
    if let Some(first) = vcpus.first() {
        first.set_entry(&entry).or_host("the first vCPU")?;
    }
    Ok(Machine {
        vm,
        vcpus,
        buses,
        slots: slots.into(),
        connections,
        balloon,
        platform,
        notifier,
        events,
        wake,
        gate,
    })
}

fn memory_flag(config: &MachineConfig) -> String {
    format!("--memory {}M", config.memory.size >> 20)
}

/// Opens a KVM that can run Linux, as far as a probe can tell, or as the user says.
pub fn open_kvm(accept: AcceptKvm) -> Result<Kvm, Failure> {
    let kvm = vm::open().map_err(|error| Failure::host(error.to_string()))?;
    if !accept.accept_kvm
        && probe::cpu_flag().is_none()
        && let Backend::Emulated(time) = probe::measure(&kvm)
    {
        return Err(Failure::host(format!(
            "this host's /dev/kvm emulates guest code ({} ms for what a CPU does in 0.1 ms) and \
             cannot run Linux; use a host with VT-x or AMD-V, or scripts/mayfly, which has a \
             software lab; --accept-kvm boots all the same",
            time.as_millis()
        )));
    }
    Ok(kvm)
}

/// Fills guest memory.
fn load(
    config: &MachineConfig,
    resources: &mut Resources,
    memory: &GuestMemory,
    virtio: &[MmioDevice],
) -> Result<mayfly_boot::EntryState, Failure> {
    let loaded = kernel::load(memory, &mut resources.kernel, config.protocol);
    let flag = match loaded {
        Err(KernelError::DoesNotFit { .. }) => {
            format!("{}: {}", memory_flag(config), config.kernel_flag)
        }
        _ => config.kernel_flag.clone(),
    };
    let kernel = loaded.or_config(flag)?;
    let initrd = match (&config.initrd, &mut resources.initrd) {
        (Some(path), Some(file)) => Some(
            initrd::load(memory, file, kernel.start..kernel.end)
                .or_config(format_args!("--initrd {}", path.display()))?,
        ),
        _ => None,
    };
    let boot = Boot {
        cmdline: &config.cmdline,
        initrd,
        cpus: config.cpus,
        virtio,
        watchdog: config.watchdog.is_some(),
        ram_size: config.memory.size,
    };
    mayfly_boot::finish(memory, &kernel, &boot).or_config("--kernel, --cmdline")
}

/// An event descriptor that does not block.
pub fn event() -> Result<EventFd, Failure> {
    EventFd::new(EFD_NONBLOCK).or_host("creating an event descriptor")
}

/// The same event descriptor once more.
pub fn duplicate(event: &EventFd) -> Result<EventFd, Failure> {
    event.try_clone().or_host("duplicating an event descriptor")
}

/// Returns the port, and what it signals when the host's side is to look.
fn attach_serial(vm: &Vm, buses: &mut Buses) -> Result<(Arc<Mutex<Serial>>, EventFd), Failure> {
    let (interrupt, attention) = (event()?, event()?);
    vm.connect_interrupt(&interrupt, layout::SERIAL_IRQ)
        .or_host("serial port")?;
    let listener = duplicate(&attention)?;
    let serial = Serial::new(SerialState::default(), interrupt, attention);
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
