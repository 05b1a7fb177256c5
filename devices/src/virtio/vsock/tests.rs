//! The device with a driver and real Unix sockets.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::limits::{BUFFER, BUFFER_MIN, BUFFERS};
use super::packet::{HOST_CID, Op, PORT_ANY, STREAM, Shutdown};
use super::*;
use crate::virtio::mmio::Status;
use crate::virtio::testing::{Descriptor, Driver, MEMORY, SIZE};

const CID: u32 = 42;
/// Each receive buffer has a page here.
const PAGES: u64 = 0x1_0000;
const PAGE: u64 = 0x1000;
const OUT: u64 = 0x4_0000;
/// What the guest says it can hold.
const ROOM: u32 = 1 << 18;
const GUEST: u32 = 5000;
const PORT: u32 = 80;

type Packet = (Header, Vec<u8>);

struct Guest {
    driver: Driver,
    folder: tempfile::TempDir,
}

fn quick() -> Limits {
    Limits {
        connections: 64,
        resets: 8,
        greeting: Duration::from_millis(200),
        request: Duration::from_millis(200),
        linger: Duration::from_millis(200),
    }
}

impl Guest {
    /// A guest that offers all its buffers.
    fn new() -> Self {
        let mut guest = Guest::without_buffers(quick());
        guest.offer_all(PAGE as u32);
        guest
    }

    fn without_buffers(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("v")).unwrap();
        let base = folder.path().to_owned();
        let connect = move |port| UnixStream::connect(base.join(format!("v_{port}")));
        let state = VsockState::new(CID);
        let device = Vsock::with_limits(state, listener, Box::new(connect), limits).unwrap();
        let mut driver = Driver::new(Box::new(device));
        driver.start(feature(F_STREAM));
        Guest { driver, folder }
    }

    fn offer_all(&mut self, len: u32) {
        for _ in 0..SIZE {
            self.offer(len);
        }
        self.driver.kick(RECEIVE);
    }

    fn offer(&mut self, len: u32) {
        // The driver gives heads out one after the other.
        let head = self.driver.add(RECEIVE, &[Descriptor::writable(0, len)]);
        let page = Descriptor::writable(PAGES + u64::from(head) * PAGE, len);
        self.driver.describe(RECEIVE, head, page);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(&format!("v_{port}"))).unwrap()
    }

    fn header(&self, op: Op) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: GUEST,
            dst_port: PORT,
            kind: STREAM,
            op: op as u16,
            buf_alloc: ROOM,
            ..Default::default()
        }
    }

    fn put(&mut self, header: Header, data: &[u8]) {
        self.driver.write(OUT, &header.bytes());
        self.driver.write(OUT + HEADER as u64, data);
        let len = (HEADER + data.len()) as u32;
        self.driver.add(TRANSMIT, &[Descriptor::readable(OUT, len)]);
        self.driver.kick(TRANSMIT);
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        self.put(header, data);
        assert_eq!(self.driver.used(TRANSMIT).len(), 1);
    }

    fn send_op(&mut self, op: Op) {
        self.send(self.header(op), &[]);
    }

    fn send_data(&mut self, data: &[u8]) {
        let len = data.len() as u32;
        let header = self.header(Op::Data);
        self.send(Header { len, ..header }, data);
    }

    fn send_shutdown(&mut self, flags: Shutdown) {
        let flags = flags.bits();
        let header = self.header(Op::Shutdown);
        self.send(Header { flags, ..header }, &[]);
    }

    /// What the guest was sent by now; its buffers are offered again.
    fn packets(&mut self) -> Vec<Packet> {
        self.driver.transport.event_ready(0);
        let packets = self.take();
        self.driver.kick(RECEIVE);
        packets
    }

    fn take(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        for (head, len) in self.driver.used(RECEIVE) {
            let bytes = self
                .driver
                .read(PAGES + u64::from(head) * PAGE, len as usize);
            let (header, data) = bytes.split_at(HEADER);
            let header = Header::parse(header.try_into().unwrap());
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
            assert_eq!(data.len(), header.len as usize);
            packets.push((header, data.to_vec()));
            self.offer(PAGE as u32);
        }
        packets
    }

    /// Waits for a packet.
    fn packet(&mut self) -> Packet {
        let mut packets = self.packets();
        let deadline = Instant::now() + Duration::from_secs(10);
        while packets.is_empty() {
            assert!(Instant::now() < deadline, "no packet");
            self.driver.handle_event();
            packets = self.packets();
        }
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    fn expect(&mut self, op: Op) -> Packet {
        let packet = self.packet();
        assert_eq!(packet.0.op, op as u16, "{packet:?}");
        packet
    }

    fn quiet(&mut self) {
        assert_eq!(self.packets(), []);
        assert!(!self.driver.status().contains(Status::NEEDS_RESET));
    }

    /// A connection that the guest began, and its peer.
    fn connect(&mut self) -> UnixStream {
        let listener = self.listen(PORT);
        self.send_op(Op::Request);
        let (header, _) = self.expect(Op::Response);
        assert_eq!((header.src_port, header.dst_port), (PORT, GUEST));
        assert_eq!((header.buf_alloc, header.fwd_cnt), (BUFFER as u32, 0));
        let (peer, _) = listener.accept().unwrap();
        std::fs::remove_file(self.path(&format!("v_{PORT}"))).unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        peer
    }

    /// A connection that a client wants, and what the guest was asked.
    fn client(&mut self, said: &str) -> (UnixStream, Header) {
        let mut client = UnixStream::connect(self.path("v")).unwrap();
        client.write_all(said.as_bytes()).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let (header, _) = self.expect(Op::Request);
        (client, header)
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = self.driver.transport.counters();
        counters.iter().find(|(known, _)| *known == name).unwrap().1
    }
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    stream.read_exact(&mut data).unwrap();
    data
}

