//! What a good driver asks of each kind of device, more or less.

use crate::io::{write_any, write8, write32};
use crate::layout::DATA;
use crate::random::Random;
use crate::virtio::{CONFIG, Device, Parts};

const NET: u32 = 1;
const BLOCK: u32 = 2;
const CONSOLE: u32 = 3;
const RNG: u32 = 4;
const BALLOON: u32 = 5;
const VSOCK: u32 = 19;

/// Room for a request, of 64 KiB.
fn room(device: &Device, random: &mut Random) -> u64 {
    device.share + DATA + random.below(7) * (64 << 10)
}

fn write_all(at: u64, bytes: &[u8]) {
    for (at, &byte) in (at..).zip(bytes) {
        write8(at, byte);
    }
}

/// A request, and the queue that it belongs in.
pub fn request(device: &Device, random: &mut Random) -> (u64, Parts) {
    let at = room(device, random);
    match device.kind {
        NET => net(device, random, at),
        BLOCK => block(device, random, at),
        CONSOLE => console(device, random, at),
        RNG => (
            0,
            Parts::default().writable(at, 1 + random.below(4096) as u32),
        ),
        BALLOON => balloon(device, random, at),
        VSOCK => vsock(device, random, at),
        _ => (
            random.below(device.count.max(1)),
            Parts::default().writable(at, 64),
        ),
    }
}

fn block(device: &Device, random: &mut Random, at: u64) -> (u64, Parts) {
    const READ: u32 = 0;
    const WRITE: u32 = 1;
    const FLUSH: u32 = 4;
    const GET_ID: u32 = 8;
    const DISCARD: u32 = 11;
    const ZEROES: u32 = 13;
    let kind = random.pick(&[READ, READ, WRITE, WRITE, FLUSH, GET_ID, DISCARD, ZEROES]);
    let sector = match random.below(8) {
        0 => random.odd(),
        _ => random.below(16 << 10),
    };
    let (header, data, status) = (at, at + 0x1000, at + 0x800);
    write32(header, kind);
    write32(header + 4, 0);
    write_any(header + 8, 8, sector);
    let len = 512 * (1 + random.below(16)) as u32;
    let parts = Parts::default().readable(header, 16);
    let parts = match kind {
        READ => parts.writable(data, len),
        WRITE if random.one_in(2) => parts.readable(data, len).readable(data + 0x4000, 512),
        WRITE => parts.readable(data, len),
        GET_ID => parts.writable(data, 20),
        DISCARD | ZEROES => {
            write_any(data, 8, sector);
            write32(data + 8, random.below(512) as u32);
            write32(data + 12, random.pick(&[0, 0, 1, 2]));
            parts.readable(data, 16)
        }
        _ => parts,
    };
    (random.below(device.count.max(1)), parts.writable(status, 1))
}

fn net(device: &Device, random: &mut Random, at: u64) -> (u64, Parts) {
    const HEADER: u64 = 12;
    /// Of the gateway of a user network: any will do.
    const FRAMES: [&[u8]; 4] = [
        // ARP: who has 10.0.2.2?
        b"\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\x01\x08\x06\0\x01\x08\0\x06\x04\0\x01\x02\0\0\0\0\x01\x0a\0\x02\x0f\0\0\0\0\0\0\x0a\0\x02\x02",
        // A UDP packet to port 53 of 10.0.2.2, which asks for the name `a`.
        b"\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\x01\x08\0\x45\0\0\x2f\0\0\0\0\x40\x11\x62\x9d\x0a\0\x02\x0f\x0a\0\x02\x02\x10\0\0\x35\0\x1b\0\0\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\0\0\x01\0\x01",
        // TCP: SYN to port 9 of 10.0.2.2.
        b"\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\x01\x08\0\x45\0\0\x28\0\0\0\0\x40\x06\x62\xaf\x0a\0\x02\x0f\x0a\0\x02\x02\x10\x01\0\x09\0\0\0\x01\0\0\0\0\x50\x02\x20\0\0\0\0\0",
        // IPv6, hop by hop.
        b"\x33\x33\0\0\0\x01\x02\0\0\0\0\x01\x86\xdd\x60\0\0\0\0\x08\0\xff\xfe\x80\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\xff\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x3a\0\x05\x02\0\0\0\0",
    ];
    let pairs = (device.count / 2).max(1);
    let pair = 2 * random.below(pairs);
    match random.below(8) {
        0 if device.count % 2 == 1 => {
            write32(at, 4 | (random.below(4) as u32) << 16);
            (
                device.count - 1,
                Parts::default().readable(at, 4).writable(at + 16, 1),
            )
        }
        0..3 => {
            let len = random.pick(&[64, 1526, 4096, 65562]);
            (pair, Parts::default().writable(at, len))
        }
        _ => {
            write_all(at, &[0; HEADER as usize]);
            if random.one_in(4) {
                write8(at + random.below(HEADER), random.next() as u8);
            }
            let frame = random.pick(&FRAMES);
            write_all(at + HEADER, frame);
            for _ in 0..random.below(4) {
                write8(at + HEADER + random.below(64), random.odd() as u8);
            }
            let len = match random.below(4) {
                0 => random.below(2000),
                _ => HEADER + frame.len() as u64,
            };
            let parts = Parts::default();
            (
                pair + 1,
                match random.one_in(2) {
                    true => parts
                        .readable(at, HEADER as u32)
                        .readable(at + HEADER, len as u32),
                    false => parts.readable(at, len.max(HEADER) as u32),
                },
            )
        }
    }
}

