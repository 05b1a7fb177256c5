//! Xen's PVH start of day (Xen's `include/public/arch-x86/hvm/start_info.h`).

use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::layout::{self, CMDLINE, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};
use crate::machine::{Boot, BootError, writing};

/// Version 1 adds the memory map.
const VERSION: u32 = 1;

pub(crate) fn write<M: GuestMemoryBackend>(
    mem: &M,
    boot: &Boot,
    rsdp: u64,
) -> Result<(), BootError> {
    let map = layout::memory_map(boot.ram_size);
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        cmdline_paddr: CMDLINE.into(),
        rsdp_paddr: rsdp,
        memmap_paddr: PVH_MEMORY_MAP,
        ..Default::default()
    };
    if let Some(initrd) = boot.initrd {
        info.nr_modules = 1;
        info.modlist_paddr = PVH_MODULES;
        let module = hvm_modlist_entry {
            paddr: initrd.addr,
            size: initrd.size,
            ..Default::default()
        };
        mem.write_obj(module, GuestAddress(PVH_MODULES))
            .map_err(writing("the PVH module list"))?;
    }
    let mut addr = PVH_MEMORY_MAP;
    for range in map {
        let entry = hvm_memmap_table_entry {
            addr: range.addr,
            size: range.size,
            type_: range.kind as u32,
            reserved: 0,
        };
        mem.write_obj(entry, GuestAddress(addr))
            .map_err(writing("the PVH memory map"))?;
        addr += size_of::<hvm_memmap_table_entry>() as u64;
        info.memmap_entries += 1;
    }
    mem.write_obj(info, GuestAddress(PVH_START_INFO))
        .map_err(writing("the PVH start info"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Initrd;
    use crate::kernel::tests::memory;

    #[test]
    fn start_info_points_at_the_map_and_the_disk() {
        let mem = memory(4 << 20);
        let initrd = Initrd {
            addr: 0x30_0000,
            size: 77,
        };
        let boot = Boot {
            cmdline: "",
            initrd: Some(initrd),
            cpus: 1,
            virtio: &[],
            watchdog: false,
            ram_size: 4 << 20,
        };
        write(&mem, &boot, 0xe0000).unwrap();
        let info: hvm_start_info = mem.read_obj(GuestAddress(PVH_START_INFO)).unwrap();
        assert_eq!(info.magic, 0x336e_c578);
        assert_eq!(
            (info.version, info.nr_modules, info.memmap_entries),
            (1, 1, 3)
        );
        assert_eq!((info.rsdp_paddr, info.cmdline_paddr), (0xe0000, 0x20000));
        let module: hvm_modlist_entry = mem.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0x30_0000, 77));
        let third: hvm_memmap_table_entry =
            mem.read_obj(GuestAddress(info.memmap_paddr + 48)).unwrap();
        assert_eq!(
            (third.addr, third.size, third.type_),
            (0x10_0000, 0x30_0000, 1)
        );
    }
}
