use super::*;
use crate::bus::BusDevice;
use crate::virtio::mmio::Status;
use crate::virtio::testing::{Descriptor, Driver, MEMORY};
use proptest::prelude::*;

const DATA: u64 = 0x10000;
const CONFIG: u64 = 0x100;

type Taken = Arc<Mutex<Vec<(u64, u64)>>>;

#[derive(Default)]
pub(in crate::virtio) struct Host(Taken);

impl Reclaim for Host {
    fn reclaim(&mut self, start: u64, len: u64) -> Option<u64> {
        if start.checked_add(len)? > MEMORY as u64 {
            return None;
        }
        self.0.lock().unwrap().push((start, len));
        Some(len)
    }
}

struct Bench {
    driver: Driver,
    handle: BalloonHandle,
    taken: Taken,
}

const ALL: Abilities = Abilities {
    deflate_on_oom: true,
    reporting: true,
};

impl Bench {
    fn new(size: u64) -> Self {
        let taken = Taken::default();
        let balloon = Balloon::new(Host(taken.clone()), ALL, size).unwrap();
        let handle = balloon.handle();
        let driver = Driver::new(Box::new(balloon));
        Bench {
            driver,
            handle,
            taken,
        }
    }

    fn started() -> Self {
        let mut bench = Bench::new(0);
        bench
            .driver
            .start(feature(F_STATS_VQ) | feature(F_REPORTING));
        bench
    }

    fn ask(&mut self, queue: usize, pages: &[u32]) {
        let data: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.driver.write(DATA, &data);
        let chain = [Descriptor::readable(DATA, data.len() as u32)];
        self.driver.add(queue, &chain);
        self.driver.kick(queue);
    }

    fn taken(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.taken.lock().unwrap())
    }

    fn target(&mut self) -> u32 {
        let mut data = [0; 4];
        self.driver.transport.read(CONFIG, &mut data);
        u32::from_le_bytes(data)
    }

    fn broken(&mut self) -> bool {
        self.driver.status().contains(Status::NEEDS_RESET)
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = self.driver.transport.counters();
        counters.iter().find(|(known, _)| *known == name).unwrap().1
    }
}

#[test]
fn pages_that_follow_each_other_go_at_once() {
    let mut bench = Bench::started();
    bench.ask(INFLATE, &[9, 7, 8, 3, 8, 20]);
    assert_eq!(
        bench.taken(),
        [(0x3000, 0x1000), (0x7000, 0x3000), (0x14000, 0x1000)]
    );
    assert_eq!(bench.driver.used(INFLATE), [(0, 0)]);
    bench.ask(DEFLATE, &[7, 8]);
    assert_eq!(bench.driver.used(DEFLATE), [(0, 0)]);
    assert_eq!(bench.taken(), []);
    assert_eq!(bench.counter("inflated_pages"), 5);
    assert_eq!(bench.counter("deflated_pages"), 2);
    assert_eq!(bench.counter("reclaimed_bytes"), 0x5000);
}

#[test]
fn the_target_is_told_and_the_size_heard() {
    let mut bench = Bench::new(1 << 20);
    assert_eq!(bench.target(), 256);
    bench.driver.start(0);
    bench.driver.interrupts();
    bench.handle.set_target(2 << 20);
    bench.driver.handle_event();
    assert_eq!((bench.target(), bench.driver.interrupts()), (512, 1));
    bench.handle.set_target(2 << 20);
    bench.driver.handle_event();
    assert_eq!(bench.driver.interrupts(), 0);
    bench
        .driver
        .transport
        .write(CONFIG + ACTUAL, &7u32.to_le_bytes());
    assert_eq!(bench.handle.actual(), 7 << 12);
    for (offset, data) in [
        (0, &[1; 4][..]),
        (ACTUAL, &[1; 2]),
        (6, &[1; 4]),
        (u64::MAX - CONFIG, &[1; 4]),
    ] {
        bench.driver.transport.write(CONFIG + offset, data);
    }
    assert_eq!((bench.target(), bench.handle.actual()), (512, 7 << 12));
    bench.handle.set_target(u64::MAX);
    assert_eq!(bench.handle.target(), u64::from(u32::MAX) << 12);
    bench.driver.reset();
    assert_eq!((bench.target(), bench.handle.actual()), (u32::MAX, 0));
}

#[test]
fn reports_come_by_either_queue() {
    for queue in [3, 4] {
        let mut bench = Bench::started();
        let chain = [
            Descriptor::writable(0x20000, 0x4000),
            Descriptor::writable(0x30000, 0x2000),
        ];
        bench.driver.add(queue, &chain);
        bench.driver.kick(queue);
        assert_eq!(bench.taken(), [(0x20000, 0x4000), (0x30000, 0x2000)]);
        assert_eq!(bench.driver.used(queue).len(), 1);
        assert_eq!(bench.counter("reported_bytes"), 0x6000);
    }
}

#[test]
fn statistics_are_asked_for_and_read() {
    let mut bench = Bench::started();
    let send = |bench: &mut Bench, entries: &[(u16, u64)]| {
        let data: Vec<u8> = entries
            .iter()
            .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
            .collect();
        bench.driver.write(DATA, &data);
        let chain = [Descriptor::readable(DATA, data.len() as u32)];
        bench.driver.add(STATISTICS, &chain);
        bench.driver.kick(STATISTICS);
    };
    assert!(bench.handle.statistics().is_none());
    send(&mut bench, &[(4, 1000), (5, 2000), (99, 1)]);
    let values = bench.handle.statistics().unwrap().values;
    assert_eq!(values, [("free_bytes", 1000), ("total_bytes", 2000)]);
    assert_eq!(bench.driver.used(STATISTICS), []);
    bench.handle.request_statistics();
    bench.driver.handle_event();
    assert_eq!(bench.driver.used(STATISTICS), [(0, 0)]);
    // Asked for again before the answer: nothing to ask with.
    bench.handle.request_statistics();
    bench.driver.handle_event();
    assert_eq!(bench.driver.used(STATISTICS), []);
    send(&mut bench, &[(4, 1)]);
    assert_eq!(
        bench.handle.statistics().unwrap().values,
        [("free_bytes", 1)]
    );
    // One that is too many is given back; a ragged one is read as far as it goes.
    bench
        .driver
        .add(STATISTICS, &[Descriptor::readable(DATA, 15)]);
    bench.driver.kick(STATISTICS);
    assert_eq!(bench.driver.used(STATISTICS).len(), 1);
    assert_eq!(
        bench.handle.statistics().unwrap().values,
        [("free_bytes", 1)]
    );
}

