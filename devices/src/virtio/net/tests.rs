use super::packet::NUM_BUFFERS;
use super::*;
use crate::virtio::mmio::Status;
use crate::virtio::testing::{Descriptor, Driver, MEMORY, SIZE};
use proptest::prelude::*;
use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use crate::bus::BusDevice;
use crate::rate_limiter::Rate;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A datagram socket keeps packets apart as a TAP does.
fn device() -> (Net, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let taps = vec![Backend::tap(File::from(OwnedFd::from(theirs)))];
    (Net::new(taps, MAC, Limits::default()).unwrap(), ours)
}

fn driver(mergeable: bool) -> (Driver, UnixDatagram) {
    let (net, ours) = device();
    let mut driver = Driver::new(Box::new(net));
    driver.start(match mergeable {
        true => feature(spec::VIRTIO_NET_F_MRG_RXBUF),
        false => 0,
    });
    (driver, ours)
}

fn packet(len: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend((0..len).map(|index| index as u8));
    packet
}

fn received(peer: &UnixDatagram) -> Option<Vec<u8>> {
    let mut data = vec![0; 1 << 17];
    peer.recv(&mut data).ok().map(|len| data[..len].to_vec())
}

#[test]
fn packets_are_sent_whole_and_in_order() {
    let (mut driver, peer) = driver(true);
    let data = packet(100);
    driver.write(0x8000, &data);
    driver.add(
        TRANSMIT,
        &[
            Descriptor::readable(0x8000, 12),
            Descriptor::readable(0x800c, 100),
        ],
    );
    driver.add(TRANSMIT, &[Descriptor::readable(0x8000, 50)]);
    driver.kick(TRANSMIT);
    assert_eq!(driver.used(TRANSMIT), [(0, 0), (2, 0)]);
    assert_eq!(received(&peer).unwrap(), data);
    assert_eq!(received(&peer).unwrap(), data[..50]);
}

#[test]
fn a_packet_too_large_is_lost_and_no_more() {
    let (mut driver, peer) = driver(true);
    driver.add(
        TRANSMIT,
        &[Descriptor::readable(0x8000, PACKET_MAX as u32 + 1)],
    );
    driver.add(TRANSMIT, &[Descriptor::readable(0x8000, 20)]);
    driver.kick(TRANSMIT);
    assert_eq!(driver.used(TRANSMIT).len(), 2);
    assert_eq!(received(&peer).unwrap().len(), 20);
}

#[test]
fn a_packet_is_spread_over_mergeable_buffers() {
    let (mut driver, peer) = driver(true);
    let data = packet(1000);
    peer.send(&data).unwrap();
    driver.handle_event();
    assert_eq!(driver.used(RECEIVE), []);
    for index in 0..4 {
        driver.add(
            RECEIVE,
            &[Descriptor::writable(0x8000 + index * 0x200, 400)],
        );
        driver.kick(RECEIVE);
    }
    assert_eq!(driver.used(RECEIVE), [(0, 400), (1, 400), (2, 212)]);
    let mut got = driver.read(0x8000, 400);
    got.extend(driver.read(0x8200, 400));
    got.extend(driver.read(0x8400, 212));
    assert_eq!(got[NUM_BUFFERS..HEADER], [3, 0]);
    assert_eq!(got[HEADER..], data[HEADER..]);
    assert_eq!(driver.interrupts(), 1);
    // The fourth waits for the next packet.
    peer.send(&packet(8)).unwrap();
    driver.handle_event();
    assert_eq!(driver.used(RECEIVE), [(3, 20)]);
}

/// The packet's bytes in buffers of a length each, wherever the device had to put them.
#[test]
fn a_packet_is_whole_however_many_of_its_buffers_were_there() {
    let data = packet(3000);
    for (len, parts) in [(400, 1), (90, 3), (250, 1)] {
        let count = data.len().div_ceil(len * parts);
        for early in 0..=count {
            let (mut driver, peer) = driver(true);
            let buffer = |index: usize| -> Vec<Descriptor> {
                let start = 0x8000 + (index * parts * len) as u64;
                let part = |part| Descriptor::writable(start + (part * len) as u64, len as u32);
                (0..parts).map(part).collect()
            };
            // The ring has fewer descriptors than there are parts.
            let mut used = Vec::new();
            let mut add = |driver: &mut Driver, index| {
                let head = driver.add(RECEIVE, &buffer(index));
                used.push(head);
            };
            let room = usize::from(SIZE) / parts;
            if count > room {
                continue;
            }
            (0..early).for_each(|index| add(&mut driver, index));
            driver.kick(RECEIVE);
            peer.send(&data).unwrap();
            driver.handle_event();
            (early..count).for_each(|index| add(&mut driver, index));
            driver.kick(RECEIVE);
            let heads: Vec<_> = driver.used(RECEIVE).iter().map(|entry| entry.0).collect();
            assert_eq!(heads, used, "{len} {parts} {early}");
            let got = driver.read(0x8000, data.len());
            assert_eq!(got[NUM_BUFFERS..HEADER], (count as u16).to_le_bytes());
            assert_eq!(got[HEADER..], data[HEADER..], "{len} {parts} {early}");
        }
    }
}

