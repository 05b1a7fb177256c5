use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

use super::*;
use crate::rate_limiter::Rate;
use crate::virtio::interrupt::Interrupter;
use crate::virtio::mmio;
use crate::virtio::registers::{RegisterPage, RegisterPages};
use crate::virtio::testing::{Descriptor, Driver};
use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SECTORS: u64 = 128;
const HEADER: u64 = 0x8000;
const DATA: u64 = 0x9000;
const STATUS: u64 = 0xa000;

fn image() -> File {
    let file = tempfile::tempfile().unwrap();
    for sector in 0..SECTORS {
        file.write_all_at(&[sector as u8; 512], sector * 512)
            .unwrap();
    }
    file
}

fn disk(file: &File, read_only: bool) -> Disk {
    Disk {
        image: Image::Raw(file.try_clone().unwrap()),
        sectors: SECTORS,
        read_only,
        id: *b"the-disk\0\0\0\0\0\0\0\0\0\0\0\0",
        queues: 1,
        limits: RateLimits::default(),
    }
}

fn driver(file: &File) -> Driver {
    started(Block::new(disk(file, false)).unwrap())
}

fn started(block: Block) -> Driver {
    let features = block.features();
    let mut driver = Driver::new(Box::new(block));
    driver.start(features);
    driver
}

/// Sends a request, and returns its status and the used length.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[Descriptor]) -> (u8, u32) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    driver.write(HEADER, &header);
    driver.write(STATUS, &[0xee]);
    let mut chain = vec![Descriptor::readable(HEADER, 16)];
    chain.extend(data);
    chain.push(Descriptor::writable(STATUS, 1));
    let head = driver.add(0, &chain);
    driver.kick(0);
    for _ in 0..100 {
        if let [(used, len)] = driver.used(0)[..] {
            assert_eq!(used, head);
            return (driver.read(STATUS, 1)[0], len);
        }
        driver.handle_event();
    }
    panic!("the request does not end");
}

fn content(file: &File, sector: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    file.read_exact_at(&mut data, sector * 512).unwrap();
    data
}

fn moves_data(make: impl Fn(&File) -> Driver) {
    let file = image();
    let mut driver = make(&file);
    let read = [
        Descriptor::writable(DATA, 512),
        Descriptor::writable(DATA + 0x800, 1024),
    ];
    assert_eq!(
        request(&mut driver, spec::VIRTIO_BLK_T_IN, 5, &read),
        (0, 1537)
    );
    assert_eq!(driver.read(DATA, 512), [5; 512]);
    assert_eq!(driver.read(DATA + 0x800, 512), [6; 512]);
    assert_eq!(driver.read(DATA + 0xa00, 512), [7; 512]);

    driver.write(DATA, &[0xab; 1024]);
    let write = [
        Descriptor::readable(DATA, 100),
        Descriptor::readable(DATA + 100, 924),
    ];
    assert_eq!(
        request(&mut driver, spec::VIRTIO_BLK_T_OUT, 126, &write),
        (0, 1)
    );
    assert_eq!(content(&file, 126, 1024), [0xab; 1024]);
    assert_eq!(
        request(&mut driver, spec::VIRTIO_BLK_T_FLUSH, 0, &[]),
        (0, 1)
    );
    assert!(driver.interrupts() >= 3);
}

#[test]
fn data_moves_by_io_uring() {
    moves_data(driver);
}

#[test]
fn data_moves_by_threads() {
    moves_data(|file| {
        started(
            Block::with_engine(disk(file, false), |image| {
                Engine::threads(image, &unprepared())
            })
            .unwrap(),
        )
    });
}

/// Threads that wait for something else first, until they are given up.
#[derive(Default)]
struct Waits {
    given_up: Arc<(Mutex<bool>, Condvar)>,
}

impl Prepare for Waits {
    fn first(&self) -> Box<dyn FnOnce() + Send> {
        let given_up = self.given_up.clone();
        Box::new(move || {
            let lock = given_up.0.lock().unwrap();
            drop(given_up.1.wait_while(lock, |over| !*over).unwrap());
        })
    }

    fn give_up(&self) {
        *self.given_up.0.lock().unwrap() = true;
        self.given_up.1.notify_all();
    }
}

