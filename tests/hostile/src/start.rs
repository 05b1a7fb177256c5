//! From the 64-bit entry of Linux' boot protocol to [`crate::run`]: a stack, SSE, which
//! compiled code uses, and tables of this program's own, as devices may write over those
//! that the monitor left in low memory.

use core::arch::{asm, global_asm};
use core::ptr::{addr_of, addr_of_mut};

use crate::io;

global_asm!(
    ".globl _start",
    "_start:",
    "cli",
    "mov %cr0, %rax",
    "and $~(1 << 2), %rax", // EM: SSE is emulated
    "or $(1 << 1), %rax",   // MP
    "mov %rax, %cr0",
    "mov %cr4, %rax",
    "or $(3 << 9), %rax", // OSFXSR, OSXMMEXCPT
    "mov %rax, %cr4",
    "lea {stack} + {stack_len}(%rip), %rsp",
    "xor %ebp, %ebp",
    "mov %rsi, %rdi",
    "call {start}",
    "ud2",
    // One entry for each exception, of 16 bytes. Some have pushed an error code.
    ".balign 16",
    "exceptions:",
    ".set vector, 0",
    ".rept {exceptions}",
    ".balign 16",
    "mov $vector, %edi",
    "jmp 1f",
    ".set vector, vector + 1",
    ".endr",
    "1:",
    "mov (%rsp), %rsi",
    "mov 8(%rsp), %rdx",
    "and $-16, %rsp",
    "call {exception}",
    "ud2",
    stack = sym STACK,
    stack_len = const STACK_LEN,
    start = sym start,
    exceptions = const EXCEPTIONS,
    exception = sym exception,
    options(att_syntax)
);

// What another CPU begins with, in real mode, at the start of a page below 1 MiB (Intel SDM
// volume 3, 9.4): straight to 64 bits, with this program's tables.
global_asm!(
    ".code16",
    "trampoline:",
    "cli",
    "lgdtl %cs:(1f - trampoline)",
    "mov $0x620, %eax", // PAE, OSFXSR, OSXMMEXCPT
    "mov %eax, %cr4",
    "mov ${tables}, %eax",
    "mov %eax, %cr3",
    "mov $0xc0000080, %ecx", // EFER: LME
    "mov $0x100, %eax",
    "xor %edx, %edx",
    "wrmsr",
    "mov $0x80000003, %eax", // PG, MP, PE
    "mov %eax, %cr0",
    "ljmpl ${code}, $2f",
    "1:",
    ".word {gdt_len} - 1",
    ".long {gdt}",
    "trampoline_end:",
    ".code64",
    "2:",
    "mov ${data}, %eax",
    "mov %eax, %ds",
    "mov %eax, %es",
    "mov %eax, %ss",
    "lea {stack} + {stack_len}(%rip), %rsp",
    "xor %ebp, %ebp",
    "call {start}",
    "ud2",
    tables = sym PML4,
    gdt = sym GDT,
    gdt_len = const size_of::<[u64; 4]>(),
    code = const CODE,
    data = const DATA,
    stack = sym OTHER_STACK,
    stack_len = const STACK_LEN,
    start = sym other,
    options(att_syntax)
);

const STACK_LEN: usize = 64 << 10;
const EXCEPTIONS: usize = 32;
const PAGE: usize = 4096;
const ENTRIES: usize = PAGE / 8;
/// As much as the tables below map: RAM, the hole, and RAM again.
const DIRECTORIES: usize = 5;

#[repr(C, align(4096))]
struct Page<T>(T);