/// Of both kinds: those of channels have control messages.
fn console(device: &Device, random: &mut Random, at: u64) -> (u64, Parts) {
    let queue = random.below(device.count.max(1));
    let parts = Parts::default();
    match (queue, queue % 2) {
        (3, _) => {
            let event = random.pick(&[0, 0, 3, 3, 6, 6, 1, 7, 9]);
            write32(at, random.pick(&[0, 1, 1, 2, 2, 3, u32::MAX]));
            write32(at + 4, event | random.pick(&[1, 1, 1, 0, 7]) << 16);
            (queue, parts.readable(at, 8))
        }
        (_, 0) => (queue, parts.writable(at, random.pick(&[1, 80, 4096]))),
        _ => {
            let text = random.pick(&[&b"text\n"[..], b"\x1b[2J", b"\0\xff\r"]);
            write_all(at, text);
            let len = match random.below(32) {
                0 => 60 << 10,
                1 => 4096,
                _ => text.len() as u32,
            };
            (queue, parts.readable(at, len))
        }
    }
}

fn balloon(device: &Device, random: &mut Random, at: u64) -> (u64, Parts) {
    let queue = random.below(device.count.max(1));
    let parts = Parts::default();
    match queue {
        0 | 1 => {
            let pages = 1 + random.below(300);
            // Of the device's own data, mostly.
            let first = (device.share + DATA) >> 12;
            for number in 0..pages {
                let page = match random.below(64) {
                    0 => random.next() | 1 << 20, // no memory
                    _ => first + random.below(DATA >> 12),
                };
                write32(at + 4 * number, page as u32);
            }
            (queue, parts.readable(at, 4 * pages as u32))
        }
        2 => {
            for number in 0..8 {
                write_any(at + 10 * number, 2, random.below(20));
                write_any(at + 10 * number + 2, 8, random.odd());
            }
            (queue, parts.readable(at, 80))
        }
        _ => {
            let other = room(device, random);
            (queue, parts.writable(at, 64 << 10).writable(other, 4096))
        }
    }
}

fn vsock(device: &Device, random: &mut Random, at: u64) -> (u64, Parts) {
    let parts = Parts::default();
    if random.one_in(4) {
        let len = random.pick(&[45, 4096, 65536]);
        return (random.pick(&[0, 0, 0, 2]), parts.writable(at, len));
    }
    const HOST: u64 = 2;
    let own = device.read(CONFIG);
    let len = random.pick(&[0, 1, 100, 4096, 65000]);
    write_any(at, 8, own.into());
    write_any(
        at + 8,
        8,
        if random.one_in(16) {
            random.odd()
        } else {
            HOST
        },
    );
    write32(at + 16, 1024 + random.below(8) as u32);
    // The tests listen on the first one, and not on the others.
    write32(
        at + 20,
        random.pick(&[1000, 1000, 1000, 1001, u32::MAX, 1 << 30]),
    );
    write32(at + 24, len);
    let op = random.pick(&[1, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7, 0, 9]);
    write32(at + 28, 1 | op << 16);
    write32(at + 32, random.pick(&[0, 0, 1, 2, 3, u32::MAX]));
    write32(at + 36, random.pick(&[0, 1, 4096, 1 << 18, u32::MAX]));
    write32(at + 40, random.odd() as u32);
    (
        1,
        match random.one_in(3) {
            true => parts.readable(at, 44).readable(at + 0x1000, len),
            false => parts.readable(at, 44 + len.min(60000)),
        },
    )
}