/// As when a VM cannot be built: its disks' threads still wait for the sandbox.
#[test]
fn a_disk_whose_threads_wait_can_be_dropped() {
    let file = image();
    let prepare: Arc<dyn Prepare> = Arc::new(Waits::default());
    let threads = |image| Engine::threads(image, &prepare);
    let block = Block::with_engine(disk(&file, false), threads).unwrap();
    let (dropped, when) = mpsc::channel();
    std::thread::spawn(move || {
        drop(block);
        dropped.send(()).unwrap();
    });
    when.recv_timeout(Duration::from_secs(20)).unwrap();
}

#[test]
fn without_flushes_writes_are_durable_at_once() {
    let file = image();
    let mut driver = Driver::new(Box::new(Block::new(disk(&file, false)).unwrap()));
    driver.start(0);
    driver.write(DATA, &[1; 512]);
    let write = [Descriptor::readable(DATA, 512)];
    assert_eq!(
        request(&mut driver, spec::VIRTIO_BLK_T_OUT, 0, &write),
        (0, 1)
    );
    assert_eq!(content(&file, 0, 512), [1; 512]);
}

#[test]
fn tells_its_id_as_far_as_there_is_room() {
    let mut driver = driver(&image());
    let room = [Descriptor::writable(DATA, 20)];
    assert_eq!(
        request(&mut driver, spec::VIRTIO_BLK_T_GET_ID, 0, &room),
        (0, 21)
    );
    assert_eq!(&driver.read(DATA, 10), b"the-disk\0\0");
    let room = [Descriptor::writable(DATA, 3)];
    assert_eq!(
        request(&mut driver, spec::VIRTIO_BLK_T_GET_ID, 0, &room),
        (0, 4)
    );
}

fn segment(driver: &Driver, sector: u64, sectors: u32, flags: u32) -> [Descriptor; 1] {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    driver.write(DATA, &bytes);
    [Descriptor::readable(DATA, 16)]
}

#[test]
fn ranges_are_discarded_and_zeroed_and_no_more() {
    let file = image();
    let mut driver = driver(&file);
    for (kind, sector, flags) in [
        (spec::VIRTIO_BLK_T_DISCARD, 8, 0),
        (spec::VIRTIO_BLK_T_WRITE_ZEROES, 24, 0),
        (spec::VIRTIO_BLK_T_WRITE_ZEROES, 40, 1),
    ] {
        let data = segment(&driver, sector, 8, flags);
        assert_eq!(request(&mut driver, kind, 0, &data), (0, 1));
        assert_eq!(content(&file, sector, 4096), [0; 4096]);
        assert_eq!(content(&file, sector - 1, 512), [sector as u8 - 1; 512]);
        assert_eq!(content(&file, sector + 8, 512), [sector as u8 + 8; 512]);
    }
    // A write of zeroes stands in where the file system cannot do it.
    let mut in_flight = InFlight {
        request: Request::parse(&chain_of(&mut driver), driver_limits()).unwrap(),
        queue: 0,
        operation: Operation {
            kind: Kind::Flush,
            offset: 0,
            iovecs: Vec::new(),
        },
        rest: 0,
        written: 0,
    };
    in_flight.write_zeroes(150_000, true);
    let total: usize = in_flight
        .operation
        .iovecs
        .iter()
        .map(|iovec| iovec.iov_len)
        .sum();
    assert_eq!((total, in_flight.rest), (150_000, 150_000));
    in_flight.advance(65_537);
    let first = in_flight.operation.iovecs[0];
    assert_eq!(
        (first.iov_len, in_flight.operation.offset),
        (65_535, 65_537)
    );
}

fn driver_limits() -> Limits {
    Limits {
        sectors: SECTORS,
        read_only: false,
        discard_sectors: 1,
        zeroes_sectors: 1,
    }
}

