//! All connections, the clients that ask for one, and the order in which they are served.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{Connection, End};
use super::greeting::{Greeting, Heard};
use super::limits::{BUFFER, BUFFER_MIN, BUFFERS, Connector, Limits};
use super::packet::{HEADER, HOST_CID, Header, Op, PORT_ANY, STREAM, Shutdown};
use crate::number::halves;
use crate::virtio::chain::Buffer;

/// The host's ports of connections that it begins.
const HOST_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;
/// How many events are fetched at once, and how often before others have a turn.
const EVENTS: usize = 128;
const ROUNDS: usize = 64;
/// The resolution of deadlines.
const TICK: Duration = Duration::from_millis(500);

/// A connection's ports. As a number, it names an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    host: u32,
    guest: u32,
}

impl Key {
    /// No connection has this port: these are other sources of events.
    const fn special(number: u32) -> Self {
        Key {
            host: PORT_ANY,
            guest: number,
        }
    }

    fn number(self) -> u64 {
        u64::from(self.host) << 32 | u64::from(self.guest)
    }

    fn of(number: u64) -> Self {
        let (guest, host) = halves(number);
        Key { host, guest }
    }
}

const LISTENER: Key = Key::special(0);
const TIMER: Key = Key::special(1);
const AGAIN: Key = Key::special(2);
/// Clients that are being listened to have this number and above.
const GREETINGS: u32 = 3;

/// Counters of the device, for `info`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Connections that were begun, by either side.
    pub connections: u64,
    /// Those that the guest asked for and the host refused.
    pub refused: u64,
    /// Resets that the guest was sent.
    pub resets: u64,
    /// Packets that were not for the host, or not from the guest.
    pub foreign_packets: u64,
    /// Bytes from the host to the guest.
    pub received: u64,
    /// Bytes from the guest to the host.
    pub sent: u64,
}

/// Splits the guest's packets up to connections, and puts theirs together.
///
/// All of its descriptors are watched by one, on edges; connections remember
/// what they may do until the kernel says that they may not.
pub struct Muxer {
    cid: u64,
    limits: Limits,
    listener: UnixListener,
    connect: Connector,
    epoll: Epoll,
    timer: TimerFd,
    ticking: bool,
    /// Signalled to be called again.
    again: EventFd,
    connections: HashMap<Key, Connection>,
    greetings: HashMap<u32, Greeting>,
    /// How many bytes all connections together may come to hold for the guest.
    credit: usize,
    /// Those that have packets for the guest, each once, in the order of turns.
    ready: VecDeque<Key>,
    /// Resets for connections that are no more, or never were, with their type.
    /// There are at most [`Limits::resets`], and one for each that was there.
    resets: VecDeque<(Key, u16)>,
    /// Resets and connections take turns.
    resets_next: bool,
    next_port: u32,
    next_greeting: u32,
    /// Clients may wait at the listener.
    clients: bool,
    /// The counters so far.
    pub counters: Counters,
}

impl Muxer {
    pub fn new(
        cid: u64,
        listener: UnixListener,
        connect: Connector,
        limits: Limits,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let muxer = Muxer {
            cid,
            limits,
            listener,
            connect,
            epoll: Epoll::new()?,
            timer: TimerFd::new()?,
            ticking: false,
            again: EventFd::new(EFD_NONBLOCK)?,
            connections: HashMap::new(),
            greetings: HashMap::new(),
            credit: 0,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            resets_next: true,
            next_port: HOST_PORTS.start,
            next_greeting: GREETINGS,
            clients: false,
            counters: Counters::default(),
        };
        for (fd, key) in [
            (muxer.listener.as_raw_fd(), LISTENER),
            (muxer.timer.as_raw_fd(), TIMER),
            (muxer.again.as_raw_fd(), AGAIN),
        ] {
            muxer.watch(ControlOperation::Add, fd, key, false)?;
        }
        Ok(muxer)
    }

    /// Ready when [`Muxer::poll`] has something to do.
    pub fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Output is watched for only while there is some to be sent: else each
    /// read of a peer would be an event.
    fn watch(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        key: Key,
        output: bool,
    ) -> io::Result<()> {
        let mut events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        events.set(EventSet::OUT, output);
        self.epoll
            .ctl(operation, fd, EpollEvent::new(events, key.number()))
    }

    /// The guest has connections, or is still to hear that one has ended.
    pub fn is_busy(&self) -> bool {
        !self.connections.is_empty() || !self.resets.is_empty()
    }

    /// Closes all connections; the guest is forgotten.
    pub fn reset(&mut self) {
        // A new hash table would need random numbers, which a vCPU's thread may not ask for.
        self.connections.clear();
        self.greetings.clear();
        self.credit = 0;
        self.ready.clear();
        self.resets.clear();
    }

    /// A new connection has a place.
    fn has_room(&self) -> bool {
        // A reset that waits takes a place: the guest that does not take it
        // gets no others.
        let taken = self.connections.len() + self.greetings.len() + self.resets.len();
        taken < self.limits.connections
    }