#[test]
fn the_guest_begins_with_what_it_got_while_more_comes() {
    let (mut driver, peer) = driver(true);
    let len = EARLY as usize + 100;
    for index in 0..4 {
        let start = 0x8000 + index * 0x9000;
        driver.add(RECEIVE, &[Descriptor::writable(start, len as u32)]);
    }
    driver.kick(RECEIVE);
    driver.interrupts();
    for len in [EARLY as usize + 1, 10, 10, EARLY as usize] {
        peer.send(&packet(len)).unwrap();
    }
    driver.handle_event();
    assert_eq!(driver.used(RECEIVE).len(), 4);
    // For the first and for the others: a driver without EVENT_IDX hears of each.
    assert_eq!(driver.interrupts(), 2);
}

#[test]
fn without_merging_a_packet_that_does_not_fit_is_lost() {
    let (mut driver, peer) = driver(false);
    driver.add(RECEIVE, &[Descriptor::writable(0x8000, 100)]);
    driver.kick(RECEIVE);
    peer.send(&packet(1000)).unwrap();
    peer.send(&packet(50)).unwrap();
    driver.handle_event();
    assert_eq!(driver.used(RECEIVE), [(0, 62)]);
    assert_eq!(driver.read(0x8000 + NUM_BUFFERS as u64, 2), [1, 0]);
}

#[test]
fn buffers_of_the_wrong_shape_break_the_device() {
    let wrong_receive = [
        vec![Descriptor::readable(0x8000, 100)],
        vec![Descriptor::writable(0x8000, 11)],
        vec![
            Descriptor::readable(0x8000, 100),
            Descriptor::writable(0x9000, 100),
        ],
    ];
    let wrong_transmit = [
        vec![Descriptor::writable(0x8000, 100)],
        vec![Descriptor::readable(0x8000, 11)],
        vec![
            Descriptor::readable(0x8000, 100),
            Descriptor::writable(0x9000, 100),
        ],
    ];
    let all = wrong_receive.map(|chain| (RECEIVE, chain));
    for (queue, chain) in all
        .into_iter()
        .chain(wrong_transmit.map(|chain| (TRANSMIT, chain)))
    {
        let (mut driver, peer) = driver(true);
        peer.send(&packet(10)).unwrap();
        driver.add(queue, &chain);
        driver.kick(queue);
        assert!(
            driver.status().contains(Status::NEEDS_RESET),
            "{queue} {chain:?}"
        );
        driver.reset();
        driver.start(0);
        driver.add(TRANSMIT, &[Descriptor::readable(0x8000, 20)]);
        driver.kick(TRANSMIT);
        assert_eq!(received(&peer).unwrap().len(), 20);
    }
}

#[test]
fn a_reset_forgets_buffers_and_packets() {
    let (mut driver, peer) = driver(true);
    driver.add(RECEIVE, &[Descriptor::writable(0x8000, 100)]);
    driver.kick(RECEIVE);
    peer.send(&packet(1000)).unwrap();
    driver.handle_event();
    driver.reset();
    driver.write(0x8000, &[0x77; 100]);
    peer.send(&packet(8)).unwrap();
    driver.handle_event();
    assert_eq!(driver.read(0x8000, 100), [0x77; 100]);
    driver.start(0);
    driver.add(RECEIVE, &[Descriptor::writable(0x9000, 100)]);
    driver.kick(RECEIVE);
    assert_eq!(driver.used(RECEIVE), [(0, 20)]);
}

#[test]
fn a_guest_that_never_rests_leaves_others_their_turn() {
    let (mut driver, _peer) = driver(true);
    driver.describe(TRANSMIT, 0, Descriptor::readable(0x8000, 20));
    for _ in 0..SIZE {
        driver.offer(TRANSMIT, 0);
    }
    driver.kick(TRANSMIT);
    assert_eq!(driver.used(TRANSMIT).len(), usize::from(SIZE));
}

proptest! {
    #[test]
    fn no_chains_panic(
        chains in prop::collection::vec(
            (0usize..2, prop::collection::vec((any::<bool>(), 0u64..MEMORY as u64 + 100, 0u32..70_000), 1..4)),
            1..8),
        sizes in prop::collection::vec(0usize..3000, 0..8),
        mergeable: bool,
    ) {
        let (mut driver, peer) = driver(mergeable);
        for size in sizes {
            let _ = peer.send(&packet(size));
        }
        for (queue, chain) in chains {
            let chain: Vec<_> = chain.iter().map(|&(write, addr, len)| match write {
                true => Descriptor::writable(addr.max(0x8000), len),
                false => Descriptor::readable(addr.max(0x8000), len),
            }).collect();
            driver.add(queue, &chain);
            driver.kick(queue);
            driver.transport.event_ready(0);
        }
    }
}