fn ended(stream: &mut UnixStream) -> bool {
    stream.read(&mut [0]).unwrap() == 0
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index % 251) as u8).collect()
}

#[test]
fn the_guest_connects_and_bytes_go_both_ways() {
    let mut guest = Guest::new();
    let mut peer = guest.connect();
    guest.send_data(b"hello");
    assert_eq!(read(&mut peer, 5), b"hello");
    peer.write_all(b"world").unwrap();
    let (header, data) = guest.expect(Op::Data);
    assert_eq!((data.as_slice(), header.fwd_cnt), (b"world".as_slice(), 5));
    // More than a buffer holds, and more than all of them.
    let long = pattern(200_000);
    let sender = std::thread::spawn({
        let long = long.clone();
        move || {
            peer.write_all(&long).unwrap();
            peer
        }
    });
    let mut received = Vec::new();
    while received.len() < long.len() {
        let packets = guest.packets();
        if packets.is_empty() {
            guest.driver.handle_event();
        }
        for (header, data) in packets {
            assert_eq!(header.op, Op::Data as u16);
            received.extend(data);
        }
    }
    assert!(received == long);
    let mut peer = sender.join().unwrap();
    for (index, chunk) in long.chunks(50_000).enumerate() {
        guest.send_data(chunk);
        assert!(read(&mut peer, chunk.len()) == chunk, "{index}");
        let (header, _) = guest.expect(Op::CreditUpdate);
        assert_eq!(header.fwd_cnt, 5 + 50_000 * (index as u32 + 1));
    }
    assert_eq!(guest.counter("sent_bytes"), 200_005);
    assert_eq!(guest.counter("received_bytes"), 200_005);
    assert_eq!(guest.counter("connections"), 1);
}

#[test]
fn data_lies_in_several_descriptors() {
    let mut guest = Guest::without_buffers(quick());
    let listener = guest.listen(PORT);
    // The header is split, and there is an empty part.
    guest
        .driver
        .add(RECEIVE, &[Descriptor::writable(PAGES, PAGE as u32)]);
    let buffers = [
        (0x2_0000, 40),
        (0x2_1000, 6),
        (0x2_2000, 0),
        (0x2_3000, 100),
    ];
    let chain = buffers.map(|(addr, len)| Descriptor::writable(addr, len));
    guest.driver.add(RECEIVE, &chain);
    guest.send_op(Op::Request);
    let (mut peer, _) = listener.accept().unwrap();
    peer.write_all(b"abcdef").unwrap();
    guest.driver.transport.event_ready(0);
    assert_eq!(
        guest.driver.used(RECEIVE),
        [(0, HEADER as u32), (1, HEADER as u32 + 6)]
    );
    assert_eq!(guest.driver.read(0x2_1000, 6)[4..], *b"ab");
    assert_eq!(guest.driver.read(0x2_3000, 4), b"cdef");

    let header = guest.header(Op::Data);
    let bytes = Header { len: 7, ..header }.bytes();
    guest.driver.write(OUT, &bytes[..30]);
    guest
        .driver
        .write(OUT + PAGE, &[&bytes[30..], b"012"].concat());
    guest
        .driver
        .write(OUT + 2 * PAGE, b"3456 and what is no data");
    let chain = [
        Descriptor::readable(OUT, 30),
        Descriptor::readable(OUT + PAGE, 17),
        Descriptor::readable(OUT + 2 * PAGE, 20),
    ];
    guest.driver.add(TRANSMIT, &chain);
    guest.driver.kick(TRANSMIT);
    assert_eq!(read(&mut peer, 7), b"0123456");
}

