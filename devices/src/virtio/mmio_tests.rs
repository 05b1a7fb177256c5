use std::sync::Mutex;

use super::*;
use crate::bus::{Bus, lock};
use crate::virtio::balloon::Balloon;
use crate::virtio::console::Console;
use crate::virtio::rng::Rng;
use crate::virtio::state::DeviceState;
use crate::virtio::testing::{AVAILABLE, Descriptor, Driver, MEMORY, SIZE, USED};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

fn driver() -> Driver {
    Driver::new(Box::new(Rng::new(std::io::repeat(1))))
}

#[test]
fn identifies_itself() {
    let mut driver = driver();
    assert_eq!(
        driver.read_register(reg::VIRTIO_MMIO_MAGIC_VALUE),
        0x7472_6976
    );
    assert_eq!(driver.read_register(reg::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read_register(reg::VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(driver.read_register(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    driver.write_register(reg::VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(driver.read_register(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    assert_eq!(driver.read_register(reg::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
}

#[test]
fn features_must_be_offered_and_modern() {
    let agree = |features: u64| {
        let mut driver = driver();
        driver.add_status(Status::ACKNOWLEDGE | Status::DRIVER);
        for half in 0..2 {
            driver.write_register(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            driver.write_register(
                reg::VIRTIO_MMIO_DRIVER_FEATURES,
                (features >> (32 * half)) as u32,
            );
        }
        driver.add_status(Status::FEATURES_OK);
        driver.status().contains(Status::FEATURES_OK)
    };
    let version_1 = feature(bits::VIRTIO_F_VERSION_1);
    assert!(agree(version_1));
    assert!(agree(FEATURES));
    assert!(!agree(0));
    assert!(!agree(version_1 | 1));
}

#[test]
fn there_is_no_activation_without_features() {
    let mut driver = driver();
    driver.add_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::DRIVER_OK);
    assert!(!driver.status().contains(Status::DRIVER_OK));
    assert!(driver.transport.active.is_none());
}

#[test]
fn nothing_about_a_queue_changes_after_the_activation() {
    let mut driver = driver();
    driver.start(0);
    let before = driver.transport.save();
    for register in (reg::VIRTIO_MMIO_QUEUE_NUM..=reg::VIRTIO_MMIO_QUEUE_USED_HIGH).step_by(4) {
        if register != reg::VIRTIO_MMIO_INTERRUPT_ACK && register != reg::VIRTIO_MMIO_STATUS {
            driver.write_register(register, 0x4000);
        }
    }
    driver.write_register(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    driver.write_register(reg::VIRTIO_MMIO_DRIVER_FEATURES, 0xffff_ffff);
    assert_eq!(driver.transport.save(), before);
    driver.add(0, &[Descriptor::writable(0x8000, 1)]);
    driver.kick(0);
    assert_eq!(driver.used(0), [(0, 1)]);
}

#[test]
fn queues_must_lie_in_memory() {
    for rings in [MEMORY as u64, !0xfff, MEMORY as u64 - 0x100] {
        let mut driver = driver();
        driver.set_up(0);
        driver.write_register(reg::VIRTIO_MMIO_QUEUE_READY, 0);
        driver.set_up_queue(0, rings);
        driver.add_status(Status::DRIVER_OK);
        assert!(driver.status().contains(Status::NEEDS_RESET), "{rings:#x}");
    }
}

#[test]
fn queue_sizes_are_checked() {
    for size in [0, 3, 65, 0x1_0010, u32::MAX] {
        let mut driver = driver();
        driver.set_up(0);
        driver.write_register(reg::VIRTIO_MMIO_QUEUE_READY, 0);
        driver.write_register(reg::VIRTIO_MMIO_QUEUE_NUM, size);
        driver.write_register(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        driver.add_status(Status::DRIVER_OK);
        assert!(driver.status().contains(Status::NEEDS_RESET), "{size}");
    }
}

/// Chains that no driver may make, each on its own.
#[test]
fn hostile_chains_break_the_device_alone() {
    type Make = fn(&mut Driver);
    let cases: [(&str, Make); 9] = [
        ("a loop", |driver| {
            let link = Descriptor {
                flags: 3,
                next: 0,
                ..Descriptor::writable(0x8000, 16)
            };
            driver.describe(0, 0, link);
            driver.offer(0, 0);
        }),
        ("a head outside of the table", |driver| {
            driver.offer(0, SIZE)
        }),
        ("a next outside of the table", |driver| {
            let link = Descriptor {
                flags: 3,
                next: SIZE,
                ..Descriptor::writable(0x8000, 16)
            };
            driver.describe(0, 0, link);
            driver.offer(0, 0);
        }),
        ("an address outside of memory", |driver| {
            driver.add(0, &[Descriptor::writable(MEMORY as u64, 1)]);
        }),
        ("an address that wraps", |driver| {
            driver.add(0, &[Descriptor::writable(u64::MAX, 2)]);
        }),
        ("a length that leaves memory", |driver| {
            driver.add(0, &[Descriptor::writable(0x8000, u32::MAX)]);
        }),
        ("readable behind writable", |driver| {
            driver.add(
                0,
                &[
                    Descriptor::writable(0x8000, 1),
                    Descriptor::readable(0x9000, 1),
                ],
            );
        }),
        ("an index too far ahead", |driver| {
            driver.set_available_index(0, SIZE + 1)
        }),
        ("an indirect table in an indirect table", |driver| {
            let inner = Descriptor {
                flags: 4,
                ..Descriptor::readable(0xa000, 16)
            };
            driver.describe(
                0,
                0,
                Descriptor {
                    addr: Driver::rings(0) + 16,
                    ..inner
                },
            );
            driver.describe(0, 1, inner);
            driver.offer(0, 0);
        }),
    ];
    for (name, make) in cases {
        let mut driver = driver();
        driver.start(0);
        make(&mut driver);
        driver.kick(0);
        assert!(driver.status().contains(Status::NEEDS_RESET), "{name}");
        assert!(driver.status().contains(Status::DRIVER_OK), "{name}");
        assert_eq!(
            driver.read_register(reg::VIRTIO_MMIO_INTERRUPT_STATUS),
            2,
            "{name}"
        );
        assert_eq!(driver.interrupts(), 1, "{name}");
        // It does nothing more …
        driver.kick(0);
        assert_eq!(driver.used(0), [], "{name}");
        // … until it is reset.
        driver.reset();
        driver.start(0);
        driver.add(0, &[Descriptor::writable(0x8000, 4)]);
        driver.kick(0);
        assert_eq!(driver.used(0), [(0, 4)], "{name}");
    }
}

#[test]
fn the_driver_may_ask_not_to_be_interrupted() {
    let mut driver = driver();
    driver.start(feature(VIRTIO_RING_F_EVENT_IDX));
    // used_event: when the second chain is used.
    let used_event = GuestAddress(Driver::rings(0) + 0x404 + 2 * u64::from(SIZE));
    driver.memory.write_obj(1u16, used_event).unwrap();
    driver.add(0, &[Descriptor::writable(0x8000, 1)]);
    driver.kick(0);
    assert_eq!((driver.used(0).len(), driver.interrupts()), (1, 0));
    driver.add(0, &[Descriptor::writable(0x8000, 1)]);
    driver.kick(0);
    assert_eq!((driver.used(0).len(), driver.interrupts()), (1, 1));
    driver.write_register(reg::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(driver.read_register(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

/// A driver that adds a chain while the device is at work need not notify it.
#[test]
fn a_driver_is_asked_to_notify_when_a_turn_ends() {
    let mut driver = driver();
    driver.start(feature(VIRTIO_RING_F_EVENT_IDX));
    driver.process_pending();
    let memory = driver.memory.clone();
    let rings = Driver::rings(0);
    let avail_event = GuestAddress(rings + USED + 4 + 8 * u64::from(SIZE));
    let event = || memory.read_obj::<u16>(avail_event).unwrap();
    let show = |count| driver_shows(&memory, count);
    for _ in 0..2 {
        driver.add(0, &[Descriptor::writable(0x8000, 1)]);
    }
    show(1);
    driver.transport.turn(Some(0), |_, queues| {
        let chain = queues.pop(0)?.unwrap();
        assert!(queues.pop(0)?.is_none());
        assert_eq!(event(), 0);
        show(2);
        queues.complete(0, chain.head, 1)
    });
    // The device has another turn for that, by itself.
    driver.process_pending();
    assert_eq!(driver.used(0).len(), 2);
    assert_eq!(event(), 2);
}

/// The driver shows that there are `count` chains in the first queue.
fn driver_shows(memory: &GuestMemory, count: u16) {
    let index = GuestAddress(Driver::rings(0) + AVAILABLE + 2);
    memory.write_obj(count, index).unwrap();
}

#[test]
fn indirect_chains_work() {
    let mut driver = driver();
    driver.start(feature(VIRTIO_RING_F_INDIRECT_DESC));
    // The table lies behind the ring's own first descriptor.
    let table = Driver::rings(0) + 16;
    driver.describe(
        0,
        0,
        Descriptor {
            flags: 4,
            ..Descriptor::readable(table, 32)
        },
    );
    driver.describe(
        0,
        1,
        Descriptor {
            flags: 3,
            next: 1,
            ..Descriptor::writable(0x8000, 2)
        },
    );
    driver.describe(0, 2, Descriptor::writable(0x9000, 2));
    driver.offer(0, 0);
    driver.kick(0);
    assert_eq!(driver.used(0), [(0, 4)]);
}

#[test]
fn registers_are_read_while_the_device_works() {
    let mut driver = driver();
    driver.start(0);
    driver.add(0, &[Descriptor::writable(0x8000, 4)]);
    driver.kick(0);
    let transport = Arc::new(Mutex::new(driver.transport));
    let mut bus = Bus::default();
    bus.insert(0, 0x1000, transport.clone()).unwrap();
    let read = |offset: u32| {
        let mut data = [0; 4];
        bus.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    };
    // A thread that waited for the device would wait for ever.
    let _working = lock(&transport);
    assert_eq!(read(reg::VIRTIO_MMIO_MAGIC_VALUE), MAGIC);
    assert_eq!(read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), QUEUES_ACKNOWLEDGED);
    bus.write(INTERRUPT_ACK_OFFSET, &QUEUES_ACKNOWLEDGED.to_le_bytes());
    assert_eq!(read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn the_page_of_registers_says_what_reads_say() {
    let mut driver = Driver::new(Box::new(Console::new(event()).unwrap()));
    // This one hears of reads, so the guest must not do them by itself.
    assert!(driver.transport.registers().address().is_none());
    assert!(!driver.transport.registers().read(CONFIG, &mut [0]));

    let nothing = crate::virtio::balloon::tests::Host::default();
    driver = Driver::new(Box::new(
        Balloon::new(nothing, Default::default(), 7 * 4096).unwrap(),
    ));
    driver.start(0);
    driver.write_register(reg::VIRTIO_MMIO_CONFIG + 4, 3); // actual
    let page = driver.transport.registers().clone();
    assert_eq!(page.address().unwrap() as usize % 4096, 0);
    for offset in (0..reg::VIRTIO_MMIO_CONFIG + 8).step_by(4) {
        let mut data = [0xee; 4];
        assert!(page.read(offset.into(), &mut data));
        assert_eq!(u32::from_le_bytes(data), driver.read_register(offset));
    }
    assert_eq!(driver.read_register(reg::VIRTIO_MMIO_CONFIG), 7);
    assert_eq!(driver.read_register(reg::VIRTIO_MMIO_CONFIG + 4), 3);
    let status = driver.read_register(reg::VIRTIO_MMIO_STATUS);
    driver.reset();
    assert_ne!(status, driver.read_register(reg::VIRTIO_MMIO_STATUS));
    // Whatever the driver reads, and however much.
    for (offset, len) in [(0xffe, 8), (0x1000, 4), (u64::MAX, 16), (0x71, 3)] {
        let mut data = vec![0xee; len];
        driver.transport.read(offset, &mut data);
        assert!(!data.contains(&0xee));
    }
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn fresh() -> Box<Rng<std::io::Repeat>> {
    Box::new(Rng::new(std::io::repeat(2)))
}

#[test]
fn a_restored_device_goes_on_where_the_saved_one_was() {
    let mut driver = driver();
    driver.start(FEATURES);
    driver.add(0, &[Descriptor::writable(0x8000, 1)]);
    driver.kick(0);
    let state = driver.save();
    assert_eq!(state.transport.queues[0].next_available, 1);
    assert_eq!(state.transport.queues[0].next_used, 1);
    let text = serde_json::to_string(&state).unwrap();
    let read: VirtioState = serde_json::from_str(&text).unwrap();
    assert_eq!(read, state);
    // What was added meanwhile is found without a notification.
    driver.used(0);
    driver.add(0, &[Descriptor::writable(0x9000, 1)]);
    driver.interrupts();
    driver.restore(fresh(), read).unwrap();
    assert_eq!(driver.interrupts(), 1); // it has not acknowledged the first
    driver.process_pending();
    assert_eq!(driver.used(0), [(1, 1)]);
    assert_eq!(driver.read(0x9000, 1), [2]);
    assert_eq!(driver.save().device, state.device);
}

#[test]
fn each_step_of_a_driver_can_be_saved() {
    let version_1 = feature(bits::VIRTIO_F_VERSION_1);
    for step in 0..4 {
        let mut driver = driver();
        match step {
            0 => {}
            1 => driver.add_status(Status::ACKNOWLEDGE | Status::DRIVER),
            2 => driver.set_up(version_1),
            _ => {
                // A driver that broke the rules.
                driver.start(0);
                driver.set_available_index(0, SIZE + 1);
                driver.kick(0);
                assert!(driver.status().contains(Status::NEEDS_RESET));
            }
        }
        let state = driver.save();
        driver.restore(fresh(), state.clone()).unwrap();
        assert_eq!(driver.save(), state, "step {step}");
        assert!(driver.transport.active.is_none());
    }
}

#[test]
fn states_that_make_no_sense_are_refused() {
    let changes: [fn(&mut VirtioState); 14] = [
        |state| state.version += 1,
        |state| state.device = DeviceState::Channels(Vec::new()),
        |state| state.transport.queues.clear(),
        |state| state.transport.queues.push(QueueSetup::new(64)),
        |state| state.transport.queues[0].max_size = 128,
        |state| state.transport.queues[0].size = 3,
        |state| state.transport.queues[0].size = 128,
        |state| state.transport.queues[0].used = MEMORY as u64,
        |state| state.transport.queues[0].available = u64::MAX,
        |state| state.transport.queues[0].descriptors += 1,
        |state| state.transport.acked |= 1,
        |state| state.transport.status |= 1 << 5,
        |state| state.transport.status &= !Status::FEATURES_OK.bits(),
        |state| state.transport.interrupts = 4,
    ];
    let mut driver = driver();
    driver.start(FEATURES);
    let state = driver.save();
    for (index, change) in changes.into_iter().enumerate() {
        let mut state = state.clone();
        change(&mut state);
        assert!(driver.restore(fresh(), state).is_err(), "change {index}");
    }
    driver.restore(fresh(), state).unwrap();
}

proptest! {
    #[test]
    fn no_sequence_of_register_accesses_panics(
        accesses in prop::collection::vec((0u64..0x220, any::<bool>(), 0usize..9, any::<u64>()), 0..200),
        started: bool,
    ) {
        let mut driver = driver();
        if started {
            driver.start(0);
        }
        for (offset, write, len, value) in accesses {
            let mut data = value.to_le_bytes().repeat(2);
            data.truncate(len);
            if write {
                driver.transport.write(offset, &data);
            } else {
                driver.transport.read(offset, &mut data);
            }
            driver.kick(0);
        }
    }

    #[test]
    fn no_position_in_the_rings_panics(available: u16, used: u16, held: u16, index: u16) {
        let mut driver = driver();
        driver.start(FEATURES);
        let mut state = driver.save();
        state.transport.queues[0].next_available = available;
        state.transport.queues[0].next_used = used;
        driver.set_available_index(0, index);
        driver.restore(fresh(), state).unwrap();
        driver.process_pending();
        driver.kick(0);
        // Neither does a device's own state.
        let balloon = || {
            let nothing = crate::virtio::balloon::tests::Host::default();
            Box::new(Balloon::new(nothing, Default::default(), 0).unwrap())
        };
        let mut driver = Driver::new(balloon());
        driver.start(0);
        let mut state = driver.save();
        let DeviceState::Balloon(balloon_state) = &mut state.device else { panic!() };
        balloon_state.held = Some(held);
        if driver.restore(balloon(), state).is_ok() {
            driver.process_pending();
        }
    }

    #[test]
    fn no_content_of_the_rings_panics(
        rings in prop::collection::vec(any::<u8>(), 0xc00),
        plausible in prop::collection::vec((0u16..20, 0u16..8, 0u16..20), 0..24),
        ahead in 0u16..20,
    ) {
        let mut driver = driver();
        driver.start(FEATURES);
        driver.write(Driver::rings(0), &rings);
        for (index, (next, flags, head)) in (0..).zip(plausible) {
            driver.describe(0, index % SIZE, Descriptor { addr: 0x8000, len: 0x1000, flags, next });
            driver.offer(0, head);
        }
        driver.set_available_index(0, ahead);
        for _ in 0..3 {
            driver.kick(0);
        }
    }
}
