//! Where things are: `boot/src/layout.rs` has most of it.

use crate::random::Random;

/// This program is below, and nothing that a device may write to.
pub const ARENA: u64 = 16 << 20;
/// What the tests give this guest: RAM up to the hole, and some behind it.
pub const HOLE: u64 = 3 << 30;
pub const HIGH: u64 = 4 << 30;
pub const HIGH_END: u64 = HIGH + (64 << 20);

/// The virtio-mmio devices.
pub const DEVICES: u64 = 0xd000_0000;
pub const DEVICE: u64 = 0x1000;
pub const DEVICES_MAX: usize = 18;
const APIC: u64 = 0xfee0_0000;
const IO_APIC: u64 = 0xfec0_0000;

/// Each device's queues and data, in the arena.
pub const SHARE: u64 = 1 << 20;
/// Where the data begin.
pub const DATA: u64 = SHARE / 2;

/// An address for a device to read from, or to write to.
pub fn address(random: &mut Random, share: u64) -> u64 {
    let small = random.below(0x4000);
    match random.below(20) {
        0..8 => share + DATA + random.below(DATA),
        8..11 => share + random.below(DATA), // queues
        11 => ARENA + random.below(DEVICES_MAX as u64 * SHARE),
        12 => HOLE - 1 - small,
        13 => HOLE + random.below(HIGH - HOLE),
        14 => DEVICES + random.below(DEVICES_MAX as u64 * DEVICE),
        15 => random.pick(&[APIC, IO_APIC]) + small,
        16 => HIGH + small,
        17 => HIGH_END - 1 - small,
        18 => u64::MAX - small,
        _ => random.next() | 1 << 40,
    }
}

/// A length that goes with it.
pub fn length(random: &mut Random) -> u32 {
    match random.below(10) {
        0..3 => random.below(4096) as u32,
        3 => 0,
        4 => 1,
        5 => random.pick(&[511, 512, 4095, 4096, 65535, 65536]),
        6 => random.below(1 << 20) as u32,
        7 => random.below(64 << 20) as u32,
        _ => random.odd() as u32,
    }
}
