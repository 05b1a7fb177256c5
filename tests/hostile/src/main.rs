//! A guest that attacks its machine: it drives each device as it should, and then not,
//! as the numbers that follow from a seed say. On the command line: the first `seed`,
//! their `count`, and after how many of them it tells which is next (`tell`); or `flood`;
//! and whether a second CPU does so, too (`both`). Or what is no attack: `work`, and so
//! much, or `strings`.

#![no_std]
#![no_main]

mod attack;
mod io;
mod layout;
mod random;
mod requests;
mod start;
mod virtio;

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use attack::Devices;
use random::Random;

/// Ports, and what is written there (boot/src/layout.rs).
const GUEST_STATUS: u16 = 0xb05;
const SLEEP_CONTROL: u16 = 0xb00;
const SOFT_OFF: u32 = 5 << 2 | 1 << 5;

/// What this guest says of its work: all seeds are done …
const DONE: u32 = 42;
/// … or it is broken, as a device wrote where it was not told to.
pub const BROKEN: u32 = 1;

/// Linux' `boot_params`: where the command line is.
const CMD_LINE_PTR: u64 = 0x228;

/// The number behind a word and `=` on the command line.
fn number(cmdline: u64, word: &[u8]) -> Option<u64> {
    let mut at = cmdline;
    while io::read8(at) != 0 {
        let matches = (at..).zip(word).all(|(at, &byte)| io::read8(at) == byte);
        if matches {
            let digits = (at + word.len() as u64 + 1..).map(io::read8);
            let digits = digits.take_while(u8::is_ascii_digit);
            return Some(digits.fold(0, |all, digit| all * 10 + u64::from(digit - b'0')));
        }
        at += 1;
    }
    None
}

pub fn run(zero_page: u64) -> ! {
    let cmdline = io::read32(zero_page + CMD_LINE_PTR).into();
    let word = |word, default| number(cmdline, word).unwrap_or(default);
    let (first, count, tell) = (word(b"seed", 0), word(b"count", 1), word(b"tell", 32));
    let flood = number(cmdline, b"flood").is_some();
    if let Some(work) = number(cmdline, b"work") {
        let mut random = Random::new(0);
        let sum = (0..work).fold(0, |sum, _| sum ^ random.next());
        io::print_number(sum);
        end(DONE);
    }
    if number(cmdline, b"strings").is_some() {
        io::print_strings();
        end(DONE);
    }

    let mut devices = Devices::find();
    io::print("\nhostile: devices ");
    io::print_number(devices.count());
    io::print("\n");
    if number(cmdline, b"both").is_some() {
        FLOOD.store(flood, Ordering::Relaxed);
        start::start_other();
        // It looks for devices before anything is done to them.
        while BESIDE.load(Ordering::Relaxed) == 0 {}
    }
    if flood {
        devices.flood();
    }
    for seed in first..first + count {
        if (seed - first).is_multiple_of(tell.max(1)) {
            io::print("\nhostile: seed ");
            io::print_number(seed);
            io::print("\n");
        }
        devices.attack(seed);
    }
    if number(cmdline, b"both").is_some() {
        io::print("\nhostile: attacks beside ");
        io::print_number(BESIDE.load(Ordering::Relaxed));
    }
    io::print("\nhostile: done\n");
    end(DONE)
}

/// What the second CPU has done so far.
static BESIDE: AtomicU64 = AtomicU64::new(0);
/// It is to flood.
static FLOOD: AtomicBool = AtomicBool::new(false);

/// The second CPU: for ever, attacks the devices that the first one is attacking.
pub fn beside() -> ! {
    let mut devices = Devices::find();
    let mut random = Random::new(u64::MAX);
    if FLOOD.load(Ordering::Relaxed) {
        BESIDE.store(1, Ordering::Relaxed);
        devices.flood();
    }
    loop {
        BESIDE.fetch_add(1, Ordering::Relaxed);
        devices.attack_beside(&mut random);
    }
}

/// Turns the machine off.
pub fn end(status: u32) -> ! {
    io::write_port(GUEST_STATUS, 1, status);
    loop {
        io::write_port(SLEEP_CONTROL, 1, SOFT_OFF);
    }
}
