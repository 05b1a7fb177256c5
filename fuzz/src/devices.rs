//! Virtio devices: a guest that does what it likes, and a host that does, too.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use mayfly_devices::bus::lock;
use mayfly_devices::char_device::{CharDevice, TerminalSize};
use mayfly_devices::rate_limiter::Limits;
use mayfly_devices::virtio::balloon::{Abilities, Balloon, Reclaim};
use mayfly_devices::virtio::block::{Block, Disk, Image, Qcow2};
use mayfly_devices::virtio::console::{Channels, Console, Port};
use mayfly_devices::virtio::net::{Backend, FrameFilter, HEADER, Net, Verdict};
use mayfly_devices::virtio::rng::Rng;
use mayfly_devices::virtio::testing::MEMORY;
use mayfly_devices::virtio::vsock::{Limits as VsockLimits, Vsock, VsockState};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{Action, Guest, Piece};

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

// Random numbers.

/// Nothing but what all devices have.
#[derive(Arbitrary, Debug)]
pub enum Nothing {
    Nothing,
}

/// The entropy device.
pub fn rng(program: Vec<Action<Nothing>>) {
    let mut guest = Guest::new(Box::new(Rng::new(io::repeat(7))));
    guest.run(program, |_, _| ());
}

// Disks.

const SECTORS: u64 = 128;

/// A request to a disk.
#[derive(Arbitrary, Debug)]
pub struct Request {
    queue: u8,
    kind: u8,
    sector: u64,
    data: Vec<Piece>,
}

fn request(guest: &mut Guest, request: Request) {
    let mut header = [0; 16];
    header[0] = request.kind % 16;
    // Most shall be inside, or about.
    let sector = match request.kind {
        0x80.. => request.sector,
        _ => request.sector % (SECTORS + 2),
    };
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let mut chain = vec![Piece::Readable(header.into())];
    chain.extend(request.data.into_iter().take(6).map(|piece| match piece {
        // Whole sectors, for most.
        Piece::Plain(len) if len % 4 != 0 => Piece::Plain(len / 0x1000 * 512),
        Piece::Writable(len) if len % 4 != 0 => Piece::Writable(len / 0x1000 * 512),
        other => other,
    }));
    chain.push(Piece::Writable(1));
    guest.add(request.queue.into(), &chain);
    guest.kick(request.queue.into());
}

/// A disk with a raw image, which never becomes larger, or changes though it is only
/// to be read.
pub fn block((read_only, program): (bool, Vec<Action<Request>>)) {
    let file = crate::file(&[0x5a; (SECTORS * 512) as usize]);
    let disk = Disk {
        image: Image::Raw(file.try_clone().unwrap()),
        sectors: SECTORS,
        read_only,
        id: [b'x'; 20],
        queues: 2,
        limits: Limits::default(),
    };
    let mut guest = Guest::new(Box::new(Block::new(disk).unwrap()));
    guest.run(program, request);
    drop(guest);
    assert_eq!(file.metadata().unwrap().len(), SECTORS * 512);
    if read_only {
        let mut content = vec![0; (SECTORS * 512) as usize];
        file.read_exact_at(&mut content, 0).unwrap();
        assert!(content.iter().all(|&byte| byte == 0x5a));
    }
}

