//! Linux' `boot_params`, called the zero page
//! (`Documentation/arch/x86/zero-page.rst`).

use linux_loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::layout::{self, ZERO_PAGE};
use crate::loaded::Kernel;
use crate::machine::{Boot, BootError, writing};

/// A boot loader without an assigned identifier.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The boot protocol's version for an ELF kernel, which has no header.
const PROTOCOL_VERSION: u16 = 0x20c;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

pub(crate) fn write<M: GuestMemoryBackend>(
    mem: &M,
    kernel: &Kernel,
    boot: &Boot,
    rsdp: u64,
) -> Result<(), BootError> {
    let params = build(kernel, boot, rsdp)?;
    mem.write_obj(params, GuestAddress(ZERO_PAGE))
        .map_err(writing("the zero page"))
}

fn build(kernel: &Kernel, boot: &Boot, rsdp: u64) -> Result<boot_params, BootError> {
    let mut params = boot_params {
        hdr: kernel.header.unwrap_or_else(minimal_header),
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.setup_data = 0;
    params.hdr.cmd_line_ptr = layout::CMDLINE;

    if let Some(initrd) = boot.initrd {
        let end = initrd.addr.saturating_add(initrd.size);
        let max = match kernel.header {
            Some(header) => u64::from(header.initrd_addr_max),
            None => u64::from(u32::MAX),
        };
        let too_high = BootError::InitrdTooHigh { end, max };
        let (Ok(image), Ok(size)) = (initrd.addr.try_into(), initrd.size.try_into()) else {
            return Err(too_high);
        };
        if end > max.saturating_add(1) {
            return Err(too_high);
        }
        params.hdr.ramdisk_image = image;
        params.hdr.ramdisk_size = size;
    }

    let map = layout::memory_map(boot.ram_size);
    for (entry, range) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: range.addr,
            size: range.size,
            r#type: range.kind as u32,
        };
        params.e820_entries += 1;
    }
    Ok(params)
}

fn minimal_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL_VERSION,
        loadflags: LOADED_HIGH,
        kernel_alignment: KERNEL_ALIGNMENT,
        cmdline_size: layout::CMDLINE_MAX - 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Initrd, Protocol};

    fn kernel(header: Option<setup_header>) -> Kernel {
        Kernel {
            entry: 0,
            protocol: Protocol::Linux64,
            start: 0,
            end: 0,
            header,
        }
    }

    fn boot(initrd: Option<Initrd>) -> Boot<'static> {
        Boot {
            cmdline: "",
            initrd,
            cpus: 1,
            virtio: &[],
            watchdog: false,
            ram_size: 4 << 30,
        }
    }

    #[test]
    fn e820_has_the_memory_map() {
        let params = build(&kernel(None), &boot(None), 0xe0000).unwrap();
        assert_eq!(params.e820_entries, 4);
        let table = params.e820_table;
        let entry = |i: usize| ({ table[i].addr }, { table[i].size }, { table[i].r#type });
        assert_eq!(entry(0), (0, 0x9fc00, 1));
        assert_eq!(entry(1), (0x9fc00, 0x60400, 2));
        assert_eq!(entry(2), (0x10_0000, 0xbff0_0000, 1));
        assert_eq!(entry(3), (1 << 32, 1 << 30, 1));
        assert_eq!({ params.acpi_rsdp_addr }, 0xe0000);
        assert_eq!({ params.hdr.header }, HEADER_MAGIC);
    }

    #[test]
    fn the_header_of_a_bzimage_is_kept_and_its_limits_respected() {
        let header = setup_header {
            version: 0x20f,
            initrd_addr_max: 0x37ff_ffff,
            init_size: 7,
            ..Default::default()
        };
        let initrd = |addr| Some(Initrd { addr, size: 0x1000 });
        let params = build(&kernel(Some(header)), &boot(initrd(0x37ff_f000)), 0).unwrap();
        assert_eq!(
            ({ params.hdr.version }, { params.hdr.init_size }),
            (0x20f, 7)
        );
        assert_eq!({ params.hdr.ramdisk_image }, 0x37ff_f000);
        assert!(matches!(
            build(&kernel(Some(header)), &boot(initrd(0x3800_0000)), 0),
            Err(BootError::InitrdTooHigh { .. })
        ));
    }
}