/// A flush, straight from the ring.
fn chain_of(driver: &mut Driver) -> crate::virtio::chain::Chain {
    driver.write(HEADER, &[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    driver.reset();
    driver.add(
        0,
        &[
            Descriptor::readable(HEADER, 16),
            Descriptor::writable(STATUS, 1),
        ],
    );
    let state = virtio_queue::QueueState {
        max_size: 16,
        size: 16,
        ready: true,
        desc_table: 0x1000,
        avail_ring: 0x1400,
        used_ring: 0x1800,
        ..Default::default()
    };
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let interrupter = Arc::new(Interrupter::new(
        RegisterPage::at(&RegisterPages::new(1), 0, false),
        interrupt,
    ));
    let mut queues = Queues::new(&driver.memory, &[state], &interrupter).unwrap();
    queues.begin();
    queues.pop(0).unwrap().unwrap()
}

#[test]
fn mistakes_fail_the_request_and_nothing_else() {
    let file = image();
    let before = content(&file, 0, SECTORS as usize * 512);
    let mut driver = driver(&file);
    let sector = Descriptor::writable(DATA, 512);
    let source = Descriptor::readable(DATA, 512);
    for (kind, at, data, status) in [
        (spec::VIRTIO_BLK_T_IN, SECTORS, vec![sector], 1),
        (spec::VIRTIO_BLK_T_IN, u64::MAX, vec![sector], 1),
        (spec::VIRTIO_BLK_T_IN, u64::MAX / 512, vec![sector], 1),
        (
            spec::VIRTIO_BLK_T_IN,
            SECTORS - 1,
            vec![Descriptor::writable(DATA, 1024)],
            1,
        ),
        (
            spec::VIRTIO_BLK_T_IN,
            0,
            vec![Descriptor::writable(DATA, 511)],
            1,
        ),
        (spec::VIRTIO_BLK_T_IN, 0, vec![], 1),
        (spec::VIRTIO_BLK_T_OUT, SECTORS, vec![source], 1),
        (
            spec::VIRTIO_BLK_T_OUT,
            0,
            vec![Descriptor::readable(DATA, 1)],
            1,
        ),
        (spec::VIRTIO_BLK_T_SCSI_CMD, 0, vec![source], 2),
        (spec::VIRTIO_BLK_T_SECURE_ERASE, 0, vec![source], 2),
        (u32::MAX, 0, vec![], 2),
        (spec::VIRTIO_BLK_T_DISCARD, 0, vec![source], 2),
        (spec::VIRTIO_BLK_T_DISCARD, 0, vec![], 2),
    ] {
        let (got, len) = request(&mut driver, kind, at, &data);
        assert_eq!((got, len), (status, 1), "{kind} {at}");
    }
    for (sector, sectors, flags, status) in [
        (0, 0, 0, 1),
        (SECTORS, 1, 0, 1),
        (u64::MAX, u32::MAX, 0, 1),
        (0, ZEROES_SECTORS_MAX + 1, 0, 1),
        (0, 1, 2, 2),
        (0, 1, u32::MAX, 2),
    ] {
        let data = segment(&driver, sector, sectors, flags);
        let (got, _) = request(&mut driver, spec::VIRTIO_BLK_T_WRITE_ZEROES, 0, &data);
        assert_eq!(got, status, "{sector} {sectors} {flags}");
    }
    assert_eq!(content(&file, 0, SECTORS as usize * 512), before);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let file = image();
    let before = content(&file, 0, SECTORS as usize * 512);
    let mut driver = started(Block::new(disk(&file, true)).unwrap());
    let source = [Descriptor::readable(DATA, 512)];
    assert_eq!(
        request(&mut driver, spec::VIRTIO_BLK_T_OUT, 0, &source).0,
        1
    );
    for kind in [spec::VIRTIO_BLK_T_DISCARD, spec::VIRTIO_BLK_T_WRITE_ZEROES] {
        let data = segment(&driver, 0, 8, 0);
        assert_eq!(request(&mut driver, kind, 0, &data).0, 1);
    }
    let target = [Descriptor::writable(DATA, 512)];
    assert_eq!(request(&mut driver, spec::VIRTIO_BLK_T_IN, 9, &target).0, 0);
    assert_eq!(content(&file, 0, SECTORS as usize * 512), before);
}

#[test]
fn a_file_that_was_cut_is_an_error_and_stays_cut() {
    let file = image();
    let mut driver = driver(&file);
    file.set_len(1024).unwrap();
    let target = [Descriptor::writable(DATA, 1024)];
    assert_eq!(request(&mut driver, spec::VIRTIO_BLK_T_IN, 1, &target).0, 1);
    assert_eq!(
        request(&mut driver, spec::VIRTIO_BLK_T_IN, 64, &target).0,
        1
    );
    assert_eq!(file.metadata().unwrap().len(), 1024);
}

#[test]
fn requests_without_header_or_status_break_the_device() {
    for chain in [
        vec![
            Descriptor::readable(HEADER, 15),
            Descriptor::writable(STATUS, 1),
        ],
        vec![Descriptor::readable(HEADER, 16)],
        vec![Descriptor::writable(STATUS, 1)],
        vec![
            Descriptor::readable(HEADER, 16),
            Descriptor::writable(STATUS, 0),
        ],
    ] {
        let mut driver = driver(&image());
        driver.add(0, &chain);
        driver.kick(0);
        assert!(driver.status().contains(mmio::Status::NEEDS_RESET));
        driver.reset();
        let features = feature(spec::VIRTIO_BLK_F_FLUSH);
        driver.start(features);
        let target = [Descriptor::writable(DATA, 512)];
        assert_eq!(request(&mut driver, spec::VIRTIO_BLK_T_IN, 3, &target).0, 0);
    }
}

#[test]
fn after_a_reset_nothing_touches_the_guest() {
    let path = tempfile::NamedTempFile::new().unwrap();
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path.path())
        .unwrap();
    file.set_len(SECTORS * 512).unwrap();
    for threads in [false, true] {
        let engine = |image| match threads {
            true => Engine::threads(image, &unprepared()),
            false => Engine::new(image, &unprepared()),
        };
        let mut driver = started(Block::with_engine(disk(&file, false), engine).unwrap());
        let mut header = [0; 16];
        driver.write(HEADER, &header);
        for index in 0..5 {
            header[8] = index;
            driver.write(HEADER + u64::from(index) * 16, &header);
            let buffer = DATA + u64::from(index) * 512;
            driver.add(
                0,
                &[
                    Descriptor::readable(HEADER + u64::from(index) * 16, 16),
                    Descriptor::writable(buffer, 512),
                    Descriptor::writable(STATUS + u64::from(index), 1),
                ],
            );
        }
        driver.kick(0);
        driver.reset();
        driver.write(DATA, &[0x77; 5 * 512]);
        driver.handle_event();
        assert_eq!(driver.read(DATA, 5 * 512), [0x77; 5 * 512]);
        assert_eq!(driver.used(0), []);
    }
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut all = Vec::new();
    file.read_to_end(&mut all).unwrap();
    assert!(all.iter().all(|&byte| byte == 0));
}

/// Adds a read of a sector to a queue without telling; returns where its
/// status will be.
fn add_read(driver: &mut Driver, queue: usize, sector: u8, sectors: u32) -> u64 {
    let slot = u64::from(sector);
    let (header, status) = (HEADER + slot * 16, STATUS + slot);
    let mut bytes = [0; 16];
    bytes[8] = sector;
    driver.write(header, &bytes);
    driver.write(status, &[0xee]);
    driver.add(
        queue,
        &[
            Descriptor::readable(header, 16),
            Descriptor::writable(DATA, sectors * 512),
            Descriptor::writable(status, 1),
        ],
    );
    status
}

fn limited(file: &File, bandwidth: Option<u64>, operations: Option<u64>) -> Disk {
    let rate = |per_second: u64| Rate {
        per_second: per_second.try_into().unwrap(),
        burst: 0,
    };
    let mut disk = disk(file, false);
    disk.limits = RateLimits {
        bandwidth: bandwidth.map(rate),
        operations: operations.map(rate),
    };
    disk
}

fn counter(driver: &Driver, name: &str) -> u64 {
    let all = driver.transport.counters();
    all.iter().find(|(known, _)| *known == name).unwrap().1
}

#[test]
fn a_spent_budget_delays_and_loses_nothing() {
    let file = image();
    let mut driver = started(Block::new(limited(&file, None, Some(20))).unwrap());
    let start = Instant::now();
    let all: Vec<u64> = (0..5).map(|n| add_read(&mut driver, 0, n, 1)).collect();
    driver.kick(0);
    let (mut used, mut turns) = (driver.used(0).len(), 0);
    while used < all.len() {
        driver.handle_event();
        used += driver.used(0).len();
        turns += 1;
    }
    // Two were saved up; three more take 50 ms each.
    assert!(
        start.elapsed() >= Duration::from_millis(100),
        "{:?}",
        start.elapsed()
    );
    assert!(turns < 20, "{turns}");
    for status in all {
        assert_eq!(driver.read(status, 1), [0]);
    }
    assert_eq!(counter(&driver, "reads"), 5);
    assert_eq!(counter(&driver, "read_bytes"), 5 * 512);
    assert!(counter(&driver, "throttled") >= 1);
}

#[test]
fn a_request_larger_than_the_budget_passes_and_new_limits_forgive_its_debt() {
    let file = image();
    let block = Block::new(limited(&file, Some(64), None)).unwrap();
    let handle = block.limit_handle();
    // What is set before there is a driver counts, too.
    handle.set(limited(&file, Some(65), None).limits);
    let mut driver = started(block);
    assert_eq!(handle.take(), None);
    add_read(&mut driver, 0, 0, 8);
    driver.kick(0);
    driver.handle_event();
    assert_eq!(driver.used(0), [(0, 4097)]);
    // A minute of debt: nothing goes on by itself …
    let status = add_read(&mut driver, 0, 1, 1);
    driver.kick(0);
    assert_eq!(counter(&driver, "throttled"), 1);
    assert_eq!(driver.read(status, 1), [0xee]);
    // … nor by a reset, but by new limits.
    driver.reset();
    let features = feature(spec::VIRTIO_BLK_F_FLUSH);
    driver.start(features);
    let status = add_read(&mut driver, 0, 1, 1);
    driver.kick(0);
    assert_eq!(driver.read(status, 1), [0xee]);
    handle.set(RateLimits::default());
    let start = Instant::now();
    while driver.used(0).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(4));
        driver.handle_event();
    }
    assert_eq!(driver.read(status, 1), [0]);
}

