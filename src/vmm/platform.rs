//! The devices that every machine has: power, reset, clock, events; and its
//! watchdog, if it is to have one.

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use mayfly_boot::layout;
use mayfly_devices::bus::{BusDevice, lock};
use mayfly_devices::cmos::Cmos;
#[cfg(test)]
use mayfly_devices::ged::GedState;
use mayfly_devices::ged::{Ged, GedHandle};
use mayfly_devices::i8042::{self, I8042};
use mayfly_devices::platform::{Platform, PlatformEvent, PlatformPorts};
use mayfly_devices::pvpanic::{GuestPanic, Pvpanic};
use mayfly_devices::serial::Serial;
use mayfly_devices::snapshot_port::SnapshotPort;
#[cfg(test)]
use mayfly_devices::snapshot_port::SnapshotPortState;
use mayfly_devices::vmgenid::{GenerationError, GenerationId};
use mayfly_devices::watchdog::{Watchdog, WatchdogPorts, WatchdogState};

use super::events::{Notifier, VmEvent, event};
use crate::failure::{Failure, OrFail};
use crate::kvm::gate::Gate;
use crate::kvm::memory::GuestMemory;
use crate::kvm::vcpu::Buses;
use crate::kvm::vm::Vm;
use crate::snapshot::machine::PlatformState;

/// The guest's init has not said how its work ended.
pub const NO_STATUS: u16 = u16::MAX;

/// What the host does with the platform.
#[derive(Clone)]
pub struct PlatformHandle {
    ged: GedHandle,
    generation: GenerationId<GuestMemory>,
    clock: Arc<Mutex<Cmos>>,
    snapshot_port: Arc<Mutex<SnapshotPoint>>,
    watchdog: Option<Arc<Mutex<Watchdog>>>,
    status: Arc<AtomicU16>,
}

/// The port by which the guest says that it may be saved.
type SnapshotPoint = SnapshotPort<Box<dyn FnMut(u64) + Send>>;

/// What the platform's devices have of their machine.
pub struct PlatformContext<'a> {
    /// The virtual machine.
    pub vm: &'a Vm,
    /// Its memory.
    pub memory: &'a GuestMemory,
    /// Where events are sent.
    pub notifier: &'a Notifier,
    /// What the vCPUs pass on their way to the guest.
    pub gate: &'a Arc<Gate>,
    /// The machine is saved when its guest has come to the snapshot point.
    pub saves: bool,
}

impl PlatformHandle {
    /// Without devices that a guest could reach.
    #[cfg(test)]
    pub(super) fn alone() -> Self {
        use vm_memory::GuestAddress;
        let memory = [(GuestAddress(layout::VM_GENERATION), 4096)];
        let memory = GuestMemory::from_ranges(&memory).unwrap();
        let (_, ged) = Ged::new(GedState::default(), event().unwrap());
        let id = (layout::VM_GENERATION, layout::GED_VM_GENERATION);
        PlatformHandle {
            generation: GenerationId::new(memory, id.0, ged.clone(), id.1).unwrap(),
            ged,
            clock: Arc::default(),
            snapshot_port: Arc::new(Mutex::new(SnapshotPort::new(
                SnapshotPortState::default(),
                Box::new(|_| ()),
            ))),
            watchdog: None,
            status: Arc::new(AtomicU16::new(NO_STATUS)),
        }
    }

    /// Presses the power button: a guest that listens turns off.
    pub fn press_power_button(&self) {
        self.ged.raise(layout::GED_POWER_BUTTON);
    }

    /// What the guest can see of the devices, and of the serial port.
    pub fn save(&self, serial: &Mutex<Serial>) -> PlatformState {
        PlatformState {
            serial: lock(serial).save(),
            cmos: lock(&self.clock).save(),
            ged: self.ged.save(),
            watchdog: self.watchdog().map(|watchdog| lock(watchdog).save()),
            snapshot_port: lock(&self.snapshot_port).save(),
        }
    }

    /// Tells the guest that it was cloned, or went back in time.
    pub fn renew_generation(&self) -> Result<(), GenerationError> {
        self.generation.renew()
    }

    /// The watchdog, if there is one.
    pub fn watchdog(&self) -> Option<&Mutex<Watchdog>> {
        self.watchdog.as_deref()
    }

    /// The vCPUs have stopped, for a while.
    pub fn pause(&self) {
        if let Some(watchdog) = self.watchdog() {
            lock(watchdog).pause();
        }
    }

    /// The vCPUs go on.
    pub fn resume(&self) {
        if let Some(watchdog) = self.watchdog() {
            lock(watchdog).resume();
        }
    }

    /// What the guest's init said of its work.
    pub fn guest_status(&self) -> Option<u8> {
        u8::try_from(self.status.load(Ordering::Relaxed)).ok()
    }
}

