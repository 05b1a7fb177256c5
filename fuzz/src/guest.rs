//! A guest that drives one device as it likes.
//!
//! As long as it plays by the rules, what the device uses is checked: only chains that
//! it was given, each once, and never more bytes than the chain has room for.

use std::collections::BTreeMap;

use arbitrary::Arbitrary;
use mayfly_devices::bus::BusDevice;
use mayfly_devices::virtio::device::VirtioDevice;
use mayfly_devices::virtio::mmio::Status;
use mayfly_devices::virtio::testing::{Descriptor, Driver, MEMORY, SIZE};

/// Where memory that no ring is in begins.
const DATA: u64 = 0x8000;
/// More actions are not looked at.
const ACTIONS_MAX: usize = 64;
const NEXT: u16 = 1;
const INDIRECT: u16 = 4;
/// How many descriptors a table of its own has, and where those of a queue begin: behind
/// its rings.
const TABLE: usize = 7;
const TABLES: u64 = 0x8a0;
/// Indirect descriptors, and events' indexes: the transport offers both.
const TRANSPORT: u64 = 0b11 << 28;

/// What a guest does, beside what `H` is: what its host does, or what is a sensible
/// request to this device.
#[derive(Arbitrary, Debug)]
pub enum Action<H> {
    /// Something of this device's own.
    Own(H),
    /// Makes a chain available.
    Add(u8, Vec<Piece>),
    /// The same, in a table of its own.
    AddIndirect(u8, Vec<Piece>),
    /// Notifies.
    Kick(u8),
    /// Time passes.
    Wait,
    /// Starts the device, agreeing on features.
    Start(u64),
    /// Resets it.
    Reset,
    /// Reads registers.
    Read(u16, u8),
    /// Writes to a register, or configuration space.
    Write(u16, u8, u32),
    /// Writes one descriptor.
    Describe(u8, u8, u64, u32, u16, u16),
    /// Makes a head available, whatever it is.
    Offer(u8, u16),
    /// Sets the available index.
    Ahead(u8, u16),
    /// Writes to memory.
    Scribble(u16, Vec<u8>),
}

/// A part of a chain.
#[derive(Arbitrary, Debug)]
pub enum Piece {
    /// With these bytes.
    Readable(Vec<u8>),
    /// With so many bytes that are nothing special.
    Plain(u16),
    /// With so much room.
    Writable(u16),
    /// Somewhere.
    Anywhere(u64, u32, bool),
}

/// A chain that the device has.
struct Offered {
    descriptors: Vec<u16>,
    room: u64,
}

/// The guest.
pub struct Guest {
    /// The device behind its registers.
    pub driver: Driver,
    free: Vec<Vec<u16>>,
    given: Vec<BTreeMap<u16, Offered>>,
    /// Where the next buffer is.
    next: u64,
    fair: bool,
    started: bool,
    features: u64,
}

