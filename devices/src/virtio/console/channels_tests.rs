use super::super::port::RING_MAX;
use super::*;
use crate::char_device::CharDevice;
use crate::virtio::mmio::Status;
use crate::virtio::testing::{Descriptor, Driver};
use proptest::prelude::*;

const DATA: u64 = 0x10000;
const REPLIES: u64 = 0x20000;
const REPLY_MAX: u32 = 100;

struct Bench {
    driver: Driver,
    ports: Vec<Arc<Mutex<Port>>>,
    replies: u64,
}

impl Bench {
    fn new(names: &[&str]) -> Self {
        let host_event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let channels = names.iter().map(|name| (name.to_string(), host_event()));
        let channels = Channels::new(channels.collect()).unwrap();
        let ports = channels.ports();
        let driver = Driver::new(Box::new(channels));
        Bench {
            driver,
            ports,
            replies: 0,
        }
    }

    fn started(names: &[&str]) -> Self {
        let mut bench = Bench::new(names);
        bench.driver.start(feature(F_MULTIPORT));
        bench
    }

    /// As Linux does.
    fn made(names: &[&str]) -> Self {
        let mut bench = Bench::started(names);
        bench.say(u32::MAX, DEVICE_READY, 1);
        for id in 1..=names.len() as u32 {
            bench.say(id, PORT_READY, 1);
        }
        bench.told();
        bench
    }

    fn say(&mut self, id: u32, event: u16, value: u16) {
        let message = [
            &id.to_le_bytes()[..],
            &event.to_le_bytes(),
            &value.to_le_bytes(),
        ]
        .concat();
        self.driver.write(DATA, &message);
        self.driver.add(
            CONTROL_TRANSMIT,
            &[Descriptor::readable(DATA, MESSAGE as u32)],
        );
        self.driver.kick(CONTROL_TRANSMIT);
    }

    /// The control messages that the guest gets, given at most `buffers` buffers.
    fn told_in(&mut self, buffers: usize) -> Vec<(u32, u16, u16, String)> {
        for _ in 0..buffers {
            let at = REPLIES + self.replies % 16 * 0x100;
            self.replies += 1;
            self.driver
                .add(CONTROL_RECEIVE, &[Descriptor::writable(at, REPLY_MAX)]);
        }
        self.driver.kick(CONTROL_RECEIVE);
        let mut all = Vec::new();
        for (head, len) in self.driver.used(CONTROL_RECEIVE) {
            let reply = self
                .driver
                .read(REPLIES + u64::from(head) * 0x100, len as usize);
            all.push((
                u32::from_le_bytes(reply[..4].try_into().unwrap()),
                u16::from_le_bytes(reply[4..6].try_into().unwrap()),
                u16::from_le_bytes(reply[6..8].try_into().unwrap()),
                String::from_utf8(reply[8..].to_vec()).unwrap(),
            ));
        }
        all
    }

    fn told(&mut self) -> Vec<(u32, u16, u16, String)> {
        let waiting = self.replies as usize - self.taken();
        self.told_in(8 - waiting.min(8))
    }

    /// How many reply buffers were used so far.
    fn taken(&self) -> usize {
        let used = Driver::rings(CONTROL_RECEIVE) + 0x802;
        let index = self.driver.read(used, 2);
        usize::from(u16::from_le_bytes([index[0], index[1]]))
    }

    fn host(&mut self, port: usize) -> std::sync::MutexGuard<'_, Port> {
        lock(&self.ports[port])
    }
}

fn news(id: u32, event: u16, value: u16, name: &str) -> (u32, u16, u16, String) {
    (id, event, value, name.to_owned())
}