/// Makes the devices in a state, and places them; the watchdog, if there is to be one.
pub fn attach(
    context: &PlatformContext,
    buses: &mut Buses,
    watchdog: bool,
    state: &PlatformState,
) -> Result<PlatformHandle, Failure> {
    let &PlatformContext {
        vm,
        memory,
        notifier,
        gate,
        saves,
    } = context;
    let tell = || {
        notifier
            .try_clone()
            .or_host("duplicating an event descriptor")
    };
    let mut place = |port: u16, len: u16, device: Arc<Mutex<dyn BusDevice>>| {
        buses
            .io
            .insert(port.into(), len.into(), device)
            .or_internal("platform ports")
    };

    let status = Arc::new(AtomicU16::new(NO_STATUS));
    let power = power(tell()?, gate.clone(), status.clone());
    place(layout::PLATFORM_PORT, layout::PLATFORM_PORT_LEN, power)?;
    place(i8042::COMMAND_PORT, 1, reset_line(tell()?, gate.clone()))?;
    place(layout::PVPANIC_PORT, 1, panic_port(tell()?))?;
    let clock = Arc::new(Mutex::new(Cmos::new(state.cmos.clone())));
    place(layout::RTC_PORT, layout::RTC_PORT_LEN.into(), clock.clone())?;
    let reached: Box<dyn FnMut(u64) + Send> = match saves {
        true => snapshot_point(tell()?, gate.clone()),
        false => Box::new(|_| ()),
    };
    let snapshot_port = Arc::new(Mutex::new(SnapshotPort::new(state.snapshot_port, reached)));
    let (port, len) = (layout::SNAPSHOT_PORT, layout::SNAPSHOT_PORT_LEN);
    place(port, len, snapshot_port.clone())?;

    let interrupt = event()?;
    vm.connect_interrupt(&interrupt, layout::GED_IRQ)
        .or_host("event device")?;
    let (device, ged) = Ged::new(state.ged, interrupt);
    place(layout::GED_EVENTS, 1, Arc::new(Mutex::new(device)))?;
    let generation = GenerationId::new(
        memory.clone(),
        layout::VM_GENERATION,
        ged.clone(),
        layout::GED_VM_GENERATION,
    )
    .or_host("VM generation ID")?;

    let watchdog = match watchdog {
        true => Some(Arc::new(Mutex::new(self::watchdog(
            state.watchdog.unwrap_or_default(),
        )?))),
        false => None,
    };
    if let Some(watchdog) = &watchdog {
        let device = watchdog.clone();
        place(layout::WATCHDOG_PORT, layout::WATCHDOG_PORT_LEN, device)?;
    }
    Ok(PlatformHandle {
        ged,
        generation,
        clock,
        snapshot_port,
        watchdog,
        status,
    })
}

/// Stops all vCPUs where the guest may be saved, once, and has that done.
fn snapshot_point(tell: Notifier, gate: Arc<Gate>) -> Box<dyn FnMut(u64) + Send> {
    let mut reached = false;
    Box::new(move |_| {
        if !std::mem::replace(&mut reached, true) {
            gate.close();
            tell.send(VmEvent::SnapshotPoint);
        }
    })
}

/// Each event is sent once: a guest may write to its ports without end. One
/// that is over would ask without end whether it is: it does not run any more.
fn power(tell: Notifier, gate: Arc<Gate>, status: Arc<AtomicU16>) -> Arc<Mutex<dyn BusDevice>> {
    let offset = |port: u16| u64::from(port - layout::PLATFORM_PORT);
    let ports = PlatformPorts {
        sleep_control: offset(layout::SLEEP_CONTROL),
        soft_off: layout::SLEEP_TYPE_S5,
        reset: offset(layout::RESET),
        reset_value: layout::RESET_VALUE,
        boot_mark: offset(layout::BOOT_MARK),
        status: offset(layout::GUEST_STATUS),
    };
    let (mut marked, mut ended) = (false, false);
    Arc::new(Mutex::new(Platform::new(ports, move |event| {
        let sent = match event {
            PlatformEvent::Status(value) => return status.store(value.into(), Ordering::Relaxed),
            PlatformEvent::BootMark => &mut marked,
            PlatformEvent::PowerOff | PlatformEvent::Reset => {
                gate.stop();
                &mut ended
            }
        };
        if !std::mem::replace(sent, true) {
            tell.send(VmEvent::Platform(event, Instant::now()));
        }
    })))
}

fn reset_line(tell: Notifier, gate: Arc<Gate>) -> Arc<Mutex<dyn BusDevice>> {
    let mut pulsed = false;
    Arc::new(Mutex::new(I8042::new(move || {
        gate.stop();
        if !std::mem::replace(&mut pulsed, true) {
            tell.send(VmEvent::Platform(PlatformEvent::Reset, Instant::now()));
        }
    })))
}

fn panic_port(tell: Notifier) -> Arc<Mutex<dyn BusDevice>> {
    let (mut panicked, mut crash_loaded) = (false, false);
    Arc::new(Mutex::new(Pvpanic::new(move |panic| {
        let sent = match panic {
            GuestPanic::Panicked => &mut panicked,
            GuestPanic::CrashLoaded => &mut crash_loaded,
        };
        if !std::mem::replace(sent, true) {
            tell.send(VmEvent::Panic(panic));
        }
    })))
}

fn watchdog(state: WatchdogState) -> Result<Watchdog, Failure> {
    let offset = |port: u16| u64::from(port - layout::WATCHDOG_PORT);
    let ports = WatchdogPorts {
        control: offset(layout::WATCHDOG_CONTROL),
        run: layout::WATCHDOG_RUN,
        feed: offset(layout::WATCHDOG_FEED),
        count: offset(layout::WATCHDOG_COUNT),
    };
    Watchdog::new(ports, state).or_host("--watchdog: creating a timer")
}