/// A disk with an image of QEMU's format: eight bytes say what the guest does, the rest
/// is the image.
pub fn qcow2(input: &[u8]) {
    let Some((program, image)) = input.split_first_chunk::<8>() else {
        return;
    };
    let writable = program[0] & 1 != 0;
    let backing = (program[0] & 2 != 0).then(|| Image::Raw(crate::file(&[1; 4096])));
    let backing = backing.and_then(|image| image.into_backing().ok());
    let Ok(image) = Qcow2::open(crate::file(image), writable, backing) else {
        return;
    };
    let sectors = image.size() / 512;
    let disk = Disk {
        image: Image::Qcow2(Box::new(image)),
        sectors,
        read_only: !writable,
        id: [b'x'; 20],
        queues: 1,
        limits: Limits::default(),
    };
    let mut guest = Guest::new(Box::new(Block::new(disk).unwrap()));
    for step in &program[1..] {
        let (kind, place) = (step & 7, u64::from(step >> 3));
        let sector = match place {
            0..16 => place * 2,
            _ => (sectors / 16).saturating_mul(place - 16),
        };
        let mut header = [0; 16];
        header[0] = [0, 0, 1, 1, 4, 11, 13, 0][usize::from(kind)];
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let segment = [
            &sector.to_le_bytes()[..],
            &[8, 0, 0, 0],
            &[kind & 1, 0, 0, 0],
        ]
        .concat();
        let data = match header[0] {
            0 => Piece::Writable(8192),
            1 => Piece::Plain(1536),
            4 => Piece::Plain(0),
            _ => Piece::Readable(segment),
        };
        if header[0] > 4 {
            header[8..].fill(0);
        }
        guest.add(
            0,
            &[Piece::Readable(header.into()), data, Piece::Writable(1)],
        );
        guest.kick(0);
        // The threads shall not overtake each other: what is found is to be found again.
        guest.finish();
    }
}

// Networks.

/// A frame from either side.
#[derive(Arbitrary, Debug)]
pub enum Traffic {
    ToGuest(Vec<u8>),
    FromGuest(Vec<u8>),
    Room(u8, u16),
    TakeAll,
}

fn traffic(guest: &mut Guest, traffic: &Traffic) {
    match traffic {
        Traffic::FromGuest(frame) => {
            guest.add(
                1,
                &[Piece::Plain(HEADER as u16), Piece::Readable(frame.clone())],
            );
            guest.kick(1);
        }
        Traffic::Room(parts, len) => {
            let part = |_| Piece::Writable(*len);
            let parts: Vec<_> = (0..parts % 3 + 1).map(part).collect();
            guest.add(0, &parts);
            guest.kick(0);
        }
        Traffic::ToGuest(_) | Traffic::TakeAll => {}
    }
}

/// A network card on what stands for a TAP: a socket that keeps packets apart.
pub fn net_tap(program: Vec<Action<Traffic>>) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let tap = Backend::tap(File::from(OwnedFd::from(theirs)));
    let net = Net::new(vec![tap], [2, 0, 0, 0, 0, 1], Limits::default()).unwrap();
    let mut guest = Guest::new(Box::new(net));
    let mut room = vec![0; 0x20000];
    guest.run(program, |guest, action| {
        traffic(guest, &action);
        match action {
            Traffic::ToGuest(packet) => {
                let _ = ours.send(&packet);
            }
            Traffic::TakeAll => while ours.recv(&mut room).is_ok() {},
            _ => {}
        }
    });
}

/// Passes frames that begin with an even number.
struct Even;

impl FrameFilter for Even {
    fn outgoing(&mut self, frame: &[u8], _: Instant) -> Verdict {
        match frame.first() {
            Some(first) if first % 2 == 0 => Verdict::Pass,
            Some(1) => Verdict::Answer(frame.to_vec()),
            _ => Verdict::Drop,
        }
    }