#[test]
fn queues_are_numbered_as_the_specification_does() {
    let mut bench = Bench::new(&["a", "b"]);
    let mut config = [0; 8];
    crate::bus::BusDevice::read(&mut bench.driver.transport, 0x100, &mut config);
    assert_eq!(config, [0, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(bench.driver.transport.kicks().len(), 8);
    assert_eq!((receive_queue(0), receive_queue(1)), (4, 6));
    assert!(matches!(role(7), Role::Transmit(1)));
    assert!(matches!(role(1), Role::Unused));
}

#[test]
fn ports_are_added_named_and_opened() {
    let mut bench = Bench::started(&["one", "two"]);
    bench.host(0).connected(true);
    assert_eq!(bench.told(), []);
    bench.say(u32::MAX, DEVICE_READY, 1);
    assert_eq!(
        bench.told(),
        [news(1, PORT_ADD, 1, ""), news(2, PORT_ADD, 1, "")]
    );
    bench.say(1, PORT_READY, 1);
    bench.say(2, PORT_READY, 1);
    assert_eq!(
        bench.told(),
        [
            news(1, PORT_NAME, 1, "one"),
            news(1, PORT_OPEN, 1, ""),
            news(2, PORT_NAME, 1, "two"),
        ]
    );
    bench.host(1).connected(true);
    bench.driver.handle_event();
    assert_eq!(bench.told(), [news(2, PORT_OPEN, 1, "")]);
}

#[test]
fn news_wait_for_buffers_and_never_pile_up() {
    let mut bench = Bench::started(&["a"]);
    for _ in 0..100 {
        bench.say(u32::MAX, DEVICE_READY, 1);
        bench.say(1, PORT_READY, 1);
        bench.host(0).connected(true);
        bench.host(0).connected(false);
    }
    bench.driver.used(CONTROL_TRANSMIT);
    assert_eq!(bench.told_in(1), [news(1, PORT_NAME, 1, "a")]);
    bench.host(0).connected(true);
    assert_eq!(bench.told_in(1), [news(1, PORT_OPEN, 1, "")]);
    bench.host(0).connected(false);
    bench.host(0).connected(true);
    assert_eq!(bench.told_in(1), [news(1, PORT_OPEN, 0, "")]);
    assert_eq!(bench.told_in(1), [news(1, PORT_OPEN, 1, "")]);
    assert_eq!(bench.told_in(1), []);
}

#[test]
fn bytes_go_both_ways_while_the_guest_has_the_port_open() {
    let mut bench = Bench::made(&["a", "b"]);
    bench.host(1).connected(true);
    assert_eq!(bench.host(1).input_room(), 0);
    bench.say(2, PORT_OPEN, 1);
    bench.host(1).input(b"to the guest");
    bench.driver.add(6, &[Descriptor::writable(DATA, 100)]);
    bench.driver.handle_event();
    bench.driver.kick(6);
    assert_eq!(bench.driver.used(6), [(0, 12)]);
    assert_eq!(bench.driver.read(DATA, 12), b"to the guest");
    bench.driver.write(DATA, b"to the host");
    bench.driver.add(7, &[Descriptor::readable(DATA, 11)]);
    bench.driver.kick(7);
    assert_eq!(bench.host(1).output(), b"to the host");
    assert_eq!(bench.host(0).output(), b"");
    bench.say(2, PORT_OPEN, 0);
    assert_eq!(bench.host(1).input_room(), 0);
}

#[test]
fn a_hang_up_comes_behind_the_last_bytes_and_before_the_next_client() {
    let mut bench = Bench::made(&["a"]);
    bench.host(0).connected(true);
    bench.say(1, PORT_OPEN, 1);
    assert_eq!(bench.told(), [news(1, PORT_OPEN, 1, "")]);
    bench.host(0).input(b"last words");
    bench.host(0).connected(false);
    bench.host(0).connected(true);
    assert_eq!(bench.host(0).input_room(), 0);
    bench.driver.handle_event();
    assert_eq!(bench.told(), []);
    bench.driver.add(4, &[Descriptor::writable(DATA, 100)]);
    bench.driver.kick(4);
    assert_eq!(bench.driver.used(4), [(0, 10)]);
    assert_eq!(
        bench.told(),
        [news(1, PORT_OPEN, 0, ""), news(1, PORT_OPEN, 1, "")]
    );
    assert_eq!(bench.host(0).input_room(), RING_MAX);
}

#[test]
fn messages_of_a_hostile_driver_break_the_device() {
    type Act = fn(&mut Bench);
    let acts: [(&str, Act); 8] = [
        ("port 0", |bench| bench.say(0, PORT_OPEN, 1)),
        ("a port too many", |bench| bench.say(2, PORT_OPEN, 1)),
        ("no port", |bench| bench.say(u32::MAX, PORT_READY, 1)),
        ("short", |bench| {
            bench
                .driver
                .add(CONTROL_TRANSMIT, &[Descriptor::readable(DATA, 7)]);
            bench.driver.kick(CONTROL_TRANSMIT);
        }),
        ("writable", |bench| {
            bench
                .driver
                .add(CONTROL_TRANSMIT, &[Descriptor::writable(DATA, 8)]);
            bench.driver.kick(CONTROL_TRANSMIT);
        }),
        ("a small reply", |bench| {
            bench
                .driver
                .add(CONTROL_RECEIVE, &[Descriptor::writable(DATA, 7)]);
            bench.say(u32::MAX, DEVICE_READY, 1);
        }),
        ("a readable reply", |bench| {
            bench
                .driver
                .add(CONTROL_RECEIVE, &[Descriptor::readable(DATA, 80)]);
            bench.say(u32::MAX, DEVICE_READY, 1);
        }),
        ("a writable transmission", |bench| {
            bench.driver.add(5, &[Descriptor::writable(DATA, 80)]);
            bench.driver.kick(5);
        }),
    ];
    for (name, act) in acts {
        let mut bench = Bench::started(&["a"]);
        act(&mut bench);
        assert!(
            bench.driver.status().contains(Status::NEEDS_RESET),
            "{name}"
        );
        bench.driver.reset();
        bench.replies = 0;
        bench.driver.start(feature(F_MULTIPORT));
        bench.say(u32::MAX, DEVICE_READY, 1);
        assert_eq!(bench.told(), [news(1, PORT_ADD, 1, "")], "{name}");
    }
}

#[test]
fn what_is_unknown_is_ignored_and_failures_too() {
    let mut bench = Bench::made(&["a"]);
    bench.say(u32::MAX, DEVICE_READY, 0);
    bench.say(1, PORT_READY, 0);
    bench.say(1, 99, 7);
    bench.driver.add(0, &[Descriptor::writable(DATA, 80)]);
    bench.driver.kick(0);
    bench.driver.add(1, &[Descriptor::readable(DATA, 80)]);
    bench.driver.kick(1);
    assert!(!bench.driver.status().contains(Status::NEEDS_RESET));
    assert_eq!(
        (bench.driver.used(0), bench.driver.used(1)),
        (vec![], vec![])
    );
}

#[test]
fn a_driver_of_one_terminal_finds_none() {
    let mut bench = Bench::new(&["a"]);
    bench.driver.set_up(0);
    bench.driver.add_status(Status::DRIVER_OK);
    assert!(bench.driver.status().contains(Status::NEEDS_RESET));
}

proptest! {
    #[test]
    fn no_messages_panic(
        steps in prop::collection::vec((0u32..5, 0u16..9, 0u16..3, 0usize..8, 0usize..2), 0..60),
    ) {
        let mut bench = Bench::started(&["a", "b"]);
        for (id, event, value, queue, port) in steps {
            bench.say(id, event, value);
            bench.host(port).connected(value == 0);
            bench.host(port).input(&[1; 500]);
            let descriptor = match queue % 2 {
                0 => Descriptor::writable(REPLIES, REPLY_MAX),
                _ => Descriptor::readable(REPLIES, REPLY_MAX),
            };
            bench.driver.add(queue, &[descriptor]);
            bench.driver.kick(queue);
            bench.driver.transport.event_ready(0);
            if bench.driver.status().contains(Status::NEEDS_RESET) {
                bench.driver.reset();
                bench.driver.start(feature(F_MULTIPORT));
            }
        }
    }
}

#[test]
fn restored_channels_know_that_their_clients_left() {
    let mut bench = Bench::made(&["a", "b"]);
    bench.host(0).connected(true);
    bench.driver.handle_event();
    assert_eq!(bench.told(), [news(1, PORT_OPEN, 1, "")]);
    bench.say(1, PORT_OPEN, 1);
    bench.host(0).input(b"before");
    let state = bench.driver.save();

    let host_event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let channels = |names: [&str; 2]| {
        let channels = names.map(|name| (name.to_owned(), host_event()));
        Channels::new(channels.into()).unwrap()
    };
    let other = channels(["a", "b"]);
    bench.ports = other.ports();
    bench
        .driver
        .restore(Box::new(other), state.clone())
        .unwrap();
    assert_eq!(bench.told(), [news(1, PORT_OPEN, 0, "")]);
    bench.driver.add(4, &[Descriptor::writable(DATA, 100)]);
    bench.driver.kick(4);
    assert_eq!(bench.driver.read(DATA, 6), b"before");
    bench.host(0).connected(true);
    bench.driver.handle_event();
    assert_eq!(bench.told(), [news(1, PORT_OPEN, 1, "")]);
    for names in [["a", "c"], ["b", "a"]] {
        let other = channels(names);
        assert!(
            bench
                .driver
                .restore(Box::new(other), state.clone())
                .is_err()
        );
    }
}
