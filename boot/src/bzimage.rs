//! bzImage kernels, entered by the 64-bit boot protocol
//! (Linux' `Documentation/arch/x86/boot.rst`).

use std::fs::File;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, boot_params, setup_header};
use vm_memory::{ByteValued, GuestMemoryBackend};

use crate::layout::HIMEM_START;
use crate::loaded::{Kernel, KernelError, Protocol, check_fits, place_kernel, reading};

/// The setup header is at the same offset in the file as in `boot_params`.
const HEADER_OFFSET: u64 = offset_of!(boot_params, hdr) as u64;
const SECTOR: u64 = 512;
/// `setup_sects` of 0 means this many.
const DEFAULT_SETUP_SECTORS: u64 = 4;
/// `syssize` counts these.
const PARAGRAPH: u64 = 16;
/// The oldest protocol that is accepted: 2.06 knows `cmdline_size`.
const VERSION_MIN: u16 = 0x206;
/// `xloadflags` came with protocol 2.12.
const VERSION_XLOADFLAGS: u16 = 0x20c;
/// The 64-bit entry point, relative to the loaded kernel.
const ENTRY_64: u64 = 0x200;

pub(crate) fn load<M: GuestMemoryBackend>(
    mem: &M,
    file: &mut File,
    file_len: u64,
    want: Option<Protocol>,
) -> Result<Kernel, KernelError> {
    if want == Some(Protocol::Pvh) {
        return Err(KernelError::NoPvhEntry);
    }
    let mut header = read_header(file, file_len)?;

    let setup_sectors = match header.setup_sects {
        0 => DEFAULT_SETUP_SECTORS,
        count => u64::from(count),
    };
    let offset = (setup_sectors + 1) * SECTOR;
    let claimed = u64::from(header.syssize) * PARAGRAPH;
    let available = file_len.saturating_sub(offset);
    // The size is rounded up to paragraphs, which the file need not fill.
    if claimed <= ENTRY_64 || claimed >= available + PARAGRAPH {
        return Err(KernelError::Truncated {
            what: "the protected-mode kernel",
            need: offset + claimed.max(ENTRY_64 + PARAGRAPH),
            have: file_len,
        });
    }
    let len = claimed.min(available);

    // The decompressor unpacks to its preferred address, or above where it
    // lies when that is higher, and needs init_size bytes there.
    let load_at = HIMEM_START;
    let unpacked_at = { header.pref_address }.max(load_at);
    let end = unpacked_at
        .checked_add(u64::from(header.init_size))
        .ok_or(KernelError::UnsupportedBzImage(
            "its preferred address overflows",
        ))?
        .max(load_at + len);
    check_fits(mem, load_at, end)?;

    place_kernel(mem, file, offset, load_at, len)?;
    header.code32_start = u32::try_from(load_at)
        .map_err(|_| KernelError::UnsupportedBzImage("it loads above 4 GiB"))?;
    Ok(Kernel {
        entry: load_at + ENTRY_64,
        protocol: Protocol::Linux64,
        start: load_at,
        end,
        header: Some(header),
    })
}

fn read_header(file: &File, file_len: u64) -> Result<setup_header, KernelError> {
    let mut header = setup_header::default();
    let need = HEADER_OFFSET + size_of::<setup_header>() as u64;
    if file_len < need {
        return Err(KernelError::Truncated {
            what: "the setup header",
            need,
            have: file_len,
        });
    }
    file.read_exact_at(header.as_mut_slice(), HEADER_OFFSET)
        .map_err(reading("setup header"))?;
    if header.version < VERSION_MIN {
        return Err(KernelError::UnsupportedBzImage(
            "its boot protocol is older than 2.06",
        ));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(KernelError::UnsupportedBzImage("it loads below 1 MiB"));
    }
    if header.version < VERSION_XLOADFLAGS || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::UnsupportedBzImage(
            "it has no 64-bit entry point (Linux 3.8 or newer for x86-64 has)",
        ));
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::{file_of, memory};
    use crate::kernel::{self};
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    const RAM: usize = 32 << 20;
    const BODY: usize = 0x1000;

    fn header() -> setup_header {
        setup_header {
            setup_sects: 1,
            syssize: BODY as u32 / 16,
            header: u32::from_le_bytes(*b"HdrS"),
            version: 0x20f,
            loadflags: LOADED_HIGH,
            xloadflags: XLF_KERNEL_64,
            pref_address: 0x100_0000,
            init_size: 0x80_0000,
            initrd_addr_max: 0x7fff_ffff,
            ..Default::default()
        }
    }

    fn image(header: setup_header) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_OFFSET as usize];
        bytes.extend(header.as_slice());
        bytes.resize(1024, 0);
        bytes.resize(1024 + BODY, 0xcc);
        bytes
    }

    fn load_bytes(bytes: &[u8], want: Option<Protocol>) -> Result<Kernel, KernelError> {
        kernel::load(&memory(RAM), &mut file_of(bytes), want)
    }

    #[test]
    fn loads_at_1_mib_and_reserves_what_it_unpacks_to() {
        let mem = memory(RAM);
        let kernel = kernel::load(&mem, &mut file_of(&image(header())), None).unwrap();
        assert_eq!((kernel.entry, kernel.end), (0x10_0200, 0x180_0000));
        let byte = |addr| mem.read_obj::<u8>(GuestAddress(addr)).unwrap();
        assert_eq!(
            (byte(0x10_0000), byte(0x10_0fff), byte(0x10_1000)),
            (0xcc, 0xcc, 0)
        );
    }

    #[test]
    fn refuses_what_it_cannot_enter() {
        for bad in [
            setup_header {
                version: 0x205,
                ..header()
            },
            setup_header {
                xloadflags: 0,
                ..header()
            },
            setup_header {
                loadflags: 0,
                ..header()
            },
            setup_header {
                pref_address: u64::MAX,
                ..header()
            },
        ] {
            assert!(matches!(
                load_bytes(&image(bad), None),
                Err(KernelError::UnsupportedBzImage(_))
            ));
        }
        let large = setup_header {
            init_size: RAM as u32,
            ..header()
        };
        assert!(matches!(
            load_bytes(&image(large), None),
            Err(KernelError::DoesNotFit { .. })
        ));
        assert!(matches!(
            load_bytes(&image(header()), Some(Protocol::Pvh)),
            Err(KernelError::NoPvhEntry)
        ));
    }

    #[test]
    fn truncated_files() {
        let bytes = image(header());
        for len in [0x206, 0x26b, 1023, 1024, 1024 + BODY - 16] {
            assert!(matches!(
                load_bytes(&bytes[..len], None),
                Err(KernelError::Truncated { .. })
            ));
        }
        assert!(load_bytes(&bytes[..1024 + BODY - 15], None).is_ok());
    }

    proptest! {
        #[test]
        fn hostile_headers_never_panic(noise in prop::array::uniform32(any::<u8>()), at in 0usize..90, len in 0usize..0x1400) {
            let mut bytes = image(header());
            let at = HEADER_OFFSET as usize + at;
            bytes[at..at + 32].copy_from_slice(&noise);
            bytes[0x202..0x206].copy_from_slice(b"HdrS");
            let _ = load_bytes(&bytes, None);
            let _ = load_bytes(&bytes[..len], None);
        }
    }
}
