//! The first vCPU's state at the kernel's entry.
//!
//! Registers are Intel SDM volume 3: control registers in 2.5, segment
//! descriptors in 3.4.5, page tables in 4.5.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::layout::{
    BOOT_STACK, GDT, PAGE_DIRECTORIES, PDPT, PML4, PVH_START_INFO, RESET, RESET_VALUE,
    RESET_VECTOR, ZERO_PAGE,
};
use crate::loaded::{Kernel, Protocol};
use crate::machine::{BootError, writing};

/// Linux' `__BOOT_CS`.
const CODE_SELECTOR: u16 = 0x10;
/// Linux' `__BOOT_DS`.
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
/// Null, null, code, data, and a task state that takes two in long mode.
const GDT_ENTRIES: u16 = 6;
const GDT_ENTRY_LEN: u16 = 8;

const TYPE_CODE: u8 = 0xb; // execute, read, accessed
const TYPE_DATA: u8 = 0x3; // read, write, accessed
const TYPE_TSS_BUSY: u8 = 0xb; // 32- or 64-bit task state in use
const TSS_LIMIT: u32 = 0x67;

const RFLAGS_RESERVED: u64 = 1 << 1;
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PTE_PRESENT: u64 = 1 << 0;
const PTE_WRITABLE: u64 = 1 << 1;
const PTE_LARGE: u64 = 1 << 7;
const PTES: usize = 512;
const DIRECTORIES: usize = 4;
const LARGE_PAGE: u64 = 2 << 20;

/// A segment register, with the part that the descriptor fills in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The first linear address.
    pub base: u64,
    /// The last offset, in bytes.
    pub limit: u32,
    /// The selector.
    pub selector: u16,
    /// The descriptor's type.
    pub type_: u8,
    /// The segment is present.
    pub present: bool,
    /// The privilege level.
    pub dpl: u8,
    /// The default operand size is 32 bits.
    pub db: bool,
    /// A code or data segment rather than a system one.
    pub s: bool,
    /// A 64-bit code segment.
    pub l: bool,
    /// The descriptor's limit counts pages.
    pub g: bool,
    /// Available for use by system software (Intel SDM, volume 3, 3.4.5).
    pub avl: bool,
}

impl Segment {
    fn flat(selector: u16, type_: u8) -> Self {
        Segment {
            limit: u32::MAX,
            selector,
            type_,
            present: true,
            s: true,
            g: true,
            ..Default::default()
        }
    }

    /// The segment's entry in the descriptor table.
    fn descriptor(&self) -> u64 {
        let limit = u64::from(if self.g { self.limit >> 12 } else { self.limit });
        let flag = |set: bool, bit: u32| u64::from(set) << bit;
        limit & 0xffff
            | (self.base & 0xff_ffff) << 16
            | u64::from(self.type_ & 0xf) << 40
            | flag(self.s, 44)
            | u64::from(self.dpl & 0b11) << 45
            | flag(self.present, 47)
            | (limit >> 16 & 0xf) << 48
            | flag(self.avl, 52)
            | flag(self.l, 53)
            | flag(self.db, 54)
            | flag(self.g, 55)
            | (self.base >> 24 & 0xff) << 56
    }
}

/// The registers at the kernel's entry; those not named are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// The first instruction.
    pub rip: u64,
    /// The stack.
    pub rsp: u64,
    /// Linux: the zero page.
    pub rsi: u64,
    /// PVH: the start info.
    pub rbx: u64,
    /// The flags; interrupts are off.
    pub rflags: u64,
    /// Protection and paging.
    pub cr0: u64,
    /// The page tables.
    pub cr3: u64,
    /// Paging extensions.
    pub cr4: u64,
    /// Long mode.
    pub efer: u64,
    /// The descriptor table.
    pub gdt_base: u64,
    /// Its last byte's offset.
    pub gdt_limit: u16,
    /// CS.
    pub code: Segment,
    /// DS, ES, FS, GS and SS.
    pub data: Segment,
    /// TR.
    pub tss: Segment,
}

/// Writes the descriptor table, and returns the state that goes with it.
pub(crate) fn write_entry_state<M: GuestMemoryBackend>(
    mem: &M,
    kernel: &Kernel,
) -> Result<EntryState, BootError> {
    let state = entry_state(kernel);
    let gdt: [u64; GDT_ENTRIES as usize] = [
        0,
        0,
        state.code.descriptor(),
        state.data.descriptor(),
        state.tss.descriptor(),
        state.tss.base >> 32,
    ];
    mem.write_obj(gdt, GuestAddress(GDT))
        .map_err(writing("the descriptor table"))?;
    Ok(state)
}

