use super::super::port::RING_MAX;
use super::*;
use crate::bus::BusDevice;
use crate::char_device::CharDevice;
use crate::virtio::mmio::Status;
use crate::virtio::testing::{Descriptor, Driver, MEMORY, SIZE};
use proptest::prelude::*;

const DATA: u64 = 0x10000;
const CONFIG: u64 = 0x100;

struct Bench {
    driver: Driver,
    port: Arc<Mutex<Port>>,
    host_event: EventFd,
}

impl Bench {
    fn new() -> Self {
        let host_event = EventFd::new(EFD_NONBLOCK).unwrap();
        let console = Console::new(host_event.try_clone().unwrap()).unwrap();
        let port = console.port();
        let driver = Driver::new(Box::new(console));
        Bench {
            driver,
            port,
            host_event,
        }
    }

    /// A driver that set its terminal up as Linux does.
    fn started() -> Self {
        let mut bench = Bench::new();
        bench.driver.start(feature(F_SIZE));
        bench.driver.kick(RECEIVE);
        bench.size();
        bench.driver.interrupts();
        bench.attentions();
        bench
    }

    fn size(&mut self) -> (u16, u16) {
        let mut data = [0; 4];
        self.driver.transport.read(CONFIG, &mut data);
        let [a, b, c, d] = data;
        (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
    }

    fn attentions(&self) -> u64 {
        self.host_event.read().unwrap_or(0)
    }

    fn send(&mut self, data: &[u8]) {
        self.driver.write(DATA, data);
        let chain = [Descriptor::readable(DATA, data.len() as u32)];
        self.driver.add(TRANSMIT, &chain);
        self.driver.kick(TRANSMIT);
    }
}

#[test]
fn output_comes_in_order_and_is_announced_once() {
    let mut bench = Bench::started();
    bench.send(b"hello ");
    bench.send(b"world");
    assert_eq!(bench.driver.used(TRANSMIT).len(), 2);
    assert_eq!(bench.attentions(), 1);
    assert_eq!(lock(&bench.port).output(), b"hello world");
    lock(&bench.port).output_done(6);
    assert_eq!(lock(&bench.port).output(), b"world");
    lock(&bench.port).output_done(100);
    assert_eq!(lock(&bench.port).output(), b"");
}

#[test]
fn a_full_ring_keeps_the_guest_waiting_until_it_drains() {
    let mut bench = Bench::started();
    let data: Vec<u8> = (0..RING_MAX + 1000).map(|at| at as u8).collect();
    bench.send(&data);
    bench.send(b"behind");
    assert_eq!(bench.driver.used(TRANSMIT), []);
    let mut seen = Vec::new();
    let mut drain = |bench: &mut Bench, count: usize| {
        let mut port = lock(&bench.port);
        for _ in 0..count {
            seen.push(port.output()[0]);
            port.output_done(1);
        }
    };
    drain(&mut bench, RING_MAX / 2 - 1);
    drain(&mut bench, 1);
    bench.driver.handle_event();
    assert_eq!(bench.driver.used(TRANSMIT).len(), 2);
    assert_eq!(bench.driver.interrupts(), 1);
    let rest = RING_MAX / 2 + 1000 + b"behind".len();
    drain(&mut bench, rest);
    assert_eq!(seen[..data.len()], data);
    assert_eq!(&seen[data.len()..], b"behind");
}

#[test]
fn input_waits_until_the_terminal_is_there() {
    let mut bench = Bench::new();
    let hear = |bench: &mut Bench| bench.port.lock().unwrap().input(b"too early");
    hear(&mut bench);
    bench.driver.start(feature(F_SIZE));
    bench.size(); // not told of a change: means nothing
    bench
        .driver
        .add(RECEIVE, &[Descriptor::writable(DATA, 100)]);
    bench.driver.kick(RECEIVE);
    assert_eq!(lock(&bench.port).input_room(), 0);
    assert_eq!(bench.driver.interrupts(), 1); // of the configuration
    bench.attentions();
    bench.size();
    assert_eq!(bench.attentions(), 1);
    lock(&bench.port).input(b"now");
    bench.driver.handle_event();
    assert_eq!(bench.driver.used(RECEIVE), [(0, 3)]);
    assert_eq!(bench.driver.read(DATA, 3), b"now");
    assert_eq!(lock(&bench.port).input_room(), RING_MAX);
}

#[test]
fn a_driver_without_a_size_listens_at_once() {
    let mut bench = Bench::new();
    bench.driver.start(0);
    assert_eq!(lock(&bench.port).input_room(), RING_MAX);
    bench.driver.kick(RECEIVE);
    lock(&bench.port).resized(TerminalSize {
        columns: 1,
        rows: 1,
    });
    bench.driver.handle_event();
    assert_eq!(bench.driver.interrupts(), 0);
}

#[test]
fn input_fills_as_many_buffers_as_it_needs() {
    let mut bench = Bench::started();
    lock(&bench.port).input(&[7; RING_MAX + 1]);
    assert_eq!(lock(&bench.port).input_room(), 0);
    bench.driver.handle_event();
    assert_eq!(bench.attentions(), 0);
    for _ in 0..3 {
        bench
            .driver
            .add(RECEIVE, &[Descriptor::writable(DATA, 30_000)]);
    }
    bench.driver.kick(RECEIVE);
    let lens: Vec<u32> = bench
        .driver
        .used(RECEIVE)
        .iter()
        .map(|used| used.1)
        .collect();
    assert_eq!(lens, [30_000, 30_000, RING_MAX as u32 - 60_000]);
    assert_eq!(bench.attentions(), 1);
}

#[test]
fn the_size_is_told_at_the_start_and_when_it_changes() {
    let mut bench = Bench::new();
    let resize = |bench: &Bench, columns, rows| {
        lock(&bench.port).resized(TerminalSize { columns, rows });
    };
    resize(&bench, 80, 25);
    bench.driver.start(feature(F_SIZE));
    bench.driver.kick(TRANSMIT);
    assert_eq!((bench.driver.interrupts(), bench.size()), (1, (80, 25)));
    resize(&bench, 132, 50);
    bench.driver.handle_event();
    assert_eq!((bench.driver.interrupts(), bench.size()), (1, (132, 50)));
    bench.driver.kick(TRANSMIT);
    assert_eq!(bench.driver.interrupts(), 0);
    bench.driver.reset();
    bench.driver.start(feature(F_SIZE));
    bench.driver.kick(TRANSMIT);
    assert_eq!((bench.driver.interrupts(), bench.size()), (1, (132, 50)));
}

#[test]
fn a_reset_in_the_middle_forgets_the_guest_s_buffers() {
    let mut bench = Bench::started();
    bench.send(&vec![1; RING_MAX + 1]);
    lock(&bench.port).input(b"input");
    bench.driver.reset();
    bench.driver.write(DATA, &[9; 100]);
    lock(&bench.port).output_done(RING_MAX);
    bench.driver.handle_event();
    assert_eq!(lock(&bench.port).output(), b"");
    assert_eq!(lock(&bench.port).input_room(), 0);
    bench.driver.start(feature(F_SIZE));
    bench.driver.kick(TRANSMIT);
    bench.size();
    bench
        .driver
        .add(RECEIVE, &[Descriptor::writable(DATA, 100)]);
    bench.driver.kick(RECEIVE);
    assert_eq!(bench.driver.used(RECEIVE), []);
    bench.send(b"again");
    assert_eq!(lock(&bench.port).output(), b"again");
}

#[test]
fn buffers_of_the_wrong_shape_break_the_device() {
    for (queue, chain) in [
        (RECEIVE, vec![Descriptor::readable(DATA, 10)]),
        (RECEIVE, vec![Descriptor::writable(DATA, 0)]),
        (TRANSMIT, vec![Descriptor::writable(DATA, 10)]),
        (
            TRANSMIT,
            vec![
                Descriptor::readable(DATA, 10),
                Descriptor::writable(DATA, 10),
            ],
        ),
    ] {
        let mut bench = Bench::started();
        lock(&bench.port).input(b"x");
        bench.driver.add(queue, &chain);
        bench.driver.kick(queue);
        assert!(bench.driver.status().contains(Status::NEEDS_RESET));
    }
}

#[test]
fn a_guest_that_never_rests_leaves_others_their_turn() {
    let mut bench = Bench::started();
    bench
        .driver
        .describe(TRANSMIT, 0, Descriptor::readable(DATA, 1));
    for _ in 0..SIZE {
        bench.driver.offer(TRANSMIT, 0);
    }
    bench.driver.kick(TRANSMIT);
    assert_eq!(bench.driver.used(TRANSMIT).len(), usize::from(SIZE));
}

proptest! {
    #[test]
    fn no_chains_panic_or_grow(
        steps in prop::collection::vec(
            (0usize..2, any::<bool>(), 0u64..MEMORY as u64 + 100, 0u32..200_000, 0usize..100_000),
            1..20),
    ) {
        let mut bench = Bench::started();
        for (queue, write, addr, len, host) in steps {
            let descriptor = match write {
                true => Descriptor::writable(addr.max(DATA), len),
                false => Descriptor::readable(addr.max(DATA), len),
            };
            lock(&bench.port).input(&vec![1; host]);
            bench.driver.add(queue, &[descriptor]);
            bench.driver.kick(queue);
            lock(&bench.port).output_done(host);
            bench.driver.transport.event_ready(0);
            let port = lock(&bench.port);
            prop_assert!(port.output().len() <= RING_MAX);
            prop_assert!(port.input_room() <= RING_MAX);
        }
    }
}

#[test]
fn the_next_client_is_heard_when_the_guest_took_what_the_first_said() {
    let mut bench = Bench::started();
    lock(&bench.port).connected(true);
    lock(&bench.port).input(b"first");
    bench.driver.handle_event();
    lock(&bench.port).connected(false);
    lock(&bench.port).connected(true);
    bench.driver.handle_event();
    assert_eq!(lock(&bench.port).input_room(), 0);
    for _ in 0..2 {
        bench
            .driver
            .add(RECEIVE, &[Descriptor::writable(DATA, 100)]);
    }
    bench.driver.kick(RECEIVE);
    assert_eq!(bench.driver.used(RECEIVE).len(), 1);
    assert!(lock(&bench.port).input_room() > 0);
    lock(&bench.port).input(b"second");
    bench.driver.handle_event();
    assert_eq!(bench.driver.used(RECEIVE).len(), 1);
    // One that leaves when all is taken is forgotten at once.
    lock(&bench.port).connected(false);
    lock(&bench.port).connected(true);
    bench.driver.handle_event();
    assert!(lock(&bench.port).input_room() > 0);
}

#[test]
fn what_is_on_its_way_survives_a_restore() {
    let mut bench = Bench::started();
    // A chain of which a part has no room.
    let data: Vec<u8> = (0..RING_MAX + 1000).map(|at| at as u8).collect();
    bench.send(&data);
    lock(&bench.port).input(b"to the guest");
    lock(&bench.port).resized(TerminalSize {
        columns: 80,
        rows: 24,
    });
    bench.driver.handle_event();
    let state = bench.driver.save();
    assert_eq!(bench.driver.used(TRANSMIT), []);
    let drain = |port: &Arc<Mutex<Port>>| {
        let mut port = lock(port);
        let mut seen: Vec<u8> = Vec::new();
        while !port.output().is_empty() {
            seen.extend(port.output());
            let count = port.output().len();
            port.output_done(count);
        }
        seen
    };
    let host_event = EventFd::new(EFD_NONBLOCK).unwrap();
    let other = Console::new(host_event.try_clone().unwrap()).unwrap();
    let port = other.port();
    bench
        .driver
        .restore(Box::new(other), state.clone())
        .unwrap();
    assert_eq!(bench.driver.save(), state);
    assert_eq!(host_event.read().unwrap(), 1);
    assert_eq!(bench.size(), (80, 24));
    let mut seen = drain(&port);
    bench.driver.process_pending();
    seen.extend(drain(&port));
    assert_eq!(seen, data);
    assert_eq!(bench.driver.used(TRANSMIT).len(), 1);
    bench
        .driver
        .add(RECEIVE, &[Descriptor::writable(DATA, 100)]);
    bench.driver.kick(RECEIVE);
    assert_eq!(bench.driver.read(DATA, 12), b"to the guest");

    let mut foreign = state;
    let DeviceState::Console(console) = &mut foreign.device else {
        panic!();
    };
    console.port.input = vec![0; RING_MAX + 1].into();
    let other = Console::new(host_event).unwrap();
    assert!(bench.driver.restore(Box::new(other), foreign).is_err());
}
