use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketType};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::*;
use crate::bus::BusDevice;
use crate::virtio::mmio::Status;
use crate::virtio::testing::{Descriptor, Driver};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PREFIX: usize = 4;
const FRAME_MAX: usize = PACKET_MAX - HEADER;
/// Where the configuration space begins.
const CONFIG: u64 = 0x100;

fn driver(filter: Option<Box<dyn FrameFilter>>) -> (Driver, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let end = Backend::stream(theirs, filter).unwrap();
    let net = Net::new(vec![end], MAC, Limits::default()).unwrap();
    let mut driver = Driver::new(Box::new(net));
    driver.start(feature(spec::VIRTIO_NET_F_MRG_RXBUF));
    (driver, ours)
}

/// A frame of a size, different from others.
fn frame(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|index| seed ^ index as u8).collect()
}

fn framed(frame: &[u8]) -> Vec<u8> {
    let mut bytes = (frame.len() as u32).to_be_bytes().to_vec();
    bytes.extend(frame);
    bytes
}

/// The guest sends a frame.
fn send(driver: &mut Driver, frame: &[u8]) {
    driver.write(0x20000, &[0; HEADER]);
    driver.write(0x20000 + HEADER as u64, frame);
    driver.add(
        TRANSMIT,
        &[Descriptor::readable(0x20000, (HEADER + frame.len()) as u32)],
    );
    driver.kick(TRANSMIT);
}

/// What the peer gets without waiting.
fn taken(peer: &mut UnixStream, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; most];
    let mut len = 0;
    while len < most {
        match peer.read(&mut bytes[len..]) {
            Ok(0) | Err(_) => break,
            Ok(more) => len += more,
        }
    }
    bytes.truncate(len);
    bytes
}

fn link(driver: &mut Driver) -> u16 {
    let mut status = [0; 2];
    driver.transport.read(CONFIG + 6, &mut status);
    u16::from_le_bytes(status)
}

fn counter(driver: &Driver, name: &str) -> u64 {
    let counters = driver.transport.counters();
    counters.iter().find(|(known, _)| *known == name).unwrap().1
}

#[test]
fn a_socket_offers_no_offloads() {
    let (mut driver, _peer) = driver(None);
    let mut offered = 0;
    for half in 0..2 {
        driver.write_register(0x14, half);
        offered |= u64::from(driver.read_register(0x10)) << (32 * half);
    }
    for wanted in [spec::VIRTIO_NET_F_STATUS, VIRTIO_F_VERSION_1] {
        assert_ne!(offered & feature(wanted), 0, "{wanted}");
    }
    for unwanted in [
        spec::VIRTIO_NET_F_CSUM,
        spec::VIRTIO_NET_F_GUEST_CSUM,
        spec::VIRTIO_NET_F_HOST_TSO4,
        spec::VIRTIO_NET_F_GUEST_TSO6,
        spec::VIRTIO_NET_F_MQ,
        spec::VIRTIO_NET_F_MTU,
    ] {
        assert_eq!(offered & feature(unwanted), 0, "{unwanted}");
    }
}

