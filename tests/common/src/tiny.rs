//! Guests of a few instructions, which any KVM runs: for what a host does with many VMs, or
//! with one that ends at any moment.

/// What a tiny guest does.
#[derive(Clone, Copy, Debug)]
pub enum Does {
    /// It halts its CPU for ever.
    Halt,
    /// It turns its VM off.
    PowerOff,
}

/// A kernel for it: an ELF file with one segment.
pub fn kernel(does: Does) -> Vec<u8> {
    const AT: u64 = 2 << 20;
    const HEADER: u16 = 64;
    const PROGRAM_HEADER: u16 = 56;
    const CODE: u64 = 4096;
    let code: &[u8] = match does {
        // cli; 1: hlt; jmp 1b
        Does::Halt => &[0xfa, 0xf4, 0xeb, 0xfd],
        // mov dx, 0xb00 (ACPI's sleep control register); mov al, 0x34 (S5, now);
        // out dx, al; 1: hlt; jmp 1b
        Does::PowerOff => &[0x66, 0xba, 0x00, 0x0b, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd],
    };
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut put = |bytes: &[u8]| elf.extend_from_slice(bytes);
    for half in [2u16, 62] {
        put(&half.to_le_bytes()); // ET_EXEC, EM_X86_64
    }
    put(&1u32.to_le_bytes());
    for long in [AT, u64::from(HEADER), 0] {
        put(&long.to_le_bytes()); // the entry, where program headers are, no sections
    }
    put(&0u32.to_le_bytes());
    for half in [HEADER, PROGRAM_HEADER, 1, 64, 0, 0] {
        put(&half.to_le_bytes());
    }
    for word in [1u32, 5] {
        put(&word.to_le_bytes()); // PT_LOAD, to be read and executed
    }
    let len = code.len() as u64;
    for long in [CODE, AT, AT, len, len, CODE] {
        put(&long.to_le_bytes());
    }
    elf.resize(CODE as usize, 0);
    elf.extend_from_slice(code);
    elf
}