fn entry_state(kernel: &Kernel) -> EntryState {
    let code = Segment::flat(CODE_SELECTOR, TYPE_CODE);
    let data = Segment {
        db: true,
        ..Segment::flat(DATA_SELECTOR, TYPE_DATA)
    };
    let tss = Segment {
        limit: TSS_LIMIT,
        selector: TSS_SELECTOR,
        type_: TYPE_TSS_BUSY,
        present: true,
        ..Default::default()
    };
    let common = EntryState {
        rip: kernel.entry,
        rsp: BOOT_STACK,
        rsi: 0,
        rbx: 0,
        rflags: RFLAGS_RESERVED,
        cr0: CR0_PE | CR0_ET,
        cr3: 0,
        cr4: 0,
        efer: 0,
        gdt_base: GDT,
        gdt_limit: GDT_ENTRIES * GDT_ENTRY_LEN - 1,
        code,
        data,
        tss,
    };
    match kernel.protocol {
        Protocol::Linux64 => EntryState {
            rsi: ZERO_PAGE,
            cr0: common.cr0 | CR0_PG,
            cr3: PML4,
            cr4: CR4_PAE,
            efer: EFER_LME | EFER_LMA,
            code: Segment { l: true, ..code },
            ..common
        },
        Protocol::Pvh => EntryState {
            rbx: PVH_START_INFO,
            code: Segment { db: true, ..code },
            ..common
        },
    }
}

/// Writes what stands in for firmware: Linux restarts by it where ACPI's
/// platform is hardware-reduced and has no EFI. It runs in real mode.
pub(crate) fn write_reset_vector<M: GuestMemoryBackend>(mem: &M) -> Result<(), BootError> {
    let [low, high] = RESET.to_le_bytes();
    let code = [
        0xb0,
        RESET_VALUE, // mov al, RESET_VALUE
        0xba,
        low,
        high, // mov dx, RESET
        0xee, // out dx, al
        0xf4, // hlt
        0xeb,
        0xfd, // jmp to hlt
    ];
    mem.write_slice(&code, GuestAddress(RESET_VECTOR))
        .map_err(writing("the reset vector"))
}

/// Writes page tables that map the first 4 GiB onto themselves.
pub(crate) fn write_page_tables<M: GuestMemoryBackend>(mem: &M) -> Result<(), BootError> {
    const TABLE: usize = PTES * size_of::<u64>();
    let link = PTE_PRESENT | PTE_WRITABLE;
    let mut directories = Vec::with_capacity(DIRECTORIES * TABLE);
    for page in 0..(DIRECTORIES * PTES) as u64 {
        directories.extend((page * LARGE_PAGE | link | PTE_LARGE).to_le_bytes());
    }
    let pointers: [u64; DIRECTORIES] =
        std::array::from_fn(|i| (PAGE_DIRECTORIES + (i * TABLE) as u64) | link);
    mem.write_slice(&directories, GuestAddress(PAGE_DIRECTORIES))
        .and_then(|()| mem.write_obj(pointers, GuestAddress(PDPT)))
        .and_then(|()| mem.write_obj(PDPT | link, GuestAddress(PML4)))
        .map_err(writing("the page tables"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::memory;

    fn kernel(protocol: Protocol) -> Kernel {
        Kernel {
            entry: 0x100_0000,
            protocol,
            start: 0,
            end: 0,
            header: None,
        }
    }

    #[test]
    fn descriptors_are_the_well_known_ones() {
        let long = entry_state(&kernel(Protocol::Linux64));
        assert_eq!(long.code.descriptor(), 0x00af_9b00_0000_ffff);
        assert_eq!(long.data.descriptor(), 0x00cf_9300_0000_ffff);
        assert_eq!(long.tss.descriptor(), 0x0000_8b00_0000_0067);
        let flat = entry_state(&kernel(Protocol::Pvh));
        assert_eq!(flat.code.descriptor(), 0x00cf_9b00_0000_ffff);
    }

    #[test]
    fn the_first_4_gib_are_mapped_onto_themselves() {
        let mem = memory(1 << 20);
        write_page_tables(&mem).unwrap();
        let entry = |table: u64, index: u64| -> u64 {
            mem.read_obj(GuestAddress((table & !0xfff) + index * 8))
                .unwrap()
        };
        for addr in [0u64, 0x20_0000, 0x3fff_ffff, 0xd000_0000, 0xffff_ffff] {
            let pdpt = entry(PML4, addr >> 39);
            let directory = entry(pdpt, addr >> 30 & 511);
            let page = entry(directory, addr >> 21 & 511);
            assert_eq!(page, addr & !0x1f_ffff | 0x83);
        }
        assert_eq!(entry(PDPT, 4), 0);
    }
}