impl Guest {
    /// One whose device was started with all features that it offers.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with(device, Driver::new)
    }

    /// With memory that another process could map.
    pub fn shared(device: Box<dyn VirtioDevice>) -> Self {
        Self::with(device, Driver::shared)
    }

    fn with(device: Box<dyn VirtioDevice>, make: impl Fn(Box<dyn VirtioDevice>) -> Driver) -> Self {
        let (queues, features) = (device.queue_sizes().len(), device.features());
        assert!(queues <= 7, "rings and data would lie in the same place");
        let mut guest = Guest {
            driver: make(device),
            free: vec![(0..SIZE).collect(); queues],
            given: (0..queues).map(|_| BTreeMap::new()).collect(),
            next: DATA,
            fair: true,
            started: false,
            features: features | TRANSPORT,
        };
        guest.start(features | TRANSPORT);
        guest
    }

    fn start(&mut self, features: u64) {
        if self.started {
            self.reset();
        }
        self.started = true;
        self.driver.set_up(features);
        self.driver.add_status(Status::DRIVER_OK);
        self.serve();
    }

    fn reset(&mut self) {
        self.driver.reset();
        assert_eq!(self.driver.status(), Status::empty());
        self.started = false;
        self.fair = true;
        for (free, given) in self.free.iter_mut().zip(&mut self.given) {
            *free = (0..SIZE).collect();
            given.clear();
        }
    }

    /// Space for a buffer.
    fn space(&mut self, len: u64) -> u64 {
        if self.next + len > MEMORY as u64 {
            self.next = DATA;
        }
        let start = self.next;
        self.next += len;
        start
    }

    /// Makes a chain available, if there are descriptors for it.
    pub fn add(&mut self, queue: usize, pieces: &[Piece]) {
        let queue = queue % self.free.len();
        let pieces = &pieces[..pieces.len().min(SIZE.into())];
        if pieces.is_empty() || self.free[queue].len() < pieces.len() {
            return;
        }
        let rest = self.free[queue].len() - pieces.len();
        let descriptors = self.free[queue].split_off(rest);
        let (chain, room) = self.chain(pieces, &descriptors);
        for (&index, descriptor) in descriptors.iter().zip(chain) {
            self.driver.describe(queue, index, descriptor);
        }
        self.give(queue, descriptors, room);
    }

    /// The same, in a table of its own.
    fn add_indirect(&mut self, queue: usize, pieces: &[Piece]) {
        let pieces = &pieces[..pieces.len().min(TABLE)];
        let Some(index) = self.free[queue].pop() else {
            return;
        };
        let numbers: Vec<u16> = (0..pieces.len() as u16).collect();
        let (chain, room) = self.chain(pieces, &numbers);
        let mut table = Vec::new();
        for descriptor in &chain {
            table.extend(descriptor.addr.to_le_bytes());
            table.extend(descriptor.len.to_le_bytes());
            table.extend(descriptor.flags.to_le_bytes());
            table.extend(descriptor.next.to_le_bytes());
        }
        // Where no buffer is: the device must find it as it was written.
        let addr = Driver::rings(queue) + TABLES + u64::from(index) * 16 * TABLE as u64;
        self.driver.write(addr, &table);
        let mut descriptor = Descriptor::readable(addr, table.len() as u32);
        descriptor.flags = INDIRECT;
        self.driver.describe(queue, index, descriptor);
        self.give(queue, vec![index], room);
    }

    /// Descriptors of a chain, by their numbers, and how much room it has.
    fn chain(&mut self, pieces: &[Piece], numbers: &[u16]) -> (Vec<Descriptor>, u64) {
        let mut room = 0;
        let mut chain = Vec::new();
        for (at, piece) in pieces.iter().enumerate() {
            let mut descriptor = match piece {
                Piece::Readable(bytes) => {
                    let bytes = &bytes[..bytes.len().min(0x1000)];
                    let addr = self.space(bytes.len() as u64);
                    self.driver.write(addr, bytes);
                    Descriptor::readable(addr, bytes.len() as u32)
                }
                Piece::Plain(len) => {
                    Descriptor::readable(self.space(u64::from(*len)), u32::from(*len))
                }
                Piece::Writable(len) => {
                    Descriptor::writable(self.space(u64::from(*len)), u32::from(*len))
                }
                Piece::Anywhere(addr, len, true) => {
                    // It may overwrite rings.
                    self.fair &= *addr >= DATA;
                    Descriptor::writable(*addr, *len)
                }
                Piece::Anywhere(addr, len, false) => Descriptor::readable(*addr, *len),
            };
            if descriptor.flags != 0 {
                room += u64::from(descriptor.len);
            }
            if let Some(&next) = numbers.get(at + 1) {
                descriptor.flags |= NEXT;
                descriptor.next = next;
            }
            chain.push(descriptor);
        }
        (chain, room)
    }

    fn give(&mut self, queue: usize, descriptors: Vec<u16>, room: u64) {
        let head = descriptors[0];
        self.given[queue].insert(head, Offered { descriptors, room });
        self.driver.offer(queue, head);
    }

    /// Notifies.
    pub fn kick(&mut self, queue: usize) {
        self.driver.kick(queue % self.free.len());
        self.serve();
    }

    /// The event loop has its turns.
    pub fn serve(&mut self) {
        for _ in 0..3 {
            self.driver.process_pending();
        }
        self.check();
    }

    /// Waits until the device has used all that it was given, if it will.
    pub fn finish(&mut self) {
        for _ in 0..20 {
            self.serve();
            if !self.is_waiting() {
                return;
            }
            self.driver.handle_event();
        }
        assert!(!self.is_waiting(), "a request does not end");
    }

    /// The device has chains.
    fn is_waiting(&self) -> bool {
        self.given.iter().any(|given| !given.is_empty())
    }

    fn check(&mut self) {
        if !self.fair || !self.started {
            return;
        }
        for queue in 0..self.free.len() {
            for (head, len) in self.driver.used(queue) {
                let given = self.given[queue].remove(&head);
                let given = given.expect("a chain that the device does not have");
                assert!(
                    u64::from(len) <= given.room,
                    "{len} bytes in {}",
                    given.room
                );
                self.free[queue].extend(given.descriptors);
            }
        }
    }

    /// Does all of a program, what is the device's own by `own`.
    pub fn run<H>(&mut self, program: Vec<Action<H>>, mut own: impl FnMut(&mut Guest, H)) {
        let queues = self.free.len();
        let queue = |number: u8| usize::from(number) % queues;
        for action in program.into_iter().take(ACTIONS_MAX) {
            match action {
                Action::Own(action) => own(self, action),
                Action::Add(number, pieces) => self.add(queue(number), &pieces),
                Action::AddIndirect(number, pieces) => self.add_indirect(queue(number), &pieces),
                Action::Kick(number) => self.kick(queue(number)),
                Action::Wait => {}
                // Those that were not offered are a mistake, which few shall make.
                Action::Start(features @ 0xff00_0000_0000_0000..) => self.start(features),
                Action::Start(features) => self.start(features & self.features),
                Action::Reset => self.reset(),
                Action::Read(offset, len) => {
                    let mut data = [0; 8];
                    let len = usize::from(len) % 9;
                    self.driver.transport.read(offset.into(), &mut data[..len]);
                }
                Action::Write(offset, len, value) => {
                    self.fair &= offset >= 0x100;
                    let len = usize::from(len) % 5;
                    let data = &value.to_le_bytes()[..len];
                    self.driver.transport.write(offset.into(), data);
                }
                Action::Describe(number, index, addr, len, flags, next) => {
                    self.fair = false;
                    let index = u16::from(index) % SIZE;
                    let descriptor = Descriptor {
                        addr,
                        len,
                        flags,
                        next,
                    };
                    self.driver.describe(queue(number), index, descriptor);
                }
                Action::Offer(number, head) => {
                    self.fair = false;
                    self.driver.offer(queue(number), head);
                }
                Action::Ahead(number, index) => {
                    self.fair = false;
                    self.driver.set_available_index(queue(number), index);
                }
                Action::Scribble(at, data) => {
                    self.fair &= u64::from(at) >= DATA;
                    let data = &data[..data.len().min(0x1000)];
                    self.driver.write(at.into(), data);
                }
            }
            self.serve();
        }
        self.driver.transport.quiesce();
        let _ = self.driver.transport.save();
        self.driver.transport.counters();
        self.reset();
    }
}
