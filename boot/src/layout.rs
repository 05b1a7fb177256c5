//! Where everything lies in the guest's physical address space.
//!
//! ```text
//!          0 ┌───────────────────────────────┐
//!      0x500 │ GDT                           │
//!     0x6000 │ PVH start_info, modules, map  │
//!     0x7000 │ zero page (boot_params)       │
//!     0x8000 │ boot stack, growing down      │
//!     0x9000 │ PML4, PDPT, four PDs          │ to 0xf000
//!    0x20000 │ command line                  │ 2 KiB
//!    0x9fc00 ├───────────────────────────────┤ reserved from here
//!    0xe0000 │ ACPI: RSDP, then the tables   │
//!    0xfe000 │ VM generation ID              │ a page of its own
//!    0xffff0 │ reset vector                  │
//!   0x100000 ├───────────────────────────────┤ HIMEM_START
//!            │ kernel  …  initial RAM disk   │ RAM
//! 0xc0000000 ├───────────────────────────────┤ MMIO_HOLE_START
//! 0xd0000000 │ virtio-mmio, 4 KiB each       │
//! 0xfec00000 │ I/O APIC                      │
//! 0xfee00000 │ local APIC                    │
//!      4 GiB ├───────────────────────────────┤ MMIO_HOLE_END
//!            │ the rest of RAM               │
//!            └───────────────────────────────┘
//! ```

/// A page of guest memory.
pub const PAGE_SIZE: u64 = 0x1000;

/// The global descriptor table.
pub const GDT: u64 = 0x500;
/// PVH: `hvm_start_info`, followed by its module list and memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH: the module list.
pub const PVH_MODULES: u64 = PVH_START_INFO + 0x40;
/// PVH: the memory map.
pub const PVH_MEMORY_MAP: u64 = PVH_START_INFO + 0x80;
/// Linux: `boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// The first stack pointer; the stack grows down towards the zero page.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The top level of the first page tables.
pub const PML4: u64 = 0x9000;
/// The second level.
pub const PDPT: u64 = 0xa000;
/// The third level: four pages, one a GiB.
pub const PAGE_DIRECTORIES: u64 = 0xb000;
/// The command line.
pub const CMDLINE: u32 = 0x2_0000;
/// The longest command line, with its NUL (Linux' `COMMAND_LINE_SIZE`).
pub const CMDLINE_MAX: u32 = 2048;

/// The end of conventional memory, where the reserved area starts.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The ACPI root pointer, in the area that the BIOS would occupy.
pub const RSDP: u64 = 0xe_0000;
/// The first ACPI table.
pub const ACPI_TABLES: u64 = RSDP + 0x40;
/// The end of the area for ACPI tables.
pub const ACPI_END: u64 = VM_GENERATION;
/// The VM generation ID, alone in its page as its specification wants.
pub const VM_GENERATION: u64 = 0xf_e000;
/// Where a PC's firmware begins, and a kernel that restarts by it jumps to.
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// Where memory above the legacy areas starts, and kernels may.
pub const HIMEM_START: u64 = 0x10_0000;
/// RAM makes room for devices from here …
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// … to here, and continues.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// The first virtio-mmio device; the others follow it.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// The size of a virtio-mmio device's registers.
pub const VIRTIO_MMIO_SIZE: u32 = 0x1000;
/// The I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const APIC: u32 = 0xfee0_0000;

/// The generic event device's interrupt.
pub const GED_IRQ: u32 = 3;
/// The interrupt of the first serial port.
pub const SERIAL_IRQ: u32 = 4;
/// The first virtio device's interrupt.
pub const VIRTIO_FIRST_IRQ: u32 = 5;
/// The clock's interrupt, which no device may take.
pub const RTC_IRQ: u32 = 8;
/// How many virtio-mmio devices there can be: interrupts 5 to 23 without
/// the clock's. (9 is usable: hardware-reduced ACPI has no SCI.)
pub const VIRTIO_MAX: usize = 18;

/// The first serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// How many ports a serial port has.
pub const SERIAL_PORT_LEN: u8 = 8;
/// The clock's index port; its data port follows.
pub const RTC_PORT: u16 = 0x70;
/// The number of the clock's I/O ports.
pub const RTC_PORT_LEN: u8 = 2;
/// The machine answers as a CMOS clock at [`RTC_PORT`], and ACPI says so.
pub const RTC_PRESENT: bool = true;

/// The platform's own ports: power, reset, and the boot timer.
pub const PLATFORM_PORT: u16 = 0xb00;
/// How many ports the platform has.
pub const PLATFORM_PORT_LEN: u16 = 8;
/// ACPI 4.8.3.7, sleep control register.
pub const SLEEP_CONTROL: u16 = 0xb00;
/// ACPI 4.8.3.7, sleep status register.
pub const SLEEP_STATUS: u16 = 0xb01;
/// ACPI 4.8.3.6, reset register.
pub const RESET: u16 = 0xb02;
/// What a guest writes to [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// A write here marks a moment of the guest's boot.
pub const BOOT_MARK: u16 = 0xb04;
/// What the guest writes here, its init's exit status, is reported by the VMM.
pub const GUEST_STATUS: u16 = 0xb05;
/// Where the guest's mailbox is, and its snapshot point (`protocol/src/mailbox.rs`).
pub const SNAPSHOT_PORT: u16 = 0xb08;
/// How many ports it has, of 8 bits each.
pub const SNAPSHOT_PORT_LEN: u16 = 2;
/// The sleep type of soft-off, `_S5_`.
pub const SLEEP_TYPE_S5: u8 = 5;