#[test]
fn what_is_offered_is_what_was_asked_for() {
    let plain = Balloon::new(Host(Taken::default()), Abilities::default(), 0).unwrap();
    assert_eq!((plain.features(), plain.queue_sizes().len()), (2, 3));
    let all = Balloon::new(Host(Taken::default()), ALL, 0).unwrap();
    assert_eq!((all.features(), all.queue_sizes().len()), (0b10_0110, 5));
}

#[test]
fn requests_of_a_hostile_driver_break_the_device() {
    let cases = [
        (INFLATE, Descriptor::writable(DATA, 8)),
        (INFLATE, Descriptor::readable(DATA, 7)),
        (INFLATE, Descriptor::readable(DATA, 0)),
        (
            INFLATE,
            Descriptor::readable(DATA, 4 * PAGES_MAX as u32 + 4),
        ),
        (INFLATE, Descriptor::readable(DATA, 0x40000)),
        (DEFLATE, Descriptor::writable(DATA, 8)),
        (DEFLATE, Descriptor::readable(DATA, 9)),
        (STATISTICS, Descriptor::writable(DATA, 10)),
        (3, Descriptor::readable(DATA, 0x1000)),
        (4, Descriptor::readable(DATA, 0x1000)),
    ];
    for (queue, descriptor) in cases {
        let mut bench = Bench::started();
        bench.driver.add(queue, &[descriptor]);
        bench.driver.kick(queue);
        assert!(bench.broken(), "{queue} {descriptor:?}");
        assert_eq!(bench.taken(), []);
        bench.driver.reset();
        bench.driver.start(0);
        bench.ask(INFLATE, &[1]);
        assert_eq!(bench.taken(), [(0x1000, 0x1000)]);
    }
    for page in [MEMORY as u32 >> 12, u32::MAX] {
        let mut bench = Bench::started();
        bench.ask(INFLATE, &[page]);
        assert!(bench.broken(), "{page:#x}");
    }
}

proptest! {
    #[test]
    fn runs_are_the_pages_and_do_not_touch(pages in prop::collection::vec(0u32..200, 0..100)) {
        let mut pages = pages;
        pages.sort_unstable();
        pages.dedup();
        let runs = runs(pages.clone());
        let all: Vec<u32> = runs.iter().flat_map(|&(first, count)| first..first + count).collect();
        prop_assert_eq!(all, pages);
        for pair in runs.windows(2) {
            prop_assert!(pair[0].0 + pair[0].1 < pair[1].0);
        }
    }

    #[test]
    fn no_requests_panic(
        steps in prop::collection::vec(
            (0usize..5, any::<bool>(), 0u64..MEMORY as u64 + 100, 0u32..5000, any::<u32>()), 1..30),
    ) {
        let mut bench = Bench::started();
        for (queue, write, addr, len, value) in steps {
            bench.driver.write(DATA, &value.to_le_bytes().repeat(300));
            let descriptor = match write {
                true => Descriptor::writable(addr.max(DATA), len),
                false => Descriptor::readable(addr.max(DATA), len),
            };
            bench.driver.add(queue, &[descriptor]);
            bench.driver.kick(queue);
            bench.handle.set_target(value.into());
            bench.handle.request_statistics();
            bench.driver.transport.event_ready(0);
            if bench.broken() {
                bench.driver.reset();
                bench.driver.start(0);
            }
        }
    }
}

#[test]
fn a_restored_balloon_has_its_size_and_answers_with_the_buffer_it_held() {
    let mut bench = Bench::started();
    bench.handle.set_target(2 << 20);
    bench.driver.handle_event();
    let actual = 7u32.to_le_bytes();
    bench.driver.transport.write(CONFIG + ACTUAL, &actual);
    bench.driver.write(DATA, &[0; STATISTIC]);
    let chain = [Descriptor::readable(DATA, STATISTIC as u32)];
    bench.driver.add(STATISTICS, &chain);
    bench.driver.kick(STATISTICS);
    let state = bench.driver.save();

    let other = Balloon::new(Host::default(), ALL, 1 << 20).unwrap();
    let handle = other.handle();
    bench
        .driver
        .restore(Box::new(other), state.clone())
        .unwrap();
    assert_eq!((handle.target(), handle.actual()), (2 << 20, 7 << 12));
    assert_eq!(bench.target(), 512);
    assert_eq!(bench.driver.save(), state);
    assert_eq!(bench.driver.used(STATISTICS), []);
    handle.request_statistics();
    bench.driver.handle_event();
    assert_eq!(bench.driver.used(STATISTICS), [(0, 0)]);

    let mut foreign = state;
    let DeviceState::Balloon(balloon) = &mut foreign.device else {
        panic!();
    };
    balloon.held = Some(QUEUE_SIZES[STATISTICS]);
    let other = Balloon::new(Host::default(), ALL, 0).unwrap();
    assert!(bench.driver.restore(Box::new(other), foreign).is_err());
}
