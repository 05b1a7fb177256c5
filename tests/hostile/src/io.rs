//! Ports, and memory that devices share. In this program all of memory that is not its own
//! image may be touched at any time, so these are safe.

use core::arch::asm;

use crate::layout::ARENA;

const SERIAL: u16 = 0x3f8;

/// An access of a port.
pub fn read_port(port: u16, size: u8) -> u32 {
    let value: u32;
    // SAFETY: reaches no memory.
    unsafe {
        match size {
            1 => asm!("in al, dx", "movzx eax, al", out("eax") value, in("dx") port),
            2 => asm!("in ax, dx", "movzx eax, ax", out("eax") value, in("dx") port),
            _ => asm!("in eax, dx", out("eax") value, in("dx") port),
        }
    }
    value
}

/// An access of a port.
pub fn write_port(port: u16, size: u8, value: u32) {
    // SAFETY: reaches no memory.
    unsafe {
        match size {
            1 => asm!("out dx, al", in("dx") port, in("eax") value),
            2 => asm!("out dx, ax", in("dx") port, in("eax") value),
            _ => asm!("out dx, eax", in("dx") port, in("eax") value),
        }
    }
}

/// `count` accesses of a port by one instruction, to memory at an address.
pub fn read_ports(port: u16, size: u8, at: u64, count: u64) {
    // SAFETY: the caller gives memory that is nobody's.
    unsafe {
        match size {
            1 => asm!("rep insb", in("dx") port, inout("rdi") at => _, inout("rcx") count => _),
            2 => asm!("rep insw", in("dx") port, inout("rdi") at => _, inout("rcx") count => _),
            _ => asm!("rep insd", in("dx") port, inout("rdi") at => _, inout("rcx") count => _),
        }
    }
}

/// `count` accesses of a port by one instruction, from memory at an address.
pub fn write_ports(port: u16, size: u8, at: u64, count: u64) {
    // SAFETY: only reads memory.
    unsafe {
        match size {
            1 => asm!("rep outsb", in("dx") port, inout("rsi") at => _, inout("rcx") count => _),
            2 => asm!("rep outsw", in("dx") port, inout("rsi") at => _, inout("rcx") count => _),
            _ => asm!("rep outsd", in("dx") port, inout("rsi") at => _, inout("rcx") count => _),
        }
    }
}

macro_rules! accesses {
    ($read:ident $write:ident $type:ty) => {
        /// Reads memory or a register.
        pub fn $read(at: u64) -> $type {
            // SAFETY: mapped, and shared with devices only.
            unsafe { (at as *const $type).read_volatile() }
        }
        /// Writes memory or a register.
        pub fn $write(at: u64, value: $type) {
            // SAFETY: mapped, and shared with devices only.
            unsafe { (at as *mut $type).write_volatile(value) }
        }
    };
}
accesses!(read8 write8 u8);
accesses!(read32 write32 u32);

/// Reads of any size, also 16 bytes, at any address.
pub fn read_any(at: u64, size: u8) {
    // SAFETY: mapped, and shared with devices only.
    unsafe {
        match size {
            1 => asm!("mov al, [{}]", in(reg) at, out("al") _),
            2 => asm!("mov ax, [{}]", in(reg) at, out("ax") _),
            4 => asm!("mov eax, [{}]", in(reg) at, out("eax") _),
            8 => asm!("mov rax, [{}]", in(reg) at, out("rax") _),
            _ => asm!("movups xmm0, [{}]", in(reg) at, out("xmm0") _),
        }
    }
}

/// Writes of any size, also 16 bytes, at any address.
pub fn write_any(at: u64, size: u8, value: u64) {
    // SAFETY: mapped, and shared with devices only.
    unsafe {
        match size {
            1 => asm!("mov [{}], al", in(reg) at, in("rax") value),
            2 => asm!("mov [{}], ax", in(reg) at, in("rax") value),
            4 => asm!("mov [{}], eax", in(reg) at, in("rax") value),
            8 => asm!("mov [{}], rax", in(reg) at, in("rax") value),
            _ => {
                asm!("movq xmm0, rax", "movups [{}], xmm0", in(reg) at, in("rax") value, out("xmm0") _)
            }
        }
    }
}

/// Reads and writes at once, by one instruction.
pub fn exchange(at: u64, value: u32) {
    // SAFETY: mapped, and shared with devices only.
    unsafe { asm!("lock xadd [{}], eax", in(reg) at, inout("eax") value => _) }
}

/// Copies by one instruction, which KVM splits up.
pub fn copy(to: u64, from: u64, len: u64) {
    // SAFETY: mapped, and shared with devices only.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _)
    }
}

/// Prints on the serial port, as its driver should.
pub fn print(text: &str) {
    const LINE_STATUS: u16 = SERIAL + 5;
    const EMPTY: u32 = 1 << 5;
    for byte in text.bytes() {
        while read_port(LINE_STATUS, 1) & EMPTY == 0 {}
        write_port(SERIAL, 1, byte.into());
    }
}

/// Prints what a register of the serial port holds, as often as it was read, with an
/// instruction for each direction.
pub fn print_strings() {
    const SCRATCH: u16 = SERIAL + 7;
    const TIMES: u64 = 16;
    write_port(SCRATCH, 1, b'x'.into());
    read_ports(SCRATCH, 1, ARENA, TIMES);
    write_ports(SERIAL, 1, ARENA, TIMES);
}

/// Makes the serial port as it was at first, whatever was done to it.
pub fn reset_serial() {
    for (register, value) in [(3, 0x03), (1, 0), (4, 0x08), (2, 0)] {
        write_port(SERIAL + register, 1, value);
    }
}

/// Prints a decimal number.
pub fn print_number(mut number: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    print(core::str::from_utf8(&digits[at..]).unwrap_or_default());
}