#[test]
fn a_client_reaches_the_guest() {
    let mut guest = Guest::new();
    let (mut client, asked) = guest.client("CONNECT 7\nearly");
    assert_eq!(asked.dst_port, 7);
    guest.quiet(); // nothing before the guest accepts
    let answer = |guest: &Guest, op| Header {
        src_port: 7,
        dst_port: asked.src_port,
        ..guest.header(op)
    };
    guest.send(answer(&guest, Op::Response), &[]);
    let line = format!("OK {}\n", asked.src_port);
    assert_eq!(read(&mut client, line.len()), line.as_bytes());
    assert_eq!(guest.expect(Op::Data).1, b"early");
    let header = answer(&guest, Op::Data);
    guest.send(Header { len: 2, ..header }, b"me");
    assert_eq!(read(&mut client, 2), b"me");

    // Another to the same port has a port of its own; the guest refuses it.
    let (mut client, again) = guest.client("CONNECT 7\n");
    assert_ne!(again.src_port, asked.src_port);
    let refusal = Header {
        dst_port: again.src_port,
        ..answer(&guest, Op::Reset)
    };
    guest.send(refusal, &[]);
    assert!(ended(&mut client));
    guest.quiet();
}

#[test]
fn clients_that_do_not_speak_up_are_hung_up_on() {
    let mut guest = Guest::new();
    let mut silent = UnixStream::connect(guest.path("v")).unwrap();
    let mut slow = UnixStream::connect(guest.path("v")).unwrap();
    slow.write_all(b"CONN").unwrap();
    let mut wrong = UnixStream::connect(guest.path("v")).unwrap();
    wrong.write_all(b"CONNECT x\n").unwrap();
    let mut any = UnixStream::connect(guest.path("v")).unwrap();
    any.write_all(format!("CONNECT {PORT_ANY}\n").as_bytes())
        .unwrap();
    guest.driver.handle_event(); // they come in
    guest.driver.handle_event(); // and speak
    guest.quiet();
    // At once, with what they said unread or not.
    assert!(matches!(wrong.read(&mut [0]), Ok(0) | Err(_)));
    assert!(ended(&mut any));
    silent.set_nonblocking(true).unwrap();
    assert!(silent.read(&mut [0]).is_err());
    silent.set_nonblocking(false).unwrap();
    guest.driver.handle_event(); // the timer
    assert!(ended(&mut silent));
    assert!(matches!(slow.read(&mut [0]), Ok(0) | Err(_)));
}

#[test]
fn a_guest_that_does_not_answer_is_given_up() {
    let mut guest = Guest::new();
    let (mut client, asked) = guest.client("CONNECT 7\n");
    let (header, _) = guest.expect(Op::Reset);
    assert_eq!(header.src_port, asked.src_port);
    assert!(ended(&mut client));
    // A client that leaves before the answer is not waited for.
    let (client, _) = guest.client("CONNECT 7\n");
    drop(client);
    guest.expect(Op::Reset);
}

#[test]
fn what_is_unknown_or_wrong_is_reset() {
    let mut guest = Guest::new();
    guest.send_op(Op::Request); // nobody listens
    assert_eq!(guest.expect(Op::Reset).0.kind, STREAM);
    assert_eq!(guest.counter("refused_connections"), 1);
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        guest.send_op(op);
        guest.expect(Op::Reset);
    }
    guest.send_op(Op::Reset);
    guest.quiet();
    let header = guest.header(Op::Request);
    for op in [0, 8, u16::MAX] {
        guest.send(Header { op, ..header }, &[]);
        guest.expect(Op::Reset);
    }
    for port in [PORT_ANY, 1] {
        let dst_port = port;
        guest.send(Header { dst_port, ..header }, &[]);
        assert_eq!(guest.expect(Op::Reset).0.src_port, port);
    }
    // A type that is not known is answered with it.
    guest.send(Header { kind: 2, ..header }, &[]);
    assert_eq!(guest.expect(Op::Reset).0.kind, 2);
    // Not ours to answer.
    for (src_cid, dst_cid) in [
        (u64::from(CID) + 1, HOST_CID),
        (u64::from(CID) | 1 << 32, HOST_CID),
        (CID.into(), 3),
    ] {
        let foreign = Header {
            src_cid,
            dst_cid,
            ..header
        };
        guest.send(foreign, &[]);
        guest.quiet();
    }
    assert_eq!(guest.counter("stray_packets"), 3);
}

#[test]
fn what_does_not_belong_to_a_connection_breaks_it() {
    let wrong: [fn(&Guest) -> Header; 5] = [
        |guest| guest.header(Op::Request), // twice
        |guest| guest.header(Op::Response),
        |guest| Header {
            op: 99,
            ..guest.header(Op::Data)
        },
        |guest| Header {
            len: 4,
            ..guest.header(Op::Data)
        }, // there are 3
        |guest| Header {
            len: u32::MAX,
            ..guest.header(Op::Data)
        },
    ];
    for header in wrong {
        let mut guest = Guest::new();
        let mut peer = guest.connect();
        guest.send(header(&guest), b"abc");
        guest.expect(Op::Reset);
        assert!(ended(&mut peer));
        guest.send_op(Op::CreditUpdate);
        guest.expect(Op::Reset); // it is forgotten
    }
    // Data before the guest accepted, and after it said that there is no more.
    let mut guest = Guest::new();
    let (mut client, asked) = guest.client("CONNECT 7\n");
    let header = Header {
        src_port: 7,
        dst_port: asked.src_port,
        ..guest.header(Op::Data)
    };
    guest.send(header, &[]);
    guest.expect(Op::Reset);
    assert!(ended(&mut client));
    let mut peer = guest.connect();
    guest.send_shutdown(Shutdown::SEND);
    guest.send_data(b"more");
    guest.expect(Op::Reset);
    assert!(ended(&mut peer));
}

