#![allow(unsafe_code, reason = "takes descriptors out of messages")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use proptest::prelude::*;
use virtio_bindings::virtio_mmio as reg;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::frontend::{HEADER, NEED_REPLY, PROTOCOL_FEATURES, REPLY, REPLY_ACK, Request, VERSION};
use super::*;
use crate::bus::lock;
use crate::virtio::feature;
use crate::virtio::mmio::Status;
use crate::virtio::testing::{Driver, MEMORY, SIZE};

const VERSION_1: u64 = feature(virtio_bindings::virtio_config::VIRTIO_F_VERSION_1);

/// A message as a backend gets it: what, its data, its descriptor.
type Message = (u32, Vec<u8>, Option<File>);

/// A backend that keeps what it was told.
struct Fake {
    thread: JoinHandle<()>,
    told: Arc<Mutex<Vec<Message>>>,
}

/// What one answers: bytes; none to close its socket.
type Answer = Box<dyn FnMut(u32, u32) -> Option<Vec<u8>> + Send>;

fn answer(request: u32, data: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in [request, VERSION | REPLY, 8] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&data.to_le_bytes());
    bytes
}

/// What a good one answers; the queue that is asked for is in the low half.
fn good(request: u32, flags: u32, low: u32) -> Vec<u8> {
    const GET_FEATURES: u32 = Request::GetFeatures as u32;
    const GET_PROTOCOL_FEATURES: u32 = Request::GetProtocolFeatures as u32;
    const GET_VRING_BASE: u32 = Request::GetVringBase as u32;
    match request {
        // Some that nobody here knows, too.
        GET_FEATURES => answer(request, PROTOCOL_FEATURES | VERSION_1 | FEATURES | 1 << 26),
        GET_PROTOCOL_FEATURES => answer(request, REPLY_ACK | 1),
        GET_VRING_BASE => answer(request, u64::from(low) | 7 << 32),
        _ if flags & NEED_REPLY != 0 => answer(request, 0),
        _ => Vec::new(),
    }
}

impl Fake {
    /// One that is good, but for what is answered instead.
    fn new(mut instead: Answer) -> (UnixStream, Fake) {
        let (ours, mut socket) = UnixStream::pair().unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let kept = told.clone();
        let thread = std::thread::spawn(move || {
            loop {
                let mut header = [0u8; HEADER];
                let mut fds = [-1; 8];
                let mut iovecs = [libc::iovec {
                    iov_base: header.as_mut_ptr().cast(),
                    iov_len: HEADER,
                }];
                // SAFETY: a live buffer of that length.
                let got = unsafe { socket.recv_with_fds(&mut iovecs, &mut fds) };
                let Ok((HEADER, count)) = got else { return };
                let files: Vec<File> = fds[..count]
                    .iter()
                    // SAFETY: just received, so nobody else has them.
                    .map(|&fd| unsafe { File::from_raw_fd(fd) })
                    .collect();
                let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
                let (request, flags) = (number(0), number(4));
                let mut data = vec![0; number(8) as usize];
                socket.read_exact(&mut data).unwrap();
                let low = data.first_chunk().copied().map_or(0, u32::from_le_bytes);
                lock(&kept).push((request, data, files.into_iter().next()));
                let Some(bytes) = instead(request, low) else {
                    return;
                };
                let bytes = match bytes.is_empty() {
                    true => good(request, flags, low),
                    false => bytes,
                };
                if socket.write_all(&bytes).is_err() {
                    return;
                }
            }
        });
        (ours, Fake { thread, told })
    }

    /// Takes what was told of a kind.
    fn take(&self, what: Request) -> Vec<Message> {
        let mut told = lock(&self.told);
        told.extract_if(.., |message| message.0 == what as u32)
            .collect()
    }
}

/// One that is good until a message, and answers that with something else.
fn until(at: Request, bytes: Option<Vec<u8>>) -> Answer {
    Box::new(move |request, _| match request == at as u32 {
        true => bytes.clone(),
        false => Some(Vec::new()),
    })
}

fn always_good() -> Answer {
    Box::new(|_, _| Some(Vec::new()))
}

/// A driver of a device, and how often its backend was ended.
fn driver(socket: UnixStream) -> (Driver, Arc<AtomicU32>) {
    let ends = Arc::new(AtomicU32::new(0));
    let count = ends.clone();
    let frontend = Frontend::greet(socket, BACKEND_TIMEOUT, None).unwrap();
    let end = Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    let device = Fs::new(frontend, "v0", end).unwrap();
    (Driver::shared(Box::new(device)), ends)
}

/// Starts the device, which may fail.
fn start(driver: &mut Driver) {
    driver.set_up(0);
    driver.add_status(Status::DRIVER_OK);
}

fn numbers(data: &[u8]) -> Vec<u64> {
    data.chunks_exact(8)
        .map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap()))
        .collect()
}