static mut STACK: Page<[u8; STACK_LEN]> = Page([0; STACK_LEN]);
static mut OTHER_STACK: Page<[u8; STACK_LEN]> = Page([0; STACK_LEN]);
static mut PML4: Page<[u64; ENTRIES]> = Page([0; ENTRIES]);
static mut PDPT: Page<[u64; ENTRIES]> = Page([0; ENTRIES]);
static mut DIRECTORY: Page<[[u64; ENTRIES]; DIRECTORIES]> = Page([[0; ENTRIES]; DIRECTORIES]);
/// Null, null, code, data: as Linux' boot protocol has them.
static mut GDT: Page<[u64; 4]> = Page([0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
static mut IDT: Page<[[u64; 2]; EXCEPTIONS]> = Page([[0; 2]; EXCEPTIONS]);

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;
const CODE: u64 = 0x10;
const DATA: u64 = 0x18;
/// Present, and an interrupt gate (Intel SDM volume 3, 6.14.1).
const GATE: u64 = 0x8e00;

/// What LGDT and LIDT take.
#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

unsafe extern "C" {
    static exceptions: [u8; 16 * EXCEPTIONS];
    static trampoline: u8;
    static trampoline_end: u8;
}

extern "C" fn start(zero_page: u64) -> ! {
    // SAFETY: this program's one thread makes its tables, which map all as it was, and
    // describe the same segments.
    unsafe {
        let table = |page: *const u8| page as u64 | PRESENT_WRITABLE;
        (*addr_of_mut!(PML4)).0[0] = table(addr_of!(PDPT).cast());
        for gib in 0..DIRECTORIES {
            let directory = addr_of_mut!(DIRECTORY.0[gib]);
            (*addr_of_mut!(PDPT)).0[gib] = table(directory.cast());
            for entry in 0..ENTRIES {
                let page = (gib * ENTRIES + entry) as u64 * LARGE_PAGE;
                (*directory)[entry] = page | PRESENT_WRITABLE | LARGE;
            }
        }
        asm!("mov cr3, {}", in(reg) addr_of!(PML4) as u64);
        for vector in 0..EXCEPTIONS {
            let at = addr_of!(exceptions) as u64 + 16 * vector as u64;
            let low = at & 0xffff | CODE << 16 | GATE << 32 | (at >> 16 & 0xffff) << 48;
            (*addr_of_mut!(IDT)).0[vector] = [low, at >> 32];
        }
        let pointer = Pointer {
            limit: (size_of_val(&*addr_of!(GDT.0)) - 1) as u16,
            base: addr_of!(GDT) as u64,
        };
        asm!("lgdt [{}]", in(reg) &pointer);
    }
    take_exceptions();
    crate::run(zero_page)
}

fn take_exceptions() {
    let pointer = Pointer {
        limit: (size_of::<[[u64; 2]; EXCEPTIONS]>() - 1) as u16,
        base: addr_of!(IDT) as u64,
    };
    // SAFETY: `start` has made the table.
    unsafe { asm!("lidt [{}]", in(reg) &pointer) };
}

/// Starts the other CPU, which runs [`crate::beside`].
pub fn start_other() {
    const PAGE: u64 = 0x4_0000; // where nothing is
    const APIC: u64 = 0xfee0_0000;
    const SPURIOUS: u64 = APIC + 0xf0;
    const ENABLED: u32 = 0x1ff;
    const COMMAND: u64 = APIC + 0x300;
    const TO_THE_SECOND: u32 = 1 << 24;
    const INIT: u32 = 0x4500;
    const STARTUP: u32 = 0x4600;
    let (from, end) = (addr_of!(trampoline) as u64, addr_of!(trampoline_end) as u64);
    io::copy(PAGE, from, end - from);
    // Until the first APIC is turned on, KVM does not know of the others.
    io::write32(SPURIOUS, ENABLED);
    for command in [INIT, STARTUP | (PAGE >> 12) as u32] {
        io::write32(COMMAND + 0x10, TO_THE_SECOND);
        io::write32(COMMAND, command);
    }
}

extern "C" fn other() -> ! {
    take_exceptions();
    crate::beside()
}

/// Nothing here causes one: a device has written over this program.
extern "C" fn exception(vector: u64, first: u64, second: u64) -> ! {
    io::print("\nhostile: exception ");
    io::print_number(vector);
    for word in [first, second] {
        io::print(" ");
        io::print_number(word);
    }
    crate::end(crate::BROKEN)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    io::print("\nhostile: panic at line ");
    io::print_number(info.location().map_or(0, |location| location.line().into()));
    crate::end(crate::BROKEN)
}

/// What `core`, which is built to unwind, names; nothing here does.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// What the compiler calls.
mod memory {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _)
        };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= len {
            // SAFETY: the caller's promise.
            return unsafe { memcpy(to, from, len) };
        }
        // SAFETY: the caller's promise; from the end, as they overlap.
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rcx") len => _,
                 inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
                 inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _)
        };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") value as u8)
        };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, len: usize) -> i32 {
        for at in 0..len {
            // SAFETY: the caller's promise.
            let (one, other) =
                unsafe { (one.add(at).read_volatile(), other.add(at).read_volatile()) };
            if one != other {
                return i32::from(one) - i32::from(other);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, len: usize) -> i32 {
        // SAFETY: the caller's promise.
        unsafe { memcmp(one, other, len) }
    }
}