/// Several pairs, with the host's ends.
fn several(pairs: usize, limits: Limits) -> (Driver, Vec<UnixDatagram>) {
    let (ours, theirs): (Vec<_>, Vec<_>) = (0..pairs)
        .map(|_| {
            let (ours, theirs) = UnixDatagram::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            theirs.set_nonblocking(true).unwrap();
            (ours, Backend::tap(File::from(OwnedFd::from(theirs))))
        })
        .unzip();
    let net = Net::new(theirs, MAC, limits).unwrap();
    (Driver::new(Box::new(net)), ours)
}

const MULTIQUEUE: u64 = feature(spec::VIRTIO_NET_F_MQ)
    | feature(spec::VIRTIO_NET_F_CTRL_VQ)
    | feature(spec::VIRTIO_NET_F_MRG_RXBUF);

/// Sends a command, and returns the answer.
fn command(driver: &mut Driver, queue: usize, bytes: &[u8]) -> u8 {
    driver.write(0xf000, bytes);
    driver.write(0xf100, &[0xee]);
    driver.add(
        queue,
        &[
            Descriptor::readable(0xf000, bytes.len() as u32),
            Descriptor::writable(0xf100, 1),
        ],
    );
    driver.kick(queue);
    assert_eq!(driver.used(queue).len(), 1);
    driver.read(0xf100, 1)[0]
}

#[test]
fn the_guest_chooses_how_many_pairs_it_uses() {
    let (mut driver, peers) = several(3, Limits::default());
    driver.start(MULTIQUEUE);
    let control = 6;
    let mut max = [0; 2];
    driver.transport.read(0x100 + 8, &mut max);
    assert_eq!(max, [3, 0]);
    let send = |driver: &mut Driver, pair: usize| {
        driver.add(2 * pair + 1, &[Descriptor::readable(0x8000, 20)]);
        driver.kick(2 * pair + 1);
    };
    // Before it has chosen, only the first is used.
    for (pair, peer) in peers.iter().enumerate() {
        driver.add(2 * pair, &[Descriptor::writable(0x9000, 200)]);
        driver.kick(2 * pair);
        send(&mut driver, pair);
        peer.send(&packet(10)).unwrap();
    }
    driver.handle_event();
    let check = |driver: &mut Driver, lively: usize, pairs: std::ops::Range<usize>| {
        for pair in pairs {
            let used = usize::from(pair == lively);
            assert_eq!(driver.used(2 * pair).len(), used);
            assert_eq!(driver.used(2 * pair + 1).len(), used);
            assert_eq!(received(&peers[pair]).is_some(), pair == lively);
        }
    };
    check(&mut driver, 0, 0..3);
    for wrong in [
        &[4, 0, 0, 0][..],
        &[4, 0, 4, 0],
        &[4, 0, 0, 1],
        &[4, 1, 2, 0],
        &[0, 0, 1, 0],
        &[4, 0, 2],
        &[4, 0, 2, 0, 0],
        &[4],
        &[],
    ] {
        assert_eq!(command(&mut driver, control, wrong), 1, "{wrong:?}");
    }
    // Then what lay there passes at once.
    assert_eq!(command(&mut driver, control, &[4, 0, 2, 0]), 0);
    check(&mut driver, 1, 1..3);
    assert_eq!(command(&mut driver, control, &[4, 0, 1, 0]), 0);
    send(&mut driver, 1);
    assert_eq!(driver.used(3), []);
    assert_eq!(received(&peers[1]), None);
    // No room for the answer.
    driver.add(control, &[Descriptor::readable(0xf000, 4)]);
    driver.kick(control);
    assert!(driver.status().contains(Status::NEEDS_RESET));
    // Without several pairs, the control queue is the third.
    driver.reset();
    driver.start(feature(spec::VIRTIO_NET_F_CTRL_VQ));
    assert_eq!(command(&mut driver, 2, &[0, 0, 1]), 1);
}

fn rate(per_second: u64) -> Option<Rate> {
    let per_second = NonZeroU64::new(per_second)?;
    Some(Rate {
        per_second,
        burst: 0,
    })
}