#[test]
fn queues_are_served_each_in_its_turn() {
    let file = image();
    let mut several = limited(&file, None, Some(20));
    several.queues = 3;
    let block = Block::new(several).unwrap();
    assert_ne!(block.features() & feature(spec::VIRTIO_BLK_F_MQ), 0);
    assert_eq!(block.config()[34..36], [3, 0]);
    let mut driver = started(block);
    for n in 0..4 {
        add_read(&mut driver, 0, n, 1);
    }
    add_read(&mut driver, 1, 4, 1);
    add_read(&mut driver, 2, 5, 1);
    let mut order = Vec::new();
    for queue in [0, 1, 2] {
        driver.kick(queue);
    }
    while order.len() < 6 {
        for queue in 0..3 {
            order.extend(driver.used(queue).iter().map(|_| queue));
        }
        driver.handle_event();
    }
    // Two of the first pass before the others are seen, and then all in turn.
    let last_of_others = order.iter().rposition(|&queue| queue != 0).unwrap();
    assert!(last_of_others < 5, "{order:?}");
    for n in 0..6 {
        assert_eq!(driver.read(STATUS + n, 1), [0]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_request_panics_or_leaves_the_disk(
        requests in prop::collection::vec(
            (0u32..20, prop_oneof![0u64..140, any::<u64>()], prop::collection::vec(any::<u8>(), 16),
             prop::collection::vec((any::<bool>(), 0u32..2000), 0..5)),
            1..12)
    ) {
        let file = image();
        let mut driver = driver(&file);
        for (kind, sector, data, shape) in requests {
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&sector.to_le_bytes());
            driver.write(HEADER, &header);
            driver.write(HEADER + 16, &data);
            let chain: Vec<_> = shape.iter().map(|&(write, len)| match write {
                true => Descriptor::writable(DATA, len),
                false => Descriptor::readable(HEADER, len),
            }).collect();
            if !chain.is_empty() {
                driver.add(0, &chain);
            }
            driver.kick(0);
            driver.transport.event_ready(0);
        }
        driver.reset();
        prop_assert_eq!(file.metadata().unwrap().len(), SECTORS * 512);
    }
}

#[test]
fn a_request_without_measure_is_refused() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 30).unwrap();
    let large = Disk {
        sectors: 1 << 21,
        ..disk(&file, false)
    };
    let mut driver = started(Block::new(large).unwrap());
    let part = Descriptor::readable(0x1_0000, 0xf_0000);
    let mut write = |count| {
        let data = vec![part; count];
        request(&mut driver, spec::VIRTIO_BLK_T_OUT, 0, &data).0
    };
    assert_eq!(write(8), 0);
    assert_eq!(write(9), spec::VIRTIO_BLK_S_IOERR as u8);
}