#[test]
fn without_credit_nothing_is_sent_and_the_guest_is_asked_once() {
    let mut guest = Guest::new();
    let mut peer = guest.connect();
    let update = |buf_alloc, fwd_cnt| {
        move |guest: &mut Guest| {
            let header = Header {
                buf_alloc,
                fwd_cnt,
                ..guest.header(Op::CreditUpdate)
            };
            guest.send(header, &[]);
        }
    };
    update(10, 0)(&mut guest);
    peer.write_all(&pattern(30)).unwrap();
    let packets = guest.packets();
    assert_eq!(packets[0].1, pattern(10));
    assert_eq!(packets[1].0.op, Op::CreditRequest as u16);
    assert_eq!(packets.len(), 2);
    guest.quiet();
    // The guest passed on more than it was sent: it lies.
    update(100, 11)(&mut guest);
    guest.quiet();
    update(10, 3)(&mut guest);
    let packets = guest.packets();
    assert_eq!(packets[0].1, pattern(13)[10..]);
    assert_eq!(packets[1].0.op, Op::CreditRequest as u16);
    update(0, 13)(&mut guest);
    guest.quiet();
    update(ROOM, 13)(&mut guest);
    assert_eq!(guest.expect(Op::Data).1, pattern(30)[13..]);
    // It gets the device's credit when it asks for it.
    guest.send_op(Op::CreditRequest);
    guest.expect(Op::CreditUpdate);
}

/// Fills a peer's socket and the guest's credit; returns what was sent.
fn fill(guest: &mut Guest, header: Header) -> Vec<u8> {
    let (mut all, mut forwarded) = (Vec::new(), 0_u32);
    loop {
        let room = BUFFER - (all.len() - forwarded as usize);
        let chunk = &pattern(all.len() + room.min(10_000))[all.len()..];
        if chunk.is_empty() {
            return all;
        }
        let len = chunk.len() as u32;
        guest.send(Header { len, ..header }, chunk);
        all.extend(chunk);
        for (answer, _) in guest.packets() {
            assert_eq!(answer.op, Op::CreditUpdate as u16);
            forwarded = answer.fwd_cnt;
        }
        // What the guest was not told, it can ask for.
        if all.len() - forwarded as usize == BUFFER {
            let op = Op::CreditRequest as u16;
            guest.send(Header { op, ..header }, &[]);
            forwarded = guest.expect(Op::CreditUpdate).0.fwd_cnt;
        }
    }
}

#[test]
fn all_connections_together_hold_a_bounded_amount() {
    const CONNECTIONS: usize = 200;
    let limits = Limits {
        connections: CONNECTIONS,
        ..quick()
    };
    let mut guest = Guest::without_buffers(limits);
    guest.offer_all(PAGE as u32);
    let listener = guest.listen(PORT);
    let mut peers = Vec::new();
    for round in 0..2 {
        let mut held = 0;
        for port in 0..CONNECTIONS as u32 {
            let src_port = GUEST + port;
            let request = guest.header(Op::Request);
            guest.send(
                Header {
                    src_port,
                    ..request
                },
                &[],
            );
            peers.push(listener.accept().unwrap());
            held += guest.expect(Op::Response).0.buf_alloc as usize;
        }
        let large = BUFFERS / BUFFER;
        assert_eq!(held, BUFFERS + (CONNECTIONS - large) * BUFFER_MIN);
        // Their credit is others', whether they end one by one or all at once.
        for port in 0..CONNECTIONS as u32 * (1 - round) {
            let src_port = GUEST + port;
            let reset = guest.header(Op::Reset);
            guest.send(Header { src_port, ..reset }, &[]);
        }
    }
    guest.driver.reset();
    guest.driver.start(feature(F_STREAM));
    guest.offer_all(PAGE as u32);
    guest.send_op(Op::Request);
    assert_eq!(guest.expect(Op::Response).0.buf_alloc as usize, BUFFER);
}