#[test]
fn a_spent_budget_delays_both_ways_and_loses_nothing() {
    let limits = Limits {
        bandwidth: rate(1000),
        operations: None,
    };
    let (mut driver, peers) = several(2, limits);
    driver.start(MULTIQUEUE);
    assert_eq!(command(&mut driver, 4, &[4, 0, 2, 0]), 0);
    let start = Instant::now();
    for (pair, peer) in peers.iter().enumerate() {
        for count in 0..3 {
            peer.send(&packet(88)).unwrap();
            driver.add(2 * pair, &[Descriptor::writable(0x9000, 200)]);
            driver.add(2 * pair + 1, &[Descriptor::readable(0x8000 + count, 100)]);
        }
        driver.kick(2 * pair);
        driver.kick(2 * pair + 1);
    }
    let (mut passed, mut turns) = ([0; 4], 0);
    // On edges, the TAP tells of no packet twice.
    driver.handle_events(|token| token < RECEIVE_BUDGET);
    while passed != [3; 4] {
        driver.handle_events(|token| token >= RECEIVE_BUDGET);
        for (queue, passed) in passed.iter_mut().enumerate() {
            *passed += driver.used(queue).len();
        }
        turns += 1;
        assert!(turns < 100, "{passed:?}");
    }
    // 528 bytes each way; 100 were saved up, and the last one is on credit.
    let elapsed = start.elapsed();
    assert!(elapsed >= Duration::from_millis(340), "{elapsed:?}");
    for peer in &peers {
        for _ in 0..3 {
            assert_eq!(received(peer).unwrap().len(), 100);
        }
    }
    let counters = driver.transport.counters();
    let counter = |name| counters.iter().find(|(known, _)| *known == name).unwrap().1;
    assert_eq!((counter("rx_packets"), counter("rx_bytes")), (6, 528));
    assert_eq!((counter("tx_packets"), counter("tx_bytes")), (6, 528));
    assert!(counter("throttled") >= 2);
}

#[test]
fn new_limits_count_at_once() {
    let limits = Limits {
        bandwidth: None,
        operations: rate(1),
    };
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let taps = vec![Backend::tap(File::from(OwnedFd::from(theirs)))];
    let net = Net::new(taps, MAC, limits).unwrap();
    let handle = net.limit_handle();
    let mut driver = Driver::new(Box::new(net));
    driver.start(0);
    for _ in 0..10 {
        driver.add(TRANSMIT, &[Descriptor::readable(0x8000, 20)]);
    }
    driver.kick(TRANSMIT);
    assert_eq!(driver.used(TRANSMIT).len(), 1);
    handle.set(Limits::default());
    driver.handle_event();
    assert_eq!(driver.used(TRANSMIT).len(), 9);
}

#[test]
fn buffers_that_wait_for_a_packet_are_put_back_before_a_network_is_saved() {
    let (mut driver, peer) = driver(true);
    let data = packet(1000);
    peer.send(&data).unwrap();
    driver.handle_event();
    // Two are taken, and not enough.
    for index in 0..2 {
        let buffer = Descriptor::writable(0x8000 + index * 0x200, 400);
        driver.add(RECEIVE, &[buffer]);
        driver.kick(RECEIVE);
    }
    let state = driver.save();
    // What was read to them already is the device's again.
    driver.write(0x8000, &[0; 0x400]);
    assert_eq!(state.transport.queues[RECEIVE].next_available, 0);
    // The saved one goes on …
    driver.add(RECEIVE, &[Descriptor::writable(0x8400, 400)]);
    driver.kick(RECEIVE);
    assert_eq!(driver.used(RECEIVE), [(0, 400), (1, 400), (2, 212)]);
    let mut got = driver.read(0x8000, 400);
    got.extend(driver.read(0x8200, 400));
    got.extend(driver.read(0x8400, 212));
    assert_eq!(got[HEADER..], data[HEADER..]);

    // … and so does another in its place, with a packet of its own.
    let (mut driver, _peer) = self::driver(true);
    for index in 0..3 {
        let buffer = Descriptor::writable(0x8000 + index * 0x200, 400);
        driver.add(RECEIVE, &[buffer]);
    }
    let (net, peer) = device();
    driver.restore(Box::new(net), state.clone()).unwrap();
    assert_eq!(driver.save(), state);
    peer.send(&data).unwrap();
    driver.handle_event();
    assert_eq!(driver.used(RECEIVE), [(0, 400), (1, 400), (2, 212)]);
}

#[test]
fn a_link_that_is_up_again_is_told_after_a_restore() {
    let (mut driver, _peer) = driver(true);
    let mut state = driver.save();
    let DeviceState::Net(net) = &mut state.device else {
        panic!();
    };
    net.link_up = false;
    let (other, _other_peer) = device();
    driver.restore(Box::new(other), state.clone()).unwrap();
    driver.interrupts();
    driver.process_pending();
    assert_eq!(driver.interrupts(), 1);
    let DeviceState::Net(net) = &mut state.device else {
        panic!();
    };
    net.used_pairs = 2;
    assert!(driver.restore(Box::new(device().0), state).is_err());
}
