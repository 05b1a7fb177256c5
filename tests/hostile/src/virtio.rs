//! A driver of virtio-mmio (virtio 1.2, 4.2) that can do everything right.

use crate::io::{self, read32, write32};
use crate::layout::{ARENA, DEVICE, DEVICES, SHARE};
use crate::random::Random;

// Registers.
pub const MAGIC: u64 = 0x00;
pub const DEVICE_ID: u64 = 0x08;
pub const FEATURES: u64 = 0x10;
pub const FEATURES_SELECT: u64 = 0x14;
pub const DRIVER_FEATURES: u64 = 0x20;
pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
pub const QUEUE_SELECT: u64 = 0x30;
pub const QUEUE_MAX: u64 = 0x34;
pub const QUEUE_SIZE: u64 = 0x38;
pub const QUEUE_READY: u64 = 0x44;
pub const NOTIFY: u64 = 0x50;
pub const INTERRUPTS: u64 = 0x60;
pub const ACKNOWLEDGE: u64 = 0x64;
pub const STATUS: u64 = 0x70;
/// The lower half of three addresses: descriptors, available ring, used ring.
pub const ADDRESSES: [u64; 3] = [0x80, 0x90, 0xa0];
pub const CONFIG: u64 = 0x100;

pub const DRIVER: u32 = 0b11; // and ACKNOWLEDGE
pub const FEATURES_OK: u32 = 1 << 3;
pub const DRIVER_OK: u32 = 1 << 2;
pub const NEEDS_RESET: u32 = 1 << 6;

const MAGIC_VALUE: u32 = u32::from_le_bytes(*b"virt");
/// As many as this driver uses.
const QUEUES: usize = 12;
/// Each queue's rings, at the start of the device's share.
const RINGS: u64 = 0x4000;
const PARTS: [u64; 3] = [0, 0x1000, 0x2000];
/// The largest that fits in there.
const SIZE_MAX: u32 = 256;

/// A flag of a descriptor: another follows.
pub const NEXT: u16 = 1 << 0;
/// The device may write there.
pub const WRITE: u16 = 1 << 1;

/// What a descriptor says, but for the next one.
#[derive(Clone, Copy, Default)]
pub struct Part {
    pub at: u64,
    pub len: u32,
    pub write: bool,
}

/// What is to become a chain.
#[derive(Default)]
pub struct Parts {
    all: [Part; 8],
    count: usize,
}

impl Parts {
    fn push(mut self, at: u64, len: u32, write: bool) -> Self {
        if let Some(part) = self.all.get_mut(self.count) {
            *part = Part { at, len, write };
            self.count += 1;
        }
        self
    }

    pub fn readable(self, at: u64, len: u32) -> Self {
        self.push(at, len, false)
    }

    pub fn writable(self, at: u64, len: u32) -> Self {
        self.push(at, len, true)
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Part> {
        self.all.iter_mut().take(self.count)
    }
}

#[derive(Clone, Copy, Default)]
struct Queue {
    /// The largest size, and the one that it has.
    max: u32,
    size: u32,
    /// The next descriptor, and the available index.
    descriptor: u16,
    available: u16,
}

/// A device, and its queues as this driver has set them up.
#[derive(Clone, Copy)]
pub struct Device {
    pub base: u64,
    pub share: u64,
    pub kind: u32,
    queues: [Queue; QUEUES],
    pub count: u64,
}

impl Device {
    /// The device in a slot, if there is one.
    pub fn find(slot: usize) -> Option<Self> {
        let base = DEVICES + slot as u64 * DEVICE;
        if read32(base + MAGIC) != MAGIC_VALUE {
            return None;
        }
        let mut device = Device {
            base,
            share: ARENA + slot as u64 * SHARE,
            kind: read32(base + DEVICE_ID),
            queues: [Queue::default(); QUEUES],
            count: 0,
        };
        while device.count < QUEUES as u64 {
            device.write(QUEUE_SELECT, device.count as u32);
            let size = device.read(QUEUE_MAX).min(SIZE_MAX);
            if size == 0 {
                break;
            }
            let queue = &mut device.queues[device.count as usize];
            (queue.max, queue.size) = (size, size);
            device.count += 1;
        }
        Some(device)
    }