    fn incoming(&mut self, frame: &[u8], _: Instant) -> bool {
        frame.first().is_none_or(|first| first % 2 == 0)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// A network card on a stream of frames, with a filter that nothing passes by.
pub fn net_stream(program: Vec<Action<Traffic>>) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let end = Backend::stream(theirs, Some(Box::new(Even))).unwrap();
    let net = Net::new(vec![end], [2, 0, 0, 0, 0, 1], Limits::default()).unwrap();
    let mut guest = Guest::new(Box::new(net));
    let mut taken = Vec::new();
    let mut room = vec![0; 0x40000];
    guest.run(program, |guest, action| {
        traffic(guest, &action);
        match action {
            Traffic::ToGuest(bytes) if bytes.first() == Some(&0xff) => {
                // Not even framed.
                let _ = ours.write(&bytes);
            }
            Traffic::ToGuest(frame) => {
                let len = (frame.len() as u32).to_be_bytes();
                let _ = ours.write(&[&len[..], &frame].concat());
            }
            Traffic::TakeAll => {
                while let Ok(count @ 1..) = ours.read(&mut room) {
                    taken.extend_from_slice(&room[..count]);
                }
            }
            _ => {}
        }
    });
    let mut rest = &taken[..];
    while let Some((len, frames)) = rest.split_first_chunk() {
        let len = u32::from_be_bytes(*len) as usize;
        assert!(len <= 0x10000, "a frame of {len}");
        let Some((frame, later)) = frames.split_at_checked(len) else {
            break;
        };
        assert!(
            frame.first().is_none_or(|first| first % 2 == 0),
            "it passed the filter"
        );
        rest = later;
    }
}

// Sockets.

/// A packet of the guest's, or something that a peer does.
#[derive(Arbitrary, Debug)]
pub enum Talk {
    Packet {
        op: u8,
        ports: (u8, u8),
        len: u16,
        flags: u8,
        credit: (u32, u32),
        strange: Option<(u64, u64, u16)>,
    },
    Room(u16),
    Connect(Vec<u8>),
    ConnectTo(u8),
    Say(u8, Vec<u8>),
    Listen(u8),
    Leave(u8),
}

const CID: u32 = 3;

/// The socket device, with peers on Unix sockets.
pub fn vsock(program: Vec<Action<Talk>>) {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("mayfly-fuzz-{}-{number}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let peers: Arc<Mutex<Vec<UnixStream>>> = Arc::default();
    let sockets = peers.clone();
    let connect = move |port: u32| {
        if port % 4 == 3 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        lock(&sockets).push(ours);
        Ok(theirs)
    };
    let limits = VsockLimits {
        connections: 4,
        resets: 4,
        greeting: Duration::from_secs(60),
        request: Duration::from_secs(60),
        linger: Duration::from_secs(60),
    };
    let device = Vsock::with_limits(VsockState::new(CID), listener, Box::new(connect), limits);
    let mut guest = Guest::new(Box::new(device.unwrap()));
    let greet = |text: &[u8]| {
        let mut peer = UnixStream::connect_addr(&address).unwrap();
        peer.set_nonblocking(true).unwrap();
        let _ = peer.write(text);
        lock(&peers).push(peer);
    };
    guest.run(program, |guest, action| {
        let mut peers = lock(&peers);
        let peer = |peers: &[UnixStream], number: u8| usize::from(number) % peers.len().max(1);
        match action {
            Talk::Packet {
                op,
                ports,
                len,
                flags,
                credit,
                strange,
            } => {
                drop(peers);
                let len = len % 0x2000;
                let (from, to, kind) = strange.unwrap_or((CID.into(), 2, 1));
                // The host's ports of its own connections are large.
                let port = |port: u8| u32::from(port % 8) | u32::from(port & 0x80) << 23;
                let mut header = Vec::new();
                header.extend(from.to_le_bytes());
                header.extend(to.to_le_bytes());
                header.extend(port(ports.0).to_le_bytes());
                header.extend(port(ports.1).to_le_bytes());
                header.extend(u32::from(len).to_le_bytes());
                header.extend(kind.to_le_bytes());
                header.extend(u16::from(op % 9).to_le_bytes());
                header.extend(u32::from(flags).to_le_bytes());
                header.extend(credit.0.to_le_bytes());
                header.extend(credit.1.to_le_bytes());
                guest.add(1, &[Piece::Readable(header), Piece::Plain(len)]);
                guest.kick(1);
            }
            Talk::Room(len) => {
                drop(peers);
                guest.add(0, &[Piece::Writable(len)]);
                guest.kick(0);
            }
            Talk::Connect(text) if peers.len() < 16 => {
                drop(peers);
                greet(&text);
            }
            Talk::ConnectTo(port) if peers.len() < 16 => {
                drop(peers);
                greet(format!("CONNECT {}\n", port % 8).as_bytes());
            }
            Talk::Connect(_) | Talk::ConnectTo(_) => {}
            Talk::Say(number, text) => {
                let number = peer(&peers, number);
                if let Some(peer) = peers.get_mut(number) {
                    let _ = peer.write(&text);
                }
            }
            Talk::Listen(number) => {
                let number = peer(&peers, number);
                if let Some(peer) = peers.get_mut(number) {
                    let _ = peer.read(&mut [0; 0x4000]);
                }
            }
            Talk::Leave(number) => {
                let number = peer(&peers, number);
                if number < peers.len() {
                    peers.swap_remove(number);
                }
            }
        }
    });
}

// The balloon.

/// What is wanted of a guest, or what it gives.
#[derive(Arbitrary, Debug)]
pub enum Want {
    Target(u64),
    Statistics,
    Pages(u8, Vec<u32>),
    Tell(Vec<(u16, u64)>),
}

struct Memory;

impl Reclaim for Memory {
    fn reclaim(&mut self, start: u64, len: u64) -> Option<u64> {
        (start.checked_add(len)? <= MEMORY as u64).then_some(len)
    }
}

/// The memory balloon.
pub fn balloon(program: Vec<Action<Want>>) {
    let abilities = Abilities {
        deflate_on_oom: true,
        reporting: true,
    };
    let balloon = Balloon::new(Memory, abilities, 0).unwrap();
    let handle = balloon.handle();
    let mut guest = Guest::new(Box::new(balloon));
    guest.run(program, |guest, action| match action {
        Want::Target(bytes) => handle.set_target(bytes),
        Want::Statistics => handle.request_statistics(),
        Want::Pages(queue, pages) => {
            let pages = pages.iter().take(300).map(|page| page % 0x120);
            let bytes = pages.flat_map(u32::to_le_bytes).collect();
            guest.add((queue % 2).into(), &[Piece::Readable(bytes)]);
            guest.kick((queue % 2).into());
        }
        Want::Tell(all) => {
            let entry = |(tag, value): &(u16, u64)| {
                [&(tag % 20).to_le_bytes()[..], &value.to_le_bytes()].concat()
            };
            guest.add(2, &[Piece::Readable(all.iter().flat_map(entry).collect())]);
            guest.kick(2);
        }
    });
    handle.statistics();
}

// Consoles.

/// What the host's side of a line does, or the guest on the queue for control.
#[derive(Arbitrary, Debug)]
pub enum Typing {
    Input(Vec<u8>),
    Take(u16),
    Connected(bool),
    Resized(u16, u16),
    Control(u8, u8, u16),
    ControlRoom,
}

/// What a line may hold.
const RING_MAX: usize = 64 << 10;

fn typing(guest: &mut Guest, port: &Mutex<Port>, action: Typing) {
    match action {
        Typing::Input(data) => lock(port).input(&data),
        Typing::Take(count) => lock(port).output_done(count.into()),
        Typing::Connected(connected) => lock(port).connected(connected),
        Typing::Resized(columns, rows) => lock(port).resized(TerminalSize { columns, rows }),
        Typing::Control(id, event, value) => {
            let id = u32::from(id % 3);
            let event = u16::from(event % 9);
            let message = [
                &id.to_le_bytes()[..],
                &event.to_le_bytes(),
                &value.to_le_bytes(),
            ];
            guest.add(3, &[Piece::Readable(message.concat())]);
            guest.kick(3);
        }
        Typing::ControlRoom => {
            guest.add(2, &[Piece::Writable(64)]);
            guest.kick(2);
        }
    }
    assert!(lock(port).output().len() <= RING_MAX);
    assert!(lock(port).input_room() <= RING_MAX);
}

/// A console.
pub fn console(program: Vec<Action<Typing>>) {
    let console = Console::new(event()).unwrap();
    let port = console.port();
    let mut guest = Guest::new(Box::new(console));
    guest.run(program, |guest, action| typing(guest, &port, action));
}

/// A channel.
pub fn channels(program: Vec<Action<Typing>>) {
    let channels = Channels::new(vec![("agent".into(), event())]).unwrap();
    let port = channels.ports().remove(0);
    let mut guest = Guest::new(Box::new(channels));
    guest.run(program, |guest, action| typing(guest, &port, action));
}