/// The generic event device's register: what happened, cleared by reading.
pub const GED_EVENTS: u16 = 0xb10;
/// In [`GED_EVENTS`]: the power button was pressed.
pub const GED_POWER_BUTTON: u8 = 1 << 0;
/// In [`GED_EVENTS`]: the VM generation ID is another.
pub const GED_VM_GENERATION: u8 = 1 << 1;

/// The watchdog's ports.
pub const WATCHDOG_PORT: u16 = 0xb20;
/// How many ports the watchdog has.
pub const WATCHDOG_PORT_LEN: u16 = 4;
/// 8 bits: [`WATCHDOG_RUN`], or 0 while it is stopped.
pub const WATCHDOG_CONTROL: u16 = 0xb20;
/// 8 bits: a write feeds the watchdog.
pub const WATCHDOG_FEED: u16 = 0xb21;
/// 16 bits, seconds: a write sets the time out, a read tells what is left.
pub const WATCHDOG_COUNT: u16 = 0xb22;
/// In [`WATCHDOG_CONTROL`]: it runs.
pub const WATCHDOG_RUN: u8 = 1;

/// The paravirtual panic device, where all that emulate it have it.
pub const PVPANIC_PORT: u16 = 0x505;

/// The RAM of a machine with `size` bytes: start and length of each region.
pub fn ram_regions(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(MMIO_HOLE_START);
    let high = (size - low).min(u64::MAX - MMIO_HOLE_END);
    [(0, low), (MMIO_HOLE_END, high)]
        .into_iter()
        .filter(|&(_, len)| len > 0)
        .collect()
}

/// The address of the virtio-mmio device at `index`.
pub fn virtio_address(index: usize) -> Option<u64> {
    (index < VIRTIO_MAX).then(|| VIRTIO_MMIO_BASE + index as u64 * u64::from(VIRTIO_MMIO_SIZE))
}

/// The interrupt of the virtio-mmio device at `index`.
pub fn virtio_irq(index: usize) -> Option<u32> {
    (VIRTIO_FIRST_IRQ..)
        .filter(|&irq| irq != RTC_IRQ)
        .take(VIRTIO_MAX)
        .nth(index)
}

/// What a range of the memory map is; the values are E820's and PVH's alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// Usable memory.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// A range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first address.
    pub addr: u64,
    /// The length in bytes.
    pub size: u64,
    /// The kind of the range.
    pub kind: RangeKind,
}

/// The memory map that the guest is given.
pub fn memory_map(ram_size: u64) -> Vec<Range> {
    let range = |start: u64, end: u64, kind| Range {
        addr: start,
        size: end - start,
        kind,
    };
    let mut map = vec![
        range(0, LOW_RAM_END, RangeKind::Ram),
        range(LOW_RAM_END, HIMEM_START, RangeKind::Reserved),
    ];
    for (start, len) in ram_regions(ram_size) {
        let end = start + len;
        let start = start.max(HIMEM_START);
        if start < end {
            map.push(range(start, end, RangeKind::Ram));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ram_leaves_the_hole_free() {
        let g = 1u64 << 30;
        assert_eq!(ram_regions(0), []);
        assert_eq!(ram_regions(1), [(0, 1)]);
        assert_eq!(ram_regions(3 * g), [(0, 3 * g)]);
        assert_eq!(ram_regions(3 * g + 1), [(0, 3 * g), (4 * g, 1)]);
        assert_eq!(ram_regions(8 * g), [(0, 3 * g), (4 * g, 5 * g)]);
    }

    #[test]
    fn memory_map_of_a_large_machine() {
        let map = memory_map(4 << 30);
        let ram = |addr, size| Range {
            addr,
            size,
            kind: RangeKind::Ram,
        };
        assert_eq!(map[0], ram(0, 0x9fc00));
        assert_eq!(map[1].kind, RangeKind::Reserved);
        assert_eq!(map[1].addr + map[1].size, HIMEM_START);
        assert_eq!(map[2], ram(0x10_0000, 0xbff0_0000));
        assert_eq!(map[3], ram(1 << 32, 1 << 30));
        assert_eq!(map.len(), 4);
        assert_eq!(memory_map(HIMEM_START).len(), 2);
    }

    #[test]
    fn virtio_devices_have_distinct_interrupts_of_the_io_apic() {
        let irqs: Vec<_> = (0..VIRTIO_MAX).filter_map(virtio_irq).collect();
        assert_eq!(irqs.len(), VIRTIO_MAX);
        assert_eq!((irqs[0], irqs[VIRTIO_MAX - 1]), (5, 23));
        assert!(!irqs.contains(&RTC_IRQ));
        assert_eq!(virtio_irq(VIRTIO_MAX), None);
        assert_eq!(virtio_address(VIRTIO_MAX), None);
        assert_eq!(virtio_address(1), Some(0xd000_1000));
    }

    proptest! {
        #[test]
        fn ram_regions_never_overflow(size: u64) {
            for (start, len) in ram_regions(size) {
                prop_assert!(start.checked_add(len).is_some());
            }
            memory_map(size);
        }
    }
}