    /// What a new connection may hold for the guest: much, while all have little.
    fn give_credit(&mut self) -> usize {
        let credit = match self.credit + BUFFER <= BUFFERS {
            true => BUFFER,
            false => BUFFER_MIN,
        };
        self.credit += credit;
        credit
    }

    // What the host does.

    /// Fetches what happened on the host.
    pub fn poll(&mut self) {
        for _ in 0..ROUNDS {
            let mut events = [EpollEvent::default(); EVENTS];
            let count = match self.epoll.wait(0, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return log::error!("vsock: waiting for events: {error}"),
            };
            for event in events.iter().take(count) {
                let set = EventSet::from_bits_truncate(event.events());
                self.event(Key::of(event.data()), set);
            }
            if count < EVENTS {
                return;
            }
        }
        let _ = self.again.write(1);
    }

    fn event(&mut self, key: Key, events: EventSet) {
        match key {
            LISTENER => self.clients = true,
            TIMER => self.tick(),
            AGAIN => {
                let _ = self.again.read();
            }
            Key {
                host: PORT_ANY,
                guest: greeting,
            } => self.greet(greeting),
            _ => {
                if let Some(connection) = self.connections.get_mut(&key) {
                    connection.event(events);
                    self.settle(key);
                }
            }
        }
    }

    /// Lets waiting clients in, while there are places.
    pub fn accept(&mut self) {
        while self.clients && self.has_room() {
            match self.listener.accept() {
                Ok((stream, _)) => self.welcome(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.clients = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Such as too many open files: that may change.
                    log::debug!("vsock: accepting a client: {error}");
                    return self.start_ticking();
                }
            }
        }
    }

    fn welcome(&mut self, stream: UnixStream) {
        while self.greetings.contains_key(&self.next_greeting) || self.next_greeting < GREETINGS {
            self.next_greeting = self.next_greeting.wrapping_add(1);
        }
        let number = self.next_greeting;
        self.next_greeting = number.wrapping_add(1);
        let fd = stream.as_raw_fd();
        if let Err(error) = self.watch(ControlOperation::Add, fd, Key::special(number), false) {
            return log::debug!("vsock: watching a client: {error}");
        }
        let deadline = Instant::now() + self.limits.greeting;
        self.greetings
            .insert(number, Greeting::new(stream, deadline));
        self.start_ticking();
    }

    /// Listens to a client that says which port it wants.
    fn greet(&mut self, number: u32) {
        let Some(greeting) = self.greetings.get(&number) else {
            return;
        };
        let heard = greeting.listen();
        if heard == Heard::More {
            return;
        }
        let Some(greeting) = self.greetings.remove(&number) else {
            return;
        };
        let Heard::Connect(port) = heard else {
            return;
        };
        if port == PORT_ANY {
            return;
        }
        let mut key;
        loop {
            key = Key {
                host: self.next_port,
                guest: port,
            };
            self.next_port = match key.host + 1 {
                next if HOST_PORTS.contains(&next) => next,
                _ => HOST_PORTS.start,
            };
            if !self.connections.contains_key(&key) {
                break;
            }
        }
        let stream = greeting.into_stream();
        let fd = stream.as_raw_fd();
        if let Err(error) = self.watch(ControlOperation::Modify, fd, key, false) {
            return log::debug!("vsock: watching a client: {error}");
        }
        let deadline = Instant::now() + self.limits.request;
        let credit = self.give_credit();
        self.counters.connections += 1;
        self.connections
            .insert(key, Connection::requested(stream, credit, deadline));
        self.settle(key);
    }

    fn start_ticking(&mut self) {
        if self.ticking {
            return;
        }
        // Once: each tick starts the next.
        match self.timer.reset(TICK, None) {
            Ok(()) => self.ticking = true,
            Err(error) => log::error!("vsock: setting a timer: {error}"),
        }
    }

    /// Ends what took too long.
    fn tick(&mut self) {
        self.ticking = false;
        let now = Instant::now();
        self.greetings.retain(|_, greeting| greeting.deadline > now);
        let mut more = self.clients || !self.greetings.is_empty();
        let mut expired = Vec::new();
        for (key, connection) in &mut self.connections {
            connection.expire(now);
            more |= connection.deadline(self.limits.linger).is_some();
            if connection.over().is_some() {
                expired.push(*key);
            }
        }
        for key in expired {
            self.settle(key);
        }
        if more {
            self.start_ticking();
        }
    }