#[test]
fn a_backend_gets_memory_queues_and_notifications() {
    let (socket, fake) = Fake::new(always_good());
    let (mut driver, ends) = driver(socket);
    assert_eq!(driver.read_register(reg::VIRTIO_MMIO_DEVICE_ID), 26);
    let tag = driver.read_register(reg::VIRTIO_MMIO_CONFIG);
    assert_eq!(tag.to_le_bytes(), *b"v0\0\0");
    for _ in 0..2 {
        driver.start(0);
        let (_, features, _) = fake.take(Request::SetFeatures).remove(0);
        assert_eq!(numbers(&features), [VERSION_1 | PROTOCOL_FEATURES]);
        let (_, table, file) = fake.take(Request::SetMemTable).remove(0);
        let table = numbers(&table);
        let [1, 0, len, base, 0] = table[..] else {
            panic!("{table:?}")
        };
        assert_eq!(len, MEMORY as u64);
        // It is the very memory.
        driver.write(0x8000, b"shared");
        let mut bytes = [0; 6];
        file.unwrap().read_exact_at(&mut bytes, 0x8000).unwrap();
        assert_eq!(bytes, *b"shared");

        let addresses = fake.take(Request::SetVringAddr);
        let sizes = fake.take(Request::SetVringNum);
        let (kicks, calls) = (
            fake.take(Request::SetVringKick),
            fake.take(Request::SetVringCall),
        );
        assert_eq!(fake.take(Request::SetVringEnable).len(), 2);
        for queue in 0..2 {
            let rings = base + Driver::rings(queue);
            let index = queue as u64;
            assert_eq!(
                numbers(&addresses[queue].1),
                [index, rings, rings + 0x800, rings + 0x400, 0]
            );
            assert_eq!(numbers(&sizes[queue].1), [index | u64::from(SIZE) << 32]);

            // The backend hears of chains, and the device leaves them alone.
            let kick = kicks[queue].2.as_ref().unwrap();
            let kicked = || {
                let mut count = [0; 8];
                let mut kick = kick;
                kick.read(&mut count)
                    .map_or(0, |_| u64::from_le_bytes(count))
            };
            kicked();
            driver.write_register(reg::VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
            assert_eq!(kicked(), 1);

            driver.kick(queue);
            assert_eq!(driver.read(Driver::rings(queue), 0xc00), [0; 0xc00]);

            // The guest hears of used ones, and why it is interrupted.
            let mut call = calls[queue].2.as_ref().unwrap();
            call.write_all(&1u64.to_ne_bytes()).unwrap();
            driver.handle_events(|token| token as usize == queue);
            assert_eq!(driver.interrupts(), 1);
            let why = driver.read_register(reg::VIRTIO_MMIO_INTERRUPT_STATUS);
            assert_eq!(why, reg::VIRTIO_MMIO_INT_VRING);
            driver.write_register(reg::VIRTIO_MMIO_INTERRUPT_ACK, why);
        }
        // It has stopped before the guest goes on.
        driver.reset();
        let stopped = fake.take(Request::GetVringBase);
        let stopped: Vec<_> = stopped.iter().flat_map(|it| numbers(&it.1)).collect();
        assert_eq!(stopped, [0, 1]);
    }
    assert_eq!(ends.load(Ordering::Relaxed), 0);
    drop(driver);
    fake.thread.join().unwrap();
}

#[test]
fn answers_wake_nobody_up() {
    let (socket, _fake) = Fake::new(always_good());
    let (mut driver, _) = driver(socket);
    driver.start(0);
    let hung_up = driver.transport.sources()[HUNG_UP as usize].1;
    assert!(!crate::poll::ready(hung_up, libc::POLLIN, 0));
}

#[test]
fn a_backend_that_fails_breaks_the_device_for_good() {
    let nonsense = |request: Request| Some(answer(request as u32 + 1, 0));
    let refusal = |request: Request| Some(answer(request as u32, 1));
    let mut long = answer(Request::SetMemTable as u32, 0);
    long[8] = 9;
    for (at, bytes) in [
        (Request::SetFeatures, refusal(Request::SetFeatures)),
        (Request::SetFeatures, None),
        (Request::SetMemTable, nonsense(Request::SetMemTable)),
        (Request::SetMemTable, Some(long)),
        (Request::SetVringNum, refusal(Request::SetVringNum)),
        (Request::SetVringAddr, None),
        (Request::SetVringKick, nonsense(Request::SetVringKick)),
        (Request::SetVringEnable, refusal(Request::SetVringEnable)),
        (Request::SetVringEnable, Some(vec![0xff; 4096])),
    ] {
        let (socket, fake) = Fake::new(until(at, bytes));
        let (mut driver, ends) = driver(socket);
        for _ in 0..2 {
            start(&mut driver);
            assert!(driver.status().contains(Status::NEEDS_RESET), "{at:?}");
            assert_eq!(ends.load(Ordering::Relaxed), 1);
            driver.reset();
        }
        fake.thread.join().unwrap();
    }
}

#[test]
fn a_backend_that_is_silent_is_not_waited_for() {
    let mut byte = vec![1];
    byte.resize(3, 0);
    let (socket, _fake) = Fake::new(until(Request::SetVringEnable, Some(byte)));
    let (mut driver, ends) = driver(socket);
    let begun = Instant::now();
    start(&mut driver);
    assert!(begun.elapsed() < BACKEND_TIMEOUT * 2);
    assert!(driver.status().contains(Status::NEEDS_RESET));
    assert_eq!(ends.load(Ordering::Relaxed), 1);
}

#[test]
fn a_backend_that_does_not_stop_is_ended() {
    let wrong = Some(answer(Request::GetVringBase as u32, 5));
    let (socket, _fake) = Fake::new(until(Request::GetVringBase, wrong));
    let (mut driver, ends) = driver(socket);
    driver.start(0);
    driver.reset();
    assert_eq!(ends.load(Ordering::Relaxed), 1);
    start(&mut driver);
    assert!(driver.status().contains(Status::NEEDS_RESET));
}

#[test]
fn a_backend_that_dies_is_noticed() {
    let (socket, fake) = Fake::new(always_good());
    let same = socket.try_clone().unwrap();
    let (mut driver, ends) = driver(socket);
    driver.start(0);
    // As if the other end were closed.
    same.shutdown(Shutdown::Both).unwrap();
    fake.thread.join().unwrap();
    driver.handle_events(|token| token == HUNG_UP);
    assert!(driver.status().contains(Status::NEEDS_RESET));
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(ends.load(Ordering::Relaxed), 1);
    driver.transport.event_ready(HUNG_UP);
    driver.transport.event_ready(0);
    assert_eq!(driver.interrupts(), 0);
}

#[test]
fn a_backend_never_hears_of_queues_outside_of_memory() {
    for rings in [MEMORY as u64, !0xfff, MEMORY as u64 - 0x800] {
        let (socket, fake) = Fake::new(always_good());
        let (mut driver, ends) = driver(socket);
        driver.set_up(0);
        driver.write_register(reg::VIRTIO_MMIO_QUEUE_READY, 0);
        driver.set_up_queue(1, rings);
        driver.add_status(Status::DRIVER_OK);
        assert!(driver.status().contains(Status::NEEDS_RESET), "{rings:#x}");
        assert!(fake.take(Request::SetMemTable).is_empty());
        // It is the driver's fault, and can be mended.
        assert_eq!(ends.load(Ordering::Relaxed), 0);
        driver.reset();
        driver.start(0);
        assert_eq!(fake.take(Request::SetVringAddr).len(), 2);
    }
}

#[test]
fn memory_must_be_shared() {
    let (socket, _fake) = Fake::new(always_good());
    let frontend = Frontend::greet(socket, BACKEND_TIMEOUT, None).unwrap();
    let device = Fs::new(frontend, "v0", Box::new(|| {})).unwrap();
    let mut driver = Driver::new(Box::new(device));
    start(&mut driver);
    assert!(driver.status().contains(Status::NEEDS_RESET));
}

#[test]
fn what_is_no_backend_is_refused() {
    for (at, bytes, error) in [
        (Request::GetFeatures, None, BackendError::Ended),
        (
            Request::GetFeatures,
            Some(answer(Request::GetFeatures as u32, VERSION_1)),
            BackendError::Unfit,
        ),
        (
            Request::GetProtocolFeatures,
            Some(answer(Request::GetProtocolFeatures as u32, 0)),
            BackendError::Unfit,
        ),
        (Request::SetOwner, Some(vec![0; 64]), BackendError::Nonsense),
        (Request::SetOwner, Some(vec![1]), BackendError::Silent),
    ] {
        let (socket, _fake) = Fake::new(until(at, bytes));
        let greeted = Frontend::greet(socket, Duration::from_millis(100), None);
        assert_eq!(greeted.err(), Some(error), "{at:?}");
    }
    let (socket, _fake) = Fake::new(always_good());
    let frontend = Frontend::greet(socket, BACKEND_TIMEOUT, None).unwrap();
    assert!(Fs::new(frontend, &"v".repeat(37), Box::new(|| {})).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn garbage_ends(garbage in prop::collection::vec(any::<u8>(), 0..128)) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&garbage).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        prop_assert!(Frontend::greet(ours, BACKEND_TIMEOUT, None).is_err());
    }
}

#[test]
fn a_folder_of_the_host_s_says_that_it_cannot_be_saved() {
    let (socket, _fake) = Fake::new(always_good());
    let (driver, _) = driver(socket);
    let refusal = driver.transport.save().unwrap_err();
    assert_eq!(refusal.device, DeviceId::Fs);
}