/// Adds a request without waiting for its end; its header, data and status have places of
/// their own.
fn begin(driver: &mut Driver, index: u64, kind: u32, sector: u64) {
    begin_long(driver, index, kind, sector, 512);
}

/// The same, of a length.
fn begin_long(driver: &mut Driver, index: u64, kind: u32, sector: u64, len: u32) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let (place, data) = (HEADER + index * 0x40, 0x10000 + index * 512);
    driver.write(place, &header);
    driver.write(place + 32, &[0xee]);
    let data = match kind {
        spec::VIRTIO_BLK_T_IN => Descriptor::writable(data, len),
        _ => Descriptor::readable(data, len),
    };
    let chain = [
        Descriptor::readable(place, 16),
        data,
        Descriptor::writable(place + 32, 1),
    ];
    driver.add(0, &chain);
}

/// It is done when the driver has notified the device, and the guest begins with the first
/// part before the last is done.
#[test]
fn what_the_page_cache_takes_and_has_is_moved_at_once() {
    const LEN: usize = 8 << 10;
    let file = image();
    let mut driver = driver(&file);
    for kind in [spec::VIRTIO_BLK_T_OUT, spec::VIRTIO_BLK_T_IN] {
        driver.interrupts();
        for _ in 0..=EARLY / LEN {
            begin_long(&mut driver, 0, kind, 1, LEN as u32);
        }
        driver.kick(0);
        let done = driver.used(0).len();
        if done == 0 {
            return; // The temporary folder's file system is not for it.
        }
        assert_eq!((done, driver.interrupts()), (EARLY / LEN + 1, 2), "{kind}");
    }
}