#[test]
fn a_peer_that_never_reads_stalls_its_connection_alone() {
    let mut guest = Guest::new();
    let mut lazy = guest.connect();
    let header = guest.header(Op::Data);
    let sent = fill(&mut guest, header);
    assert!(sent.len() > BUFFER);
    guest.quiet();

    let src_port = GUEST + 1;
    let listener = guest.listen(PORT);
    let request = guest.header(Op::Request);
    guest.send(
        Header {
            src_port,
            ..request
        },
        &[],
    );
    guest.expect(Op::Response);
    let (mut other, _) = listener.accept().unwrap();
    let len = 3;
    let other_header = Header {
        src_port,
        len,
        ..header
    };
    guest.send(other_header, b"abc");
    assert_eq!(read(&mut other, 3), b"abc");

    // It reads at last: all is there, in order, and the guest has credit again.
    let mut received: Vec<u8> = Vec::new();
    let mut updates = 0;
    lazy.set_nonblocking(true).unwrap();
    while received.len() < sent.len() {
        let mut chunk = [0; 10_000];
        match lazy.read(&mut chunk) {
            Ok(len) => received.extend(&chunk[..len]),
            Err(_) => guest.driver.handle_event(),
        }
        updates += guest.packets().len();
    }
    assert!(updates > 0);
    assert!(received == sent);
    lazy.set_nonblocking(false).unwrap();
    guest.send_data(b"go on");
    assert_eq!(read(&mut lazy, 5), b"go on");
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let mut guest = Guest::new();
    let _peer = guest.connect();
    let header = guest.header(Op::Data);
    fill(&mut guest, header);
    guest.send_data(b"x");
    guest.expect(Op::Reset);
    // More than it may ever send at once.
    let _peer = guest.connect();
    guest.send_data(&pattern(BUFFER + 1));
    guest.expect(Op::Reset);
}

#[test]
fn each_side_ends_its_half() {
    let mut guest = Guest::new();
    // The guest first.
    let mut peer = guest.connect();
    guest.send_data(b"last");
    guest.send_shutdown(Shutdown::SEND);
    assert_eq!(read(&mut peer, 4), b"last");
    assert!(ended(&mut peer));
    peer.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(Op::Data).1, b"answer");
    drop(peer);
    assert_eq!(guest.expect(Op::Shutdown).0.flags, Shutdown::all().bits());
    guest.send_shutdown(Shutdown::all());
    guest.expect(Op::Reset);

    // The host first.
    let mut peer = guest.connect();
    peer.write_all(b"last").unwrap();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    let packets = guest.packets();
    assert_eq!(packets[0].1, b"last");
    assert_eq!(packets[1].0.op, Op::Shutdown as u16);
    assert_eq!(packets[1].0.flags, Shutdown::SEND.bits());
    guest.send_data(b"answer");
    guest.send_shutdown(Shutdown::all());
    assert_eq!(read(&mut peer, 6), b"answer");
    assert!(ended(&mut peer));
    guest.expect(Op::Reset);

    // The guest reads no more.
    let mut peer = guest.connect();
    guest.send_shutdown(Shutdown::RECEIVE);
    guest.send_shutdown(Shutdown::empty());
    assert!(peer.write_all(b"x").is_err());
    guest.send_data(b"still");
    assert_eq!(read(&mut peer, 5), b"still");
    guest.send_shutdown(Shutdown::SEND);
    assert!(ended(&mut peer));
    guest.expect(Op::Reset);

    // The host's peer reads no more.
    let mut peer = guest.connect();
    peer.shutdown(std::net::Shutdown::Read).unwrap();
    guest.send_data(b"lost");
    assert_eq!(guest.expect(Op::Shutdown).0.flags, Shutdown::RECEIVE.bits());
    guest.send_data(b"lost, too, and no reason to break");
    peer.write_all(b"news").unwrap();
    assert_eq!(guest.expect(Op::Data).1, b"news");
}

#[test]
fn what_the_guest_sent_is_delivered_after_it_left() {
    let mut guest = Guest::new();
    let mut peer = guest.connect();
    let header = guest.header(Op::Data);
    let sent = fill(&mut guest, header);
    guest.send_shutdown(Shutdown::all());
    guest.quiet(); // not before all is delivered
    guest.send_op(Op::Reset); // the guest has timed out, and knows
    // Its ports are taken until then.
    guest.send_op(Op::Request);
    guest.expect(Op::Reset);
    peer.set_nonblocking(true).unwrap();
    let (mut received, mut chunk) = (0, [0; 10_000]);
    loop {
        match peer.read(&mut chunk) {
            Ok(0) => break,
            Ok(len) => received += len,
            Err(_) => guest.driver.handle_event(),
        }
    }
    assert_eq!(received, sent.len());
    guest.quiet();
    let _peer = guest.connect();
}

#[test]
fn connections_that_are_over_time_out() {
    let mut guest = Guest::new();
    let _lazy = guest.connect();
    let header = guest.header(Op::Data);
    fill(&mut guest, header);
    guest.send_shutdown(Shutdown::all());
    guest.expect(Op::Reset);
    // A guest that does not answer when the peer has gone.
    let peer = guest.connect();
    drop(peer);
    guest.expect(Op::Shutdown);
    guest.expect(Op::Reset);
}

#[test]
fn a_peer_that_resets_resets_the_guest() {
    let mut guest = Guest::new();
    let mut peer = guest.connect();
    peer.write_all(b"before").unwrap();
    guest.send_data(b"never read");
    drop(peer);
    let packets = guest.packets();
    assert_eq!(packets[0].1, b"before");
    assert_eq!(packets[1].0.op, Op::Reset as u16, "{packets:?}");
    assert_eq!(packets.len(), 2);
    // Noticed while sending.
    let peer = guest.connect();
    guest.send_data(b"never read");
    drop(peer);
    guest.send_data(b"nor this");
    let packets = guest.packets();
    assert_eq!(packets.last().unwrap().0.op, Op::Reset as u16);
}

