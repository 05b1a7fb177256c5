//! Devices at fixed addresses, and the registers of a virtio device.

use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use mayfly_devices::bus::{Bus, lock};
use mayfly_devices::char_device::CharDevice;
use mayfly_devices::cmos::Cmos;
use mayfly_devices::ged::{Ged, GedState};
use mayfly_devices::i8042::I8042;
use mayfly_devices::platform::{Platform, PlatformPorts};
use mayfly_devices::pvpanic::Pvpanic;
use mayfly_devices::serial::{Serial, SerialState};
use mayfly_devices::virtio::balloon::{Abilities, Balloon, Reclaim};
use mayfly_devices::virtio::mmio::VirtioMmio;
use mayfly_devices::vmgenid::GenerationId;
use mayfly_devices::watchdog::{Watchdog, WatchdogPorts, WatchdogState};
use serde_json::Value;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const ACCESSES_MAX: usize = 200;
/// What a serial port holds for its host, and for its guest.
const OUTPUT_MAX: usize = 64 << 10;

/// An access, by a vCPU or by the host.
#[derive(Arbitrary, Debug)]
pub enum Access {
    Read(u16, u8),
    Write(u16, u8, u64),
    Host(Host),
}

/// What the host does.
#[derive(Arbitrary, Debug)]
pub enum Host {
    Input(Vec<u8>),
    TakeOutput(u16),
    Raise(u8),
    Renew,
    Pause,
    Resume,
    Expired,
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn access(bus: &Bus, access: &Access) {
    match access {
        Access::Read(address, len) => {
            let mut data = [0; 8];
            bus.read((*address).into(), &mut data[..usize::from(*len) % 9]);
        }
        Access::Write(address, len, value) => {
            let data = &value.to_le_bytes()[..usize::from(*len) % 9];
            bus.write((*address).into(), data);
        }
        Access::Host(_) => {}
    }
}

/// All small devices, eight or sixteen addresses each.
pub fn small_devices(accesses: Vec<Access>) {
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let serial = Serial::new(SerialState::default(), event(), event());
    let serial = Arc::new(Mutex::new(serial));
    let (ged, handle) = Ged::new(GedState::default(), event());
    let generation = GenerationId::new(memory, 0x100, handle.clone(), 2).unwrap();
    let ports = WatchdogPorts {
        control: 0,
        run: 1,
        feed: 1,
        count: 2,
    };
    let watchdog = Watchdog::new(ports, WatchdogState::default()).unwrap();
    let watchdog = Arc::new(Mutex::new(watchdog));
    let ports = PlatformPorts {
        sleep_control: 0,
        soft_off: 0x34,
        reset: 1,
        reset_value: 6,
        boot_mark: 2,
        status: 3,
    };
    let mut bus = Bus::default();
    bus.insert(0, 8, serial.clone()).unwrap();
    bus.insert(0x10, 8, Arc::new(Mutex::new(Cmos::default())))
        .unwrap();
    bus.insert(0x20, 8, Arc::new(Mutex::new(I8042::new(|| ()))))
        .unwrap();
    bus.insert(0x30, 8, Arc::new(Mutex::new(ged))).unwrap();
    bus.insert(0x40, 8, Arc::new(Mutex::new(Pvpanic::new(|_| ()))))
        .unwrap();
    bus.insert(0x50, 8, watchdog.clone()).unwrap();
    bus.insert(0x60, 8, Arc::new(Mutex::new(Platform::new(ports, |_| ()))))
        .unwrap();
    for one in accesses.iter().take(ACCESSES_MAX) {
        access(&bus, one);
        let mut serial = lock(&serial);
        match one {
            Access::Host(Host::Input(data)) => {
                let room = serial.input_room();
                serial.input(data);
                assert!(serial.input_room() <= room);
            }
            Access::Host(Host::TakeOutput(count)) => serial.output_done((*count).into()),
            Access::Host(Host::Raise(events)) => handle.raise(*events),
            Access::Host(Host::Renew) => generation.renew().unwrap(),
            Access::Host(Host::Pause) => lock(&watchdog).pause(),
            Access::Host(Host::Resume) => lock(&watchdog).resume(),
            Access::Host(Host::Expired) => {
                lock(&watchdog).expired();
            }
            Access::Read(..) | Access::Write(..) => {}
        }
        assert!(serial.output().len() <= OUTPUT_MAX);
        assert!(lock(&watchdog).save().count > 0);
    }
    // A saved state is the same when it is restored.
    let state = lock(&serial).save();
    assert_eq!(Serial::new(state.clone(), event(), event()).save(), state);
}

struct Host0;

impl Reclaim for Host0 {
    fn reclaim(&mut self, _: u64, len: u64) -> Option<u64> {
        Some(len)
    }
}

/// The registers of a virtio device, which has several queues and a configuration that
/// can be written to.
pub fn virtio_registers(accesses: Vec<Access>) {
    let abilities = Abilities {
        deflate_on_oom: true,
        reporting: true,
    };
    let device = Balloon::new(Host0, abilities, 0).unwrap();
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
    let transport = VirtioMmio::new(Box::new(device), memory.clone(), event()).unwrap();
    let transport = Arc::new(Mutex::new(transport));
    let mut bus = Bus::default();
    bus.insert(0, 0x200, transport.clone()).unwrap();
    let read = |at: u64| {
        let mut data = [0; 4];
        bus.read(at, &mut data);
        u32::from_le_bytes(data)
    };
    let queues = || {
        let state = lock(&transport).save().unwrap().transport;
        let mut state = serde_json::to_value(state).unwrap();
        let queues = state["queues"].as_array_mut().unwrap();
        for queue in queues.iter_mut().filter_map(Value::as_object_mut) {
            // These go on as the device works.
            queue.retain(|name, _| !name.starts_with("next"));
        }
        (state["acked"].take(), state["queues"].take())
    };
    for one in accesses.iter().take(ACCESSES_MAX) {
        let before = (read(0x70), queues());
        access(&bus, one);
        {
            let mut transport = lock(&transport);
            transport.event_ready(0);
            for queue in 0..transport.kicks().len() {
                if transport.kicks()[queue].read().is_ok() {
                    transport.queue_notified(queue);
                }
            }
        }
        // Virtio 1.2, 2.1: only a reset takes bits back; after the activation, queues
        // and features are as they are.
        let after = (read(0x70), queues());
        let kept = before.0 & after.0 == before.0;
        assert!(
            kept || after.0 == 0,
            "{:#x} became {:#x}",
            before.0,
            after.0
        );
        if before.0 & 4 != 0 && after.0 != 0 {
            assert_eq!(before.1, after.1);
        }
        assert!(
            after.0 & 4 == 0 || after.0 & 8 != 0,
            "DRIVER_OK without FEATURES_OK"
        );
    } // What is saved is restored, and saved the same.
    let mut transport = lock(&transport);
    transport.quiesce();
    let state = transport.save().unwrap();
    let device = Balloon::new(Host0, abilities, 0).unwrap();
    let other = VirtioMmio::restore(Box::new(device), memory, event(), state.clone());
    match other {
        Ok(other) => assert_eq!(other.save().unwrap(), state),
        // Queues that the device refused may be set up still.
        Err(error) => panic!("{error}"),
    }
}