fn requests_in_flight_are_in_no_state(make: fn(&File) -> Block) {
    let file = image();
    let mut driver = Driver::new(Box::new(make(&file)));
    // Writes that must be durable are not made at once.
    driver.start(0);
    for index in 0..4 {
        driver.write(0x10000 + index * 512, &[0xa0 + index as u8; 512]);
        begin(&mut driver, index, spec::VIRTIO_BLK_T_OUT, 10 + index);
    }
    driver.kick(0);
    let state = driver.save();
    // All are done, before anything is saved, and none is done twice.
    assert_eq!(driver.used(0).len(), 4);
    assert_eq!(state.transport.queues[0].next_available, 4);
    assert_eq!(state.transport.queues[0].next_used, 4);
    for index in 0..4 {
        let sector = content(&file, 10 + index, 512);
        assert_eq!(sector, [0xa0 + index as u8; 512]);
        assert_eq!(driver.read(HEADER + index * 0x40 + 32, 1), [0]);
    }
    driver
        .restore(Box::new(make(&file)), state.clone())
        .unwrap();
    assert_eq!(driver.save(), state);
    driver.interrupts();
    let read = [Descriptor::writable(DATA, 512)];
    assert_eq!(
        request(&mut driver, spec::VIRTIO_BLK_T_IN, 10, &read),
        (0, 513)
    );
    assert_eq!(driver.read(DATA, 512), [0xa0; 512]);
}

#[test]
fn io_uring_s_requests_are_finished_before_a_disk_is_saved() {
    requests_in_flight_are_in_no_state(|file| Block::new(disk(file, false)).unwrap());
}

#[test]
fn threads_requests_are_finished_before_a_disk_is_saved() {
    requests_in_flight_are_in_no_state(|file| {
        let threads = |image| Engine::threads(image, &unprepared());
        Block::with_engine(disk(file, false), threads).unwrap()
    });
}

#[test]
fn another_size_is_told_after_a_restore() {
    let file = image();
    let mut driver = driver(&file);
    let state = driver.save();
    let mut other = disk(&file, false);
    other.sectors = SECTORS / 2;
    let generation = |driver: &mut Driver| driver.read_register(0xfc);
    let before = generation(&mut driver);
    let block = Block::new(other).unwrap();
    driver.restore(Box::new(block), state.clone()).unwrap();
    driver.process_pending();
    assert_eq!(generation(&mut driver), before + 1);
    let block = Block::new(disk(&file, false)).unwrap();
    driver.restore(Box::new(block), state).unwrap();
    driver.process_pending();
    assert_eq!(generation(&mut driver), before);
}
