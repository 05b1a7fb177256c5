//! What is done for a seed.

use crate::io;
use crate::layout::{ARENA, DATA, DEVICE, DEVICES, DEVICES_MAX, HIGH, HOLE, address, length};
use crate::random::Random;
use crate::requests::request;
use crate::virtio::{
    ACKNOWLEDGE, ADDRESSES, CONFIG, DRIVER, DRIVER_OK, Device, FEATURES_OK, INTERRUPTS,
    NEEDS_RESET, NOTIFY, STATUS,
};

/// The devices that there are.
pub struct Devices {
    all: [Option<Device>; DEVICES_MAX],
    count: u64,
}

impl Devices {
    pub fn find() -> Self {
        let mut devices = Devices {
            all: [None; DEVICES_MAX],
            count: 0,
        };
        for slot in 0..DEVICES_MAX {
            if let Some(device) = Device::find(slot) {
                devices.all[devices.count as usize] = Some(device);
                devices.count += 1;
            }
        }
        devices
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    fn get(&mut self, index: u64) -> Option<&mut Device> {
        self.all.get_mut(index as usize)?.as_mut()
    }

    /// All kinds of attack take turns; ports and other addresses come round completely
    /// within 3072 seeds.
    pub fn attack(&mut self, seed: u64) {
        let mut random = Random::new(seed);
        match seed % 8 {
            6 => addresses(&mut random),
            7 => ports(seed / 8, &mut random),
            _ => {
                let index = seed % self.count.max(1);
                if let Some(device) = self.get(index) {
                    session(device, &mut random);
                }
                // Two at once may meet in the monitor, or in memory.
                let index = random.below(self.count.max(1));
                if let Some(device) = self.get(index) {
                    session(device, &mut random);
                }
            }
        }
    }

    /// What a CPU does that has no console, while another one attacks: it takes devices
    /// from under the other's requests, and makes its own in the same queues. Addresses
    /// are whole, or else this program would not last long.
    pub fn attack_beside(&mut self, random: &mut Random) {
        let index = random.below(self.count.max(1));
        let Some(device) = self.get(index) else {
            return;
        };
        match random.below(16) {
            0 => start(device, random, 0),
            1 => device.reset(),
            2 => start(device, random, 4),
            3 => configuration(device, random),
            4..6 => register(device, random),
            6..9 => bad_parts(device, random),
            9 => device.write(ACKNOWLEDGE, device.read(INTERRUPTS)),
            10 => device.kick(random.below(device.count + 2)),
            _ => {
                let (queue, parts) = request(device, random);
                device.add(queue, &parts);
                device.kick(queue);
            }
        }
    }

    /// For ever, what costs the monitor most: notifications, interrupts, text, and rules
    /// broken, each of which is a message.
    pub fn flood(&mut self) -> ! {
        let mut random = Random::new(0);
        loop {
            for device in self.all.iter_mut().flatten() {
                if device.read(STATUS) & (DRIVER_OK | NEEDS_RESET) != DRIVER_OK {
                    start(device, &mut random, 0);
                }
                for _ in 0..16 {
                    let (queue, parts) = request(device, &mut random);
                    device.add(queue, &parts);
                    device.kick(queue);
                }
                device.write(ACKNOWLEDGE, device.read(INTERRUPTS));
                if random.one_in(2) {
                    bad_parts(device, &mut random);
                }
            }
            io::write_ports(SERIAL as u16, 1, ARENA, 64);
        }
    }
}

/// How often something is not as it should be: never, or once in so many times.
fn mistakes(random: &mut Random) -> u64 {
    random.pick(&[0, 0, 64, 16, 4])
}

fn wrong(random: &mut Random, mistakes: u64) -> bool {
    mistakes != 0 && random.one_in(mistakes)
}

/// Negotiates, and sets the queues up.
fn start(device: &mut Device, random: &mut Random, mistakes: u64) {
    if !wrong(random, mistakes) {
        device.reset();
    }
    if !wrong(random, mistakes) {
        device.write(STATUS, DRIVER);
    }
    let mut features = device.offered();
    if random.one_in(4) {
        features &= random.next() | 1 << 32;
    }
    if wrong(random, mistakes) {
        features ^= 1 << random.below(64);
    }
    device.accept(features);
    if !wrong(random, mistakes) {
        device.write(STATUS, DRIVER | FEATURES_OK);
    }
    for queue in 0..device.count {
        device.clear(queue);
        let mut size = device.max(queue);
        if random.one_in(8) {
            size >>= random.below(4);
        }
        let mut addresses = device.addresses(queue);
        if wrong(random, mistakes) {
            size = random.odd() as u32;
        }
        if wrong(random, mistakes) {
            addresses[random.below(3) as usize] = queue_address(random, device.share);
        }
        let ready = if wrong(random, mistakes) {
            random.odd() as u32
        } else {
            1
        };
        device.set_up(queue, size, addresses, ready);
        if wrong(random, mistakes) {
            register(device, random);
        }
    }
    if !wrong(random, mistakes) {
        device.write(STATUS, DRIVER | FEATURES_OK | DRIVER_OK);
    }
}

/// None that is below the arena when only its lower half is taken.
fn queue_address(random: &mut Random, share: u64) -> u64 {
    match address(random, share) {
        at if (at as u32) < ARENA as u32 => at | ARENA,
        at => at,
    }
}

/// Starts a device, and uses it: well, badly, or both.
fn session(device: &mut Device, random: &mut Random) {
    let mistakes = mistakes(random);
    // Sometimes it is as the last one has left it.
    if !random.one_in(8) {
        start(device, random, mistakes);
    }
    for _ in 0..4 + random.below(28) {
        if !wrong(random, mistakes) {
            let (queue, parts) = request(device, random);
            device.add(queue, &parts);
            if random.one_in(3) {
                continue; // with the next one
            }
            device.kick(queue);
            continue;
        }
        match random.below(16) {
            0..5 => bad_parts(device, random),
            5..9 => bad_rings(device, random),
            9..12 => register(device, random),
            12 => configuration(device, random),
            13 => {
                for _ in 0..random.below(64) {
                    let queue = random.below(device.count + 2);
                    device.kick(queue);
                }
            }
            14 => start(device, random, mistakes),
            _ => device.write(NOTIFY, random.odd() as u32),
        }
    }
    device.write(ACKNOWLEDGE, device.read(INTERRUPTS));
    if !random.one_in(4) {
        device.reset();
    }
}

/// A request whose parts lie where they should not, or are too long, or the wrong way.
fn bad_parts(device: &mut Device, random: &mut Random) {
    let (queue, mut parts) = request(device, random);
    for part in parts.iter_mut() {
        match random.below(6) {
            0 => part.at = address(random, device.share),
            1 => part.len = length(random),
            2 => part.write = !part.write,
            3 => (part.at, part.len) = (address(random, device.share), length(random)),
            _ => {}
        }
        if part.at < ARENA {
            part.at |= ARENA;
        }
    }
    let queue = if random.one_in(8) {
        random.below(device.count.max(1))
    } else {
        queue
    };
    device.add(queue, &parts);
    device.kick(queue);
}

/// Rings and descriptors that are changed, also while the device reads them: loops, tables
/// that are none, indices that jump.
fn bad_rings(device: &mut Device, random: &mut Random) {
    let (queue, parts) = request(device, random);
    let head = device.add(queue, &parts);
    let changes = 1 + random.below(4);
    let first = random.one_in(2);
    if first {
        device.kick(queue);
    }
    for _ in 0..changes {
        match random.below(8) {
            // Flags and the next one, of one of this chain.
            0..3 => {
                let at = head + 16 * random.below(3) + 12;
                io::write_any(at, 2, random.below(8));
                io::write_any(at + 2, 2, random.below(4));
            }
            // A table of descriptors in another, or in itself.
            3 => {
                let [descriptors, ..] = device.addresses(queue);
                let len = random.pick(&[16, 32, 4096, 17, 0, 1 << 20]);
                io::write_any(head, 8, descriptors + 16 * random.below(4));
                io::write32(head + 8, len);
                io::write_any(head + 12, 2, 4 | random.below(8));
            }
            // The available index.
            4 => {
                let [_, available, _] = device.addresses(queue);
                io::write_any(available + 2, 2, random.next());
            }
            5 => {
                let at = device.entry(queue, random);
                write_entry(device, queue, at, random.below(512));
            }
            _ => {
                let at = device.entry(queue, random);
                write_entry(device, queue, at, random.odd());
            }
        }
    }
    device.kick(queue);
}

/// Writes two bytes of a ring. A descriptor's address stays out of this program, which is
/// below the arena: when a device gets to a descriptor that was changed depends on the host,
/// and it would write there.
fn write_entry(device: &Device, queue: u64, at: u64, value: u64) {
    /// Of a descriptor's 16 bytes, those of bits 16 to 31 of its address.
    const MIDDLE: u64 = 2;
    let [descriptors, available, _] = device.addresses(queue);
    let is_middle = (descriptors..available).contains(&at) && at % 16 == MIDDLE;
    let arena = if is_middle { ARENA >> 16 } else { 0 };
    io::write_any(at, 2, value | arena);
}

/// Any register, in any way.
fn register(device: &Device, random: &mut Random) {
    let register = match random.below(4) {
        0 => random.below(DEVICE),
        _ => 4 * random.below(0x110 / 4),
    };
    let size = random.pick(&[4, 4, 4, 4, 1, 2, 8, 16]);
    if random.one_in(3) {
        return io::read_any(device.base + register, size);
    }
    let mut value = random.odd();
    // The halves of a queue's address, which are together somewhere harmless.
    if (ADDRESSES[0]..CONFIG).contains(&register) {
        value = queue_address(random, device.share) as u32 as u64;
        value |= value << 32;
    }
    match random.one_in(16) {
        true => io::exchange(device.base + register, value as u32),
        false => io::write_any(device.base + register, size, value),
    }
}

fn configuration(device: &Device, random: &mut Random) {
    for _ in 0..8 {
        let end = random.pick(&[80, 80, 80, DEVICE - CONFIG]);
        let at = device.base + CONFIG + random.below(end);
        let size = random.pick(&[1, 2, 4, 8]);
        match random.one_in(2) {
            true => io::read_any(at, size),
            false => io::write_any(at, size, random.odd()),
        }
    }
}

/// Any address without memory, in any size, also across what is there.
fn addresses(random: &mut Random) {
    for _ in 0..48 {
        let at = match random.below(8) {
            0..3 => DEVICES + random.below(DEVICES_MAX as u64 * DEVICE),
            // Across the borders of devices, and of all of them.
            3 | 4 => DEVICES + random.below(DEVICES_MAX as u64 + 1) * DEVICE - random.below(17),
            5 => HOLE - random.below(17),
            6 => HIGH - 1 - random.below(1 << 16), // firmware, on a PC
            _ => HOLE + random.below(HIGH - HOLE),
        };
        let interrupts = 0xfec0_0000..0xfef0_0000;
        if interrupts.contains(&at) {
            // KVM's own: a guest may well end itself there.
            io::read_any(at & !0xf, 4);
            continue;
        }
        let to = ARENA + DEVICES_MAX as u64 * DATA * 2;
        let value = match random.one_in(4) {
            true => random.odd() | ARENA | ARENA << 32,
            false => 0,
        };
        match random.below(12) {
            0 => io::copy(to, at, random.below(64)),
            1 => io::copy(at, to, random.below(64)),
            2 => io::exchange(at, 0),
            3..7 => io::write_any(at, random.pick(&[1, 2, 4, 8, 16]), value),
            _ => io::read_any(at, random.pick(&[1, 2, 4, 8, 16])),
        }
    }
}

// Ports (boot/src/layout.rs).
const PLATFORM: u64 = 0xb00;
const SLEEP_CONTROL: u16 = 0xb00;
const RESET: u16 = 0xb02;
const WATCHDOG: u16 = 0xb20;
const PANIC: u16 = 0x505;
const KEYBOARD: u16 = 0x64;
const SERIAL: u64 = 0x3f8;
const CLOCK: u64 = 0x70;

/// Some of all ports, each in all sizes, and those that matter.
fn ports(block: u64, random: &mut Random) {
    const BLOCK: u64 = 192;
    let to = ARENA + DEVICES_MAX as u64 * DATA * 2;
    for number in 0..BLOCK + 64 {
        let port = match number {
            0..BLOCK => block * BLOCK + number,
            _ => match random.below(4) {
                0 => PLATFORM + random.below(0x28) - 2,
                1 => SERIAL + random.below(10) - 1,
                2 => CLOCK + random.below(3),
                _ => u64::from(random.pick(&[PANIC, KEYBOARD, WATCHDOG])) + random.below(4),
            },
        } as u16;
        let size = random.pick(&[1, 1, 2, 4]);
        io::read_port(port, size);
        if random.one_in(8) {
            io::read_ports(port, size, to, 1 + random.below(64));
        }
        let value = random.odd() as u32;
        // What ends the machine, as it may.
        let ends = match port {
            SLEEP_CONTROL | RESET | KEYBOARD | PANIC => true,
            // What is longer may do so, too.
            _ => (WATCHDOG..WATCHDOG + 4).contains(&port),
        };
        if !ends {
            io::write_port(port, size, value);
            if random.one_in(16) {
                io::write_ports(port, size, to, 1 + random.below(64));
            }
        }
    }
    for port in [SLEEP_CONTROL, RESET, KEYBOARD, PANIC] {
        let value = random.pick(&[0x00, 0x02, 0x04, 0x30, 0x80, 0xf0]);
        io::write_port(port, 1, value);
        io::write_port(port, random.pick(&[2, 4]), random.odd() as u32);
    }
    // A watchdog that has much time, and stops.
    io::write_port(WATCHDOG + 2, 2, 0xff00 | random.next() as u32);
    io::write_port(WATCHDOG, 1, 1);
    io::write_port(WATCHDOG + 1, 1, random.odd() as u32);
    io::write_port(WATCHDOG, random.pick(&[2, 4]), random.odd() as u32);
    io::read_port(WATCHDOG + 2, 2);
    io::write_port(WATCHDOG, 1, 0);
    io::reset_serial();
}