#[test]
fn a_guest_without_buffers_is_not_listened_to_and_loses_nothing() {
    let mut guest = Guest::without_buffers(quick());
    let limit = quick().resets;
    let mut taken = 0;
    for index in 0..SIZE {
        let dst_port = u32::from(index);
        let header = guest.header(Op::Request);
        guest.driver.write(
            OUT + u64::from(index) * 64,
            &Header { dst_port, ..header }.bytes(),
        );
        let chain = [Descriptor::readable(
            OUT + u64::from(index) * 64,
            HEADER as u32,
        )];
        guest.driver.add(TRANSMIT, &chain);
        guest.driver.kick(TRANSMIT);
        taken += guest.driver.used(TRANSMIT).len();
    }
    assert_eq!(taken, limit);
    // Buffers come one by one: all is answered, in order.
    let mut answered = Vec::new();
    for _ in 0..SIZE {
        guest.offer(PAGE as u32);
        guest.driver.kick(RECEIVE);
        for (head, _) in guest.driver.used(RECEIVE) {
            let bytes = guest.driver.read(PAGES + u64::from(head) * PAGE, HEADER);
            answered.push(Header::parse(&bytes.try_into().unwrap()).src_port);
        }
        taken += guest.driver.used(TRANSMIT).len();
    }
    assert_eq!(answered, (0..SIZE.into()).collect::<Vec<u32>>());
    assert_eq!(taken, usize::from(SIZE));
}

#[test]
fn connections_have_a_limit_and_clients_wait() {
    let limits = Limits {
        connections: 3,
        greeting: Duration::from_secs(60),
        request: Duration::from_secs(60),
        ..quick()
    };
    let mut guest = Guest::without_buffers(limits);
    guest.offer_all(PAGE as u32);
    let listener = guest.listen(PORT);
    for src_port in 0..4 {
        let header = guest.header(Op::Request);
        guest.send(Header { src_port, ..header }, &[]);
    }
    let ops: Vec<u16> = guest
        .packets()
        .iter()
        .map(|(header, _)| header.op)
        .collect();
    assert_eq!(ops, [2, 2, 2, 3]);
    let mut client = UnixStream::connect(guest.path("v")).unwrap();
    client.write_all(b"CONNECT 1\n").unwrap();
    guest.quiet();
    let header = guest.header(Op::Reset);
    guest.send(
        Header {
            src_port: 1,
            ..header
        },
        &[],
    );
    guest.expect(Op::Request);
    drop(listener);
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::new();
    let listener = guest.listen(PORT);
    let mut peers = Vec::new();
    for src_port in 0..4 {
        let header = guest.header(Op::Request);
        guest.send(Header { src_port, ..header }, &[]);
        guest.expect(Op::Response);
        peers.push(listener.accept().unwrap().0);
    }
    for peer in &mut peers {
        peer.write_all(&pattern(100_000)).unwrap();
    }
    guest.driver.transport.event_ready(0);
    let mut counts = [0; 4];
    for (header, _) in guest.take() {
        counts[header.dst_port as usize] += 1;
    }
    assert_eq!(counts, [usize::from(SIZE) / 4; 4]);
}

#[test]
fn a_reset_hangs_up_and_later_clients_are_served() {
    let mut guest = Guest::new();
    let mut peer = guest.connect();
    let header = guest.header(Op::Data);
    fill(&mut guest, header);
    let (mut waiting, _) = guest.client("CONNECT 7\n");
    guest.driver.reset();
    assert!(ended(&mut waiting));
    // What was sent before is there; then the end.
    let mut all = Vec::new();
    peer.read_to_end(&mut all).unwrap();
    // Buffers of before are not touched any more.
    guest.driver.write(PAGES, &[0x77; 100]);
    let mut client = UnixStream::connect(guest.path("v")).unwrap();
    client.write_all(b"CONNECT 9\n").unwrap();
    guest.driver.transport.event_ready(0);
    assert_eq!(guest.driver.read(PAGES, 100), [0x77; 100]);
    guest.driver.start(0);
    guest.offer_all(PAGE as u32);
    assert_eq!(guest.expect(Op::Request).0.dst_port, 9);
}