#[test]
fn frames_go_both_ways_behind_their_length() {
    let (mut driver, mut peer) = driver(None);
    for len in [14, 60, 1514, 9000, FRAME_MAX] {
        let frame = frame(len as u8, len);
        send(&mut driver, &frame);
        assert_eq!(driver.used(TRANSMIT).len(), 1);
        assert_eq!(taken(&mut peer, PREFIX + len), framed(&frame));
        driver.add(RECEIVE, &[Descriptor::writable(0x40000, 70_000)]);
        driver.kick(RECEIVE);
        peer.write_all(&framed(&frame)).unwrap();
        driver.handle_event();
        assert_eq!(driver.used(RECEIVE)[0].1 as usize, HEADER + len);
        let got = driver.read(0x40000, HEADER + len);
        assert_eq!(got[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(got[HEADER..], frame);
    }
    // Of many parts, and one that is none.
    driver.write(0x20000, &[0; HEADER]);
    driver.write(0x20000 + HEADER as u64, &frame(1, 140));
    let mut parts = vec![Descriptor::readable(0x20000, 12)];
    parts.extend((0..14).map(|part| Descriptor::readable(0x2000c + 10 * part, 10)));
    driver.add(TRANSMIT, &parts);
    driver.kick(TRANSMIT);
    driver.used(TRANSMIT);
    assert_eq!(taken(&mut peer, 144), framed(&frame(1, 140)));
    send(&mut driver, &frame(1, 13));
    assert_eq!(driver.used(TRANSMIT).len(), 1);
    assert!(taken(&mut peer, 1).is_empty());
    assert_eq!(counter(&driver, "tx_drops"), 1);
}

/// However the socket divides it, each byte arrives once and in order, and of
/// what does not fit no more than a frame is held.
#[test]
fn frames_are_sent_together() {
    // Each of its reads gives what one call wrote.
    let flags = rustix::net::SocketFlags::NONBLOCK;
    let (kind, family) = (SocketType::SEQPACKET, AddressFamily::UNIX);
    let (ours, theirs) = rustix::net::socketpair(family, kind, flags, None).unwrap();
    let end = Backend::stream(UnixStream::from(theirs), None).unwrap();
    let net = Net::new(vec![end], MAC, Limits::default()).unwrap();
    let mut driver = Driver::new(Box::new(net));
    driver.start(0);
    let mut peer = UnixStream::from(ours);
    for count in [3, 1] {
        let frame = frame(7, 60);
        driver.write(0x20000 + HEADER as u64, &frame);
        for _ in 0..count {
            driver.add(TRANSMIT, &[Descriptor::readable(0x20000, 72)]);
        }
        driver.kick(TRANSMIT);
        assert_eq!(driver.used(TRANSMIT).len(), count);
        let mut read = [0; 4096];
        let len = peer.read(&mut read).unwrap();
        assert_eq!(read[..len], framed(&frame).repeat(count));
        assert!(peer.read(&mut read).is_err());
    }
}

#[test]
fn a_peer_that_reads_late_holds_the_guest_back() {
    let (mut driver, mut peer) = driver(None);
    let (mut sent, mut got) = (Vec::new(), Vec::new());
    let mut done = 0;
    for count in 0..14 {
        let frame = frame(count, 60_000);
        sent.extend(framed(&frame));
        let at = 0x8000 + u64::from(count) * 0x10000;
        driver.write(at, &[0; HEADER]);
        driver.write(at + HEADER as u64, &frame);
        driver.add(
            TRANSMIT,
            &[Descriptor::readable(at, (HEADER + 60_000) as u32)],
        );
    }
    driver.kick(TRANSMIT);
    done += driver.used(TRANSMIT).len();
    assert!((1..14).contains(&done), "{done}");
    driver.kick(TRANSMIT);
    assert_eq!(driver.used(TRANSMIT), []);
    while got.len() < sent.len() {
        // Until it is empty, so that there is room for sure.
        let more = taken(&mut peer, 1 << 20);
        assert!(!more.is_empty(), "{} of {}", got.len(), sent.len());
        got.extend(more);
        if got.len() < sent.len() {
            driver.handle_events(|token| token == ROOM);
        }
        done += driver.used(TRANSMIT).len();
    }
    assert!(got == sent);
    assert_eq!(done, 14);
}

#[test]
fn a_peer_that_leaves_or_talks_nonsense_takes_the_link_down() {
    type Deed = fn(UnixStream) -> Option<UnixStream>;
    let deeds: [Deed; 4] = [
        |_| None,
        |mut peer| {
            peer.write_all(&[0; 4]).unwrap();
            Some(peer)
        },
        |mut peer| {
            peer.write_all(&(FRAME_MAX as u32 + 1).to_be_bytes())
                .unwrap();
            Some(peer)
        },
        |mut peer| {
            peer.write_all(&[0xff; 3000]).unwrap();
            Some(peer)
        },
    ];
    for deed in deeds {
        let (mut driver, mut peer) = driver(None);
        assert_eq!(link(&mut driver), 1);
        driver.add(RECEIVE, &[Descriptor::writable(0x9000, 200)]);
        driver.kick(RECEIVE);
        // What was said before still counts.
        peer.write_all(&framed(&frame(0, 20))).unwrap();
        let peer = deed(peer);
        driver.interrupts();
        driver.handle_event();
        assert_eq!(driver.used(RECEIVE), [(0, 32)]);
        assert_eq!(link(&mut driver), 0);
        assert_eq!(driver.read_register(0x60) & 2, 2);
        assert!(!driver.status().contains(Status::NEEDS_RESET));
        // What the guest sends is lost, and nothing else.
        for _ in 0..3 {
            send(&mut driver, &frame(0, 100));
            assert_eq!(driver.used(TRANSMIT).len(), 1);
        }
        if let Some(mut peer) = peer {
            assert!(taken(&mut peer, 1).is_empty());
        }
        driver.reset();
        driver.start(0);
        send(&mut driver, &frame(0, 100));
        assert_eq!(driver.used(TRANSMIT).len(), 1);
        assert_eq!(link(&mut driver), 0);
    }
}

#[test]
fn a_reset_loses_packets_but_not_the_framing() {
    let (mut driver, mut peer) = driver(None);
    // Half a frame each way, as the peer does not read.
    for count in 0..14 {
        let at = 0x8000 + count * 0x10000;
        driver.add(TRANSMIT, &[Descriptor::readable(at, 60_012)]);
    }
    driver.kick(TRANSMIT);
    let whole = framed(&frame(7, 500));
    peer.write_all(&framed(&frame(1, 100))).unwrap();
    peer.write_all(&whole[..300]).unwrap();
    driver.handle_events(|token| token == 0);
    driver.reset();
    driver.start(0);
    peer.write_all(&whole[300..]).unwrap();
    driver.add(RECEIVE, &[Descriptor::writable(0x9000, 2000)]);
    driver.kick(RECEIVE);
    assert_eq!(driver.used(RECEIVE), [(0, 512)]);
    assert_eq!(driver.read(0x9000 + HEADER as u64, 500), frame(7, 500));
    // Frames that were begun before the reset are ended.
    send(&mut driver, &frame(9, 40));
    let mut got = Vec::new();
    while !got.ends_with(&framed(&frame(9, 40))) {
        let more = taken(&mut peer, 1 << 20);
        assert!(!more.is_empty());
        got.extend(more);
        if !got.ends_with(&framed(&frame(9, 40))) {
            driver.handle_events(|token| token == ROOM);
        }
    }
    assert_eq!((got.len() - 44) % 60_004, 0);
}

/// Lets pass what begins with an even byte, and answers 1 with 2.
#[derive(Default)]
struct Parity {
    seen: u64,
}

impl FrameFilter for Parity {
    fn outgoing(&mut self, frame: &[u8], _: Instant) -> Verdict {
        self.seen += 1;
        match frame[0] {
            1 => Verdict::Answer(vec![2; 60]),
            first if first.is_multiple_of(2) => Verdict::Pass,
            _ => Verdict::Drop,
        }
    }

    fn incoming(&mut self, frame: &[u8], _: Instant) -> bool {
        frame[0].is_multiple_of(2)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("seen", self.seen)]
    }
}

#[test]
fn a_filter_passes_drops_and_answers() {
    let (mut driver, mut peer) = driver(Some(Box::new(Parity::default())));
    for at in [0x9000, 0xa000] {
        driver.add(RECEIVE, &[Descriptor::writable(at, 200)]);
    }
    driver.kick(RECEIVE);
    for first in 0..4 {
        send(&mut driver, &[first; 40]);
    }
    assert_eq!(driver.used(TRANSMIT).len(), 4);
    assert_eq!(
        taken(&mut peer, 200),
        [framed(&[0; 40]), framed(&[2; 40])].concat()
    );
    assert_eq!(driver.used(RECEIVE), [(0, 72)]);
    assert_eq!(driver.read(0x9000 + HEADER as u64, 60), [2; 60]);
    for first in [3, 5, 6] {
        peer.write_all(&framed(&[first; 30])).unwrap();
    }
    driver.handle_event();
    assert_eq!(driver.used(RECEIVE), [(1, 42)]);
    assert_eq!(driver.read(0xa000 + HEADER as u64, 30), [6; 30]);
    assert_eq!(counter(&driver, "seen"), 4);
    assert_eq!(counter(&driver, "tx_drops"), 2);
    assert_eq!(counter(&driver, "rx_drops"), 2);
    // Answers that find no buffer do not grow without end.
    for _ in 0..500 {
        send(&mut driver, &[1; 40]);
        driver.used(TRANSMIT);
    }
    assert_eq!(counter(&driver, "tx_drops"), 502);
}

/// Sends the guest each frame of the network's once more.
#[derive(Default)]
struct Again {
    frames: VecDeque<(Instant, Vec<u8>)>,
}

impl FrameFilter for Again {
    fn outgoing(&mut self, _: &[u8], _: Instant) -> Verdict {
        Verdict::Pass
    }

    fn incoming(&mut self, frame: &[u8], now: Instant) -> bool {
        let due = now + Duration::from_millis(20);
        self.frames.push_back((due, frame.to_vec()));
        true
    }

    fn next_due(&self) -> Option<Instant> {
        self.frames.front().map(|(due, _)| *due)
    }

    fn take_due(&mut self, now: Instant) -> Option<Vec<u8>> {
        let is_due = self.next_due().is_some_and(|due| due <= now);
        is_due
            .then(|| self.frames.pop_front())?
            .map(|(_, frame)| frame)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

#[test]
fn a_filter_s_own_frames_reach_the_guest_when_they_are_due() {
    let (mut driver, mut peer) = driver(Some(Box::<Again>::default()));
    let buffers = [0x9000, 0xa000, 0xb000, 0xc000];
    for at in buffers {
        driver.add(RECEIVE, &[Descriptor::writable(at, 200)]);
    }
    driver.kick(RECEIVE);
    let mut received = 0;
    for (first, pause) in [(4, 0), (5, 10)] {
        std::thread::sleep(Duration::from_millis(pause));
        peer.write_all(&framed(&[first; 30])).unwrap();
        driver.handle_events(|token| token == 0);
        received += driver.used(RECEIVE).len();
    }
    assert_eq!(received, 2);
    while received < 4 {
        driver.handle_events(|token| token == TIMER);
        let more = driver.used(RECEIVE).len();
        assert!(more > 0, "the timer is not set again");
        received += more;
    }
    let got = buffers.map(|at| driver.read(at + HEADER as u64, 30));
    assert_eq!(got, [4, 5, 4, 5].map(|first| [first; 30]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_division_of_the_stream_gives_the_same_frames(
        frames in prop::collection::vec((any::<u8>(), 14usize..3000), 1..20),
        cuts in prop::collection::vec(1usize..5000, 1..40),
        filtered: bool,
    ) {
        let filter = filtered.then(|| Box::new(Everything) as Box<dyn FrameFilter>);
        let (mut driver, mut peer) = driver(filter);
        let frames: Vec<_> = frames.iter().map(|&(seed, len)| frame(seed, len)).collect();
        let stream: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
        let (mut rest, mut got, mut cuts) = (&stream[..], VecDeque::new(), cuts.iter().cycle());
        while got.len() < frames.len() {
            let len = (*cuts.next().unwrap()).min(rest.len());
            let (now, later) = rest.split_at(len);
            peer.write_all(now).unwrap();
            rest = later;
            driver.transport.event_ready(0);
            loop {
                driver.add(RECEIVE, &[Descriptor::writable(0x9000, 4000)]);
                driver.kick(RECEIVE);
                let Some(&(_, len)) = driver.used(RECEIVE).first() else { break };
                got.push_back(driver.read(0x9000 + HEADER as u64, len as usize - HEADER));
            }
            // A buffer that found no frame is as good as any for the next one.
            driver.reset();
            driver.start(feature(spec::VIRTIO_NET_F_MRG_RXBUF));
        }
        prop_assert!(got == frames);
        for frame in &frames {
            send(&mut driver, frame);
            driver.used(TRANSMIT);
        }
        prop_assert!(taken(&mut peer, stream.len()) == stream);
    }

    #[test]
    fn no_bytes_of_a_peer_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..2000),
        small in prop::collection::vec((0u8..3, 0u8..200), 0..20),
    ) {
        let (mut driver, mut peer) = driver(None);
        for (high, low) in small {
            let _ = peer.write_all(&[0, 0, high, low]);
            let _ = peer.write_all(&vec![1; usize::from(high) * 256 + usize::from(low)]);
        }
        let _ = peer.write_all(&bytes);
        driver.add(RECEIVE, &[Descriptor::writable(0x9000, 300)]);
        driver.add(RECEIVE, &[Descriptor::writable(0xa000, 300)]);
        driver.kick(RECEIVE);
        driver.transport.event_ready(0);
        send(&mut driver, &[0; 100]);
        prop_assert!(!driver.status().contains(Status::NEEDS_RESET));
    }
}

struct Everything;

impl FrameFilter for Everything {
    fn outgoing(&mut self, _: &[u8], _: Instant) -> Verdict {
        Verdict::Pass
    }

    fn incoming(&mut self, _: &[u8], _: Instant) -> bool {
        true
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}