    pub fn read(&self, register: u64) -> u32 {
        read32(self.base + register)
    }

    pub fn write(&self, register: u64, value: u32) {
        write32(self.base + register, value);
    }

    pub fn reset(&self) {
        self.write(STATUS, 0);
    }

    /// All features that the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.write(FEATURES_SELECT, select);
            u64::from(self.read(FEATURES))
        };
        half(0) | half(1) << 32
    }

    pub fn accept(&self, features: u64) {
        for (select, half) in [(0, features), (1, features >> 32)] {
            self.write(DRIVER_FEATURES_SELECT, select);
            self.write(DRIVER_FEATURES, half as u32);
        }
    }

    fn rings(&self, queue: u64) -> u64 {
        self.share + queue * RINGS
    }

    /// A queue's three addresses.
    pub fn addresses(&self, queue: u64) -> [u64; 3] {
        PARTS.map(|part| self.rings(queue) + part)
    }

    /// The largest size that a queue may have.
    pub fn max(&self, queue: u64) -> u32 {
        self.queues[queue as usize].max
    }

    /// The size that a queue has.
    pub fn size(&self, queue: u64) -> u32 {
        self.queues[queue as usize].size
    }

    /// Empties a queue, in memory.
    pub fn clear(&mut self, queue: u64) {
        let state = &mut self.queues[queue as usize];
        (state.descriptor, state.available) = (0, 0);
        let [_, available, used] = self.addresses(queue);
        write32(available, 0);
        write32(used, 0);
    }

    /// Tells the device of a queue.
    pub fn set_up(&mut self, queue: u64, size: u32, addresses: [u64; 3], ready: u32) {
        self.write(QUEUE_SELECT, queue as u32);
        self.write(QUEUE_SIZE, size);
        for (register, address) in ADDRESSES.into_iter().zip(addresses) {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, ready);
        if (1..=SIZE_MAX).contains(&size) {
            self.queues[queue as usize].size = size;
        }
    }

    /// Makes a chain available, and returns where its first descriptor lies.
    pub fn add(&mut self, queue: u64, parts: &Parts) -> u64 {
        let [descriptors, available, _] = self.addresses(queue);
        let state = &mut self.queues[queue as usize];
        let size = state.size as u16;
        let head = state.descriptor % size;
        for (number, part) in parts.all.iter().take(parts.count).enumerate() {
            let index = state.descriptor % size;
            let next = (index + 1) % size;
            let last = number + 1 == parts.count;
            let flags = if last { 0 } else { NEXT } | if part.write { WRITE } else { 0 };
            let at = descriptors + 16 * u64::from(index);
            io::write_any(at, 8, part.at);
            write32(at + 8, part.len);
            write32(at + 12, u32::from(flags) | u32::from(next) << 16);
            state.descriptor = next;
        }
        let slot = available + 4 + 2 * u64::from(state.available % size);
        io::write_any(slot, 2, head.into());
        state.available = state.available.wrapping_add(1);
        io::write_any(available + 2, 2, state.available.into());
        descriptors + 16 * u64::from(head)
    }

    pub fn kick(&self, queue: u64) {
        self.write(NOTIFY, queue as u32);
    }

    /// Where the descriptors, the available and the used ring have their entries: something
    /// in them, to be changed.
    pub fn entry(&self, queue: u64, random: &mut Random) -> u64 {
        let [descriptors, available, used] = self.addresses(queue);
        let size = u64::from(self.size(queue));
        match random.below(8) {
            0..5 => descriptors + 2 * random.below(8 * size),
            5 | 6 => available + 2 * random.below(3 + size),
            _ => used + 2 * random.below(3 + 4 * size),
        }
    }
}