#[test]
fn a_restored_device_tells_that_connections_ended() {
    let folder = tempfile::tempdir().unwrap();
    let device = |name: &str, state| {
        let listener = UnixListener::bind(folder.path().join(name)).unwrap();
        let refuse = |_| Err(io::ErrorKind::ConnectionRefused.into());
        Vsock::new(state, listener, Box::new(refuse)).unwrap()
    };
    let mut driver = Driver::new(Box::new(device("a", VsockState::new(CID))));
    driver.start(0);
    // Nothing ended where nothing was.
    let quiet = driver.save();
    let mut client = UnixStream::connect(folder.path().join("a")).unwrap();
    client.write_all(b"CONNECT 9\n").unwrap();
    driver.transport.event_ready(0);
    driver.transport.event_ready(0);
    let state = driver.save();
    assert_ne!(state, quiet);
    let other = device("c", VsockState::new(CID + 1));
    assert!(driver.restore(Box::new(other), state.clone()).is_err());
    let other = device("b", VsockState::new(CID));
    driver.restore(Box::new(other), state.clone()).unwrap();
    assert_eq!(driver.save(), state);
    driver.write(0x8000, &[0xff; 8]);
    driver.add(EVENT, &[Descriptor::writable(0x8000, 8)]);
    driver.add(EVENT, &[Descriptor::writable(0x8000, 8)]);
    driver.kick(EVENT);
    driver.kick(EVENT);
    assert_eq!(driver.used(EVENT), [(0, 4)]);
    assert_eq!(driver.read(0x8000, 5), [0, 0, 0, 0, 0xff]);
    let mut config = [0; 8];
    crate::bus::BusDevice::read(&mut driver.transport, 0x100, &mut config);
    assert_eq!(u64::from_le_bytes(config), u64::from(CID));
    let other = device("d", VsockState::new(CID));
    driver.restore(Box::new(other), quiet).unwrap();
    driver.kick(EVENT);
    assert_eq!(driver.used(EVENT), []);
}

#[test]
fn chains_of_the_wrong_shape_break_it_until_it_is_reset() {
    let header = HEADER as u32;
    for (queue, chain) in [
        (TRANSMIT, vec![Descriptor::readable(OUT, header - 1)]),
        (TRANSMIT, vec![Descriptor::writable(OUT, 100)]),
        (
            TRANSMIT,
            vec![
                Descriptor::readable(OUT, header),
                Descriptor::writable(PAGES, 1),
            ],
        ),
        (RECEIVE, vec![Descriptor::writable(PAGES, header)]),
        (RECEIVE, vec![Descriptor::writable(PAGES, 0)]),
        (RECEIVE, vec![Descriptor::readable(PAGES, 4096)]),
    ] {
        let mut guest = Guest::without_buffers(quick());
        if queue == RECEIVE {
            // Something that needs a buffer.
            guest.send_op(Op::Request);
        }
        guest.driver.add(queue, &chain);
        guest.driver.kick(queue);
        assert!(
            guest.driver.status().contains(Status::NEEDS_RESET),
            "{queue} {chain:?}"
        );
        guest.driver.reset();
        guest.driver.start(0);
        guest.offer_all(PAGE as u32);
        guest.send_op(Op::Request);
        guest.expect(Op::Reset);
    }
}

#[test]
fn a_storm_of_connections_leaves_nothing_behind() {
    let limits = Limits {
        connections: 5000,
        ..quick()
    };
    let mut guest = Guest::without_buffers(limits);
    guest.offer_all(PAGE as u32);
    let listener = guest.listen(PORT);
    let open_files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open_files();
    let mut peers = Vec::new();
    for src_port in 0..1000 {
        let header = guest.header(Op::Request);
        guest.send(Header { src_port, ..header }, &[]);
        guest.expect(Op::Response);
        peers.push(listener.accept().unwrap().0);
    }
    for (index, peer) in peers.iter_mut().enumerate() {
        peer.write_all(&(index as u32).to_le_bytes()).unwrap();
    }
    let mut seen = vec![0; 1000];
    while seen.contains(&0) {
        for (header, data) in guest.packets() {
            assert_eq!(data, header.dst_port.to_le_bytes());
            seen[header.dst_port as usize] += 1;
        }
    }
    assert!(seen.iter().all(|&count| count == 1));
    drop(peers);
    let mut gone = 0;
    while gone < 1000 {
        for (header, _) in guest.packets() {
            assert_eq!(header.op, Op::Shutdown as u16);
            gone += 1;
        }
    }
    for src_port in 0..1000 {
        let header = guest.header(Op::Reset);
        guest.send(Header { src_port, ..header }, &[]);
    }
    guest.quiet();
    // Other tests have files of their own.
    assert!(open_files() < before + 500);
}

#[derive(Clone, Debug)]
enum Step {
    Send { header: Header, size: usize },
    Client(Vec<u8>),
    Peer(usize, Vec<u8>),
    Leave(usize),
    Buffers(u32),
    Chain(usize, Vec<(bool, u64, u32)>),
    Restart,
}