    /// After anything happened to a connection.
    fn settle(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        if let Some(end) = connection.over() {
            if connection.scheduled {
                self.ready.retain(|other| *other != key);
            }
            self.credit -= connection.guest_credit();
            self.connections.remove(&key);
            if end == End::Reset {
                self.resets.push_back((key, STREAM));
            }
            return;
        }
        if connection.due() && !connection.scheduled {
            connection.scheduled = true;
            self.ready.push_back(key);
        }
        let (fd, output) = (connection.fd(), connection.wants_output());
        let unwatched = std::mem::replace(&mut connection.watched, output) != output;
        if connection.deadline(self.limits.linger).is_some() {
            self.start_ticking();
        }
        if unwatched && let Err(error) = self.watch(ControlOperation::Modify, fd, key, output) {
            log::error!("vsock: watching a connection: {error}");
        }
    }

    // What the guest sends.

    /// No packet may be taken, as its answer would have no place.
    pub fn is_full(&self) -> bool {
        self.resets.len() >= self.limits.resets
    }

    /// Takes a packet: its header, and the buffer that begins with it.
    pub fn packet(&mut self, header: &Header, buffer: &Buffer) {
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            self.counters.foreign_packets += 1;
            return;
        }
        let key = Key {
            host: header.dst_port,
            guest: header.src_port,
        };
        let op = Op::new(header.op);
        if header.kind != STREAM {
            // Not of any connection, whatever its ports.
            if op != Some(Op::Reset) {
                self.resets.push_back((key, header.kind));
            }
            return;
        }
        let known = self.connections.get_mut(&key);
        let Some(connection) = known.filter(|connection| !connection.is_orphan()) else {
            return match op {
                Some(Op::Reset) => {}
                Some(Op::Request) => self.request(key, header),
                _ => self.resets.push_back((key, STREAM)),
            };
        };
        connection.credit(header);
        match op {
            Some(Op::Response) => connection.response(key.host),
            Some(Op::Reset) => connection.guest_reset(),
            Some(Op::Shutdown) => {
                connection.shutdown(Shutdown::from_bits_truncate(header.flags));
            }
            Some(Op::Data) => {
                let len = header.len as usize;
                connection.data(buffer, HEADER, len);
                if connection.over().is_none() {
                    self.counters.sent += u64::from(header.len);
                }
            }
            Some(Op::CreditUpdate) => {}
            Some(Op::CreditRequest) => connection.credit_request(),
            // A second request, or nothing known.
            Some(Op::Request) | None => connection.abort(),
        }
        self.settle(key);
    }

    /// The guest wants to connect to a port of the host.
    fn request(&mut self, key: Key, header: &Header) {
        let known = self.connections.contains_key(&key);
        let sound = !known && key.host != PORT_ANY && key.guest != PORT_ANY && self.has_room();
        let connected = sound.then(|| self.open(key));
        let refusal = match connected {
            Some(Ok(stream)) => {
                let mut connection = Connection::accepted(stream, self.give_credit());
                connection.credit(header);
                self.counters.connections += 1;
                self.connections.insert(key, connection);
                return self.settle(key);
            }
            Some(Err(error)) => error.to_string(),
            None => "no place".to_owned(),
        };
        log::debug!("vsock: port {} is refused: {refusal}", key.host);
        self.counters.refused += 1;
        self.resets.push_back((key, STREAM));
    }

    fn open(&mut self, key: Key) -> io::Result<UnixStream> {
        let stream = (self.connect)(key.host)?;
        self.watch(ControlOperation::Add, stream.as_raw_fd(), key, false)?;
        Ok(stream)
    }

    // What the guest is sent.

    /// There may be a packet for the guest.
    pub fn has_packets(&self) -> bool {
        !self.ready.is_empty() || !self.resets.is_empty()
    }

    /// The next packet for the guest: its header is returned, its data lies in
    /// the buffer behind where the header will be.
    pub fn next(&mut self, buffer: &Buffer) -> Option<Header> {
        if std::mem::take(&mut self.resets_next)
            && let Some(header) = self.next_reset()
        {
            return Some(header);
        }
        // Each has one turn at most: those that have nothing leave the list.
        for _ in 0..self.ready.len() {
            let Some(key) = self.ready.pop_front() else {
                break;
            };
            let Some(connection) = self.connections.get_mut(&key) else {
                continue;
            };
            connection.scheduled = false;
            let packet = connection.next(buffer);
            let header = packet.map(|packet| {
                let mut header = Header {
                    src_cid: HOST_CID,
                    dst_cid: self.cid,
                    src_port: key.host,
                    dst_port: key.guest,
                    len: packet.len,
                    kind: STREAM,
                    op: packet.op as u16,
                    flags: packet.flags.bits(),
                    ..Default::default()
                };
                connection.fill(&mut header);
                self.counters.received += u64::from(packet.len);
                header
            });
            self.settle(key);
            if header.is_some() {
                self.resets_next = true;
                return header;
            }
        }
        self.next_reset()
    }

    fn next_reset(&mut self) -> Option<Header> {
        let (key, kind) = self.resets.pop_front()?;
        self.counters.resets += 1;
        Some(Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: key.host,
            dst_port: key.guest,
            kind,
            op: Op::Reset as u16,
            ..Default::default()
        })
    }
}