fn steps() -> impl Strategy<Value = Step> {
    let cid = prop_oneof![8 => Just(u64::from(CID)), 1 => Just(HOST_CID), 1 => any::<u64>()];
    let host = prop_oneof![8 => Just(HOST_CID), 1 => Just(u64::from(CID)), 1 => any::<u64>()];
    let guest_port = prop_oneof![8 => 0..3_u32, 1 => any::<u32>()];
    let port =
        prop_oneof![6 => PORT..PORT + 2, 3 => (1_u32 << 30)..(1 << 30) + 3, 1 => any::<u32>()];
    let len = prop_oneof![6 => 0..200_u32, 1 => any::<u32>()];
    let kind = prop_oneof![8 => Just(STREAM), 1 => any::<u16>()];
    let op = prop_oneof![20 => 1..8_u16, 1 => any::<u16>()];
    let credit =
        prop_oneof![3 => Just((ROOM, 0)), 1 => (0..300_u32, 0..300_u32), 1 => any::<(u32, u32)>()];
    let packet = (
        (cid, host, guest_port, port),
        (len, kind, op, 0..5_u32),
        credit,
        0..70_000_usize,
    )
        .prop_map(
            |((src_cid, dst_cid, src_port, dst_port), (len, kind, op, flags), credit, size)| {
                let (buf_alloc, fwd_cnt) = credit;
                let header = Header {
                    src_cid,
                    dst_cid,
                    src_port,
                    dst_port,
                    len,
                    kind,
                    op,
                    flags,
                    buf_alloc,
                    fwd_cnt,
                };
                // Mostly, the length is right.
                let size = if len < 200 { len as usize } else { size };
                Step::Send { header, size }
            },
        );
    let line = prop_oneof![
        3 => (0..3_u32).prop_map(|port| format!("CONNECT {port}\nxyz").into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ];
    let chain = prop::collection::vec(
        (any::<bool>(), 0x8000..MEMORY as u64 + 100, 0..70_000_u32),
        1..4,
    );
    prop_oneof![
        20 => packet,
        4 => line.prop_map(Step::Client),
        4 => (0..8_usize, prop::collection::vec(any::<u8>(), 0..5000))
            .prop_map(|(peer, data)| Step::Peer(peer, data)),
        2 => (0..8_usize).prop_map(Step::Leave),
        6 => (45..5000_u32).prop_map(Step::Buffers),
        1 => (0..3_usize, chain).prop_map(|(queue, chain)| Step::Chain(queue, chain)),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_guest_and_no_peer_panic(steps in prop::collection::vec(steps(), 1..80)) {
        let mut guest = Guest::without_buffers(Limits { connections: 6, resets: 3, ..quick() });
        let listeners = [guest.listen(PORT), guest.listen(PORT + 1)];
        let mut peers = Vec::new();
        for step in steps {
            match step {
                Step::Send { header, size } => guest.put(header, &pattern(size)),
                Step::Client(line) => {
                    let mut client = UnixStream::connect(guest.path("v")).unwrap();
                    client.write_all(&line).unwrap();
                    peers.push(client);
                }
                Step::Peer(index, data) => {
                    if let Some(peer) = peers.get_mut(index) {
                        let _ = peer.set_nonblocking(true);
                        let _ = peer.write(&data);
                        let _ = peer.read(&mut [0; 100]);
                    }
                }
                Step::Leave(index) if index < peers.len() => drop(peers.swap_remove(index)),
                Step::Leave(_) => {}
                Step::Buffers(len) => {
                    guest.offer(len);
                    guest.driver.kick(RECEIVE);
                }
                Step::Chain(queue, chain) => {
                    let chain: Vec<_> = chain.iter().map(|&(write, addr, len)| match write {
                        true => Descriptor::writable(addr, len),
                        false => Descriptor::readable(addr, len),
                    }).collect();
                    guest.driver.add(queue, &chain);
                    guest.driver.kick(queue);
                }
                Step::Restart => {
                    guest.driver.reset();
                    guest.driver.start(0);
                }
            }
            guest.driver.transport.event_ready(0);
            for listener in &listeners {
                listener.set_nonblocking(true).unwrap();
                while let Ok((peer, _)) = listener.accept() {
                    peers.push(peer);
                }
            }
        }
    }
}

#[test]
fn a_client_that_waits_is_let_in_when_a_reset_made_room() {
    let limits = Limits {
        connections: 1,
        resets: 8,
        greeting: Duration::from_secs(60),
        request: Duration::from_secs(60),
        linger: Duration::from_secs(60),
    };
    let mut guest = Guest::without_buffers(limits);
    guest.offer_all(PAGE as u32);
    let _peer = guest.connect();
    let mut client = UnixStream::connect(guest.path("v")).unwrap();
    client.write_all(b"CONNECT 1\n").unwrap();
    guest.quiet();
    guest.send_shutdown(Shutdown::all());
    let packets = guest.take();
    assert_eq!(packets.len(), 1, "{packets:?}");
    assert_eq!(packets[0].0.op, Op::Reset as u16);
    let (_, fd) = guest.driver.transport.sources()[0];
    assert!(crate::poll::ready(fd, libc::POLLIN, 1000));
    guest.driver.transport.event_ready(0);
    let packets = guest.take();
    assert_eq!(packets.len(), 1, "{packets:?}");
    assert_eq!(packets[0].0.op, Op::Request as u16);
}
