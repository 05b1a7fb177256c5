//! The initial RAM disk.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::{HIMEM_START, MMIO_HOLE_START, PAGE_SIZE};
use crate::loaded::{PlaceError, place};

/// The highest byte that Linux on x86 accepts for an initial RAM disk (its
/// `initrd_addr_max` since 2.6).
pub const INITRD_ADDR_MAX: u64 = 0x7fff_ffff;

/// An initial RAM disk in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// The guest-physical address.
    pub addr: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// Why the initial RAM disk could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The file is of no format that Linux unpacks.
    #[error(
        "not an initial RAM disk: expected a cpio archive (newc), or one packed by gzip, xz, zstd, lz4, lzo, bzip2 or lzma"
    )]
    NotAnInitrd,
    /// The archive ends too early.
    #[error("the initial RAM disk is truncated: its archive goes on behind its {len} bytes")]
    Truncated {
        /// The file's size.
        len: u64,
    },
    /// The file is empty.
    #[error("the initial RAM disk is empty")]
    Empty,
    /// It does not fit above the kernel.
    #[error(
        "the initial RAM disk of {size} bytes does not fit in guest memory between {start:#x} and {end:#x}; give the VM more memory"
    )]
    DoesNotFit {
        /// Its size.
        size: u64,
        /// The kernel's end.
        start: u64,
        /// The end of the memory where it may lie.
        end: u64,
    },
    /// The file could not be read.
    #[error("reading the initial RAM disk")]
    Read(#[source] io::Error),
    /// Copying it to guest memory failed.
    #[error("copying the initial RAM disk into guest memory")]
    Copy(#[source] vm_memory::GuestMemoryError),
}

/// What Linux unpacks, by the first bytes (its `lib/decompress.c`).
const PACKED: [&[u8]; 7] = [
    &[0x1f, 0x8b],
    b"BZh",
    &[0x5d, 0x00, 0x00],
    b"\xfd7zXZ\0",
    &[0x89, b'L', b'Z', b'O'],
    &[0x02, 0x21, 0x4c, 0x18],
    &[0x28, 0xb5, 0x2f, 0xfd],
];
const NEWC: &[u8] = b"07070"; // and 1, or 2 with checksums
const NEWC_HEADER: usize = 110;
const NEWC_FILE_SIZE: usize = 54;
const NEWC_NAME_SIZE: usize = 94;
const TRAILER: &[u8] = b"TRAILER!!!";

/// Follows an archive's headers to its end, so that a file that was cut is
/// told from a whole one before a guest stumbles over it.
fn check(file: &File, len: u64) -> Result<(), InitrdError> {
    let mut at = 0;
    loop {
        let mut header = [0; NEWC_HEADER + TRAILER.len()];
        let got = file.read_at(&mut header, at).map_err(InitrdError::Read)?;
        if at == 0 && PACKED.iter().any(|magic| header.starts_with(magic)) {
            return Ok(());
        }
        if at == 0 && !header.starts_with(NEWC) {
            return Err(InitrdError::NotAnInitrd);
        }
        let number = |offset: usize| {
            let digits = header.get(offset..offset + 8)?;
            u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
        };
        let (Some(size), Some(name), true) = (
            number(NEWC_FILE_SIZE),
            number(NEWC_NAME_SIZE),
            got >= NEWC_HEADER && header.starts_with(NEWC),
        ) else {
            return Err(InitrdError::Truncated { len });
        };
        if header[NEWC_HEADER..].starts_with(TRAILER) {
            return Ok(());
        }
        // Both are of 32 bits, and the file's size is below the address space's.
        let data = (at + NEWC_HEADER as u64 + name).next_multiple_of(4);
        at = (data + size).next_multiple_of(4);
        if at > len {
            return Err(InitrdError::Truncated { len });
        }
    }
}

/// Loads the file as high as the kernel accepts it: above the kernel, or in
/// the gap below it where little memory is left.
pub fn load<M: GuestMemoryBackend>(
    mem: &M,
    file: &mut File,
    kernel: Range<u64>,
) -> Result<Initrd, InitrdError> {
    let size = file.metadata().map_err(InitrdError::Read)?.len();
    if size == 0 {
        return Err(InitrdError::Empty);
    }
    let limit = low_ram_end(mem).min(INITRD_ADDR_MAX + 1);
    let fits = |start: u64, end: u64| {
        let addr = end.checked_sub(size)?;
        let addr = addr - addr % PAGE_SIZE;
        (addr >= start).then_some(addr)
    };
    let (start, end) = (kernel.end.max(HIMEM_START), limit);
    let addr = fits(start, end)
        .or_else(|| fits(HIMEM_START, kernel.start.min(limit)))
        .ok_or(InitrdError::DoesNotFit { size, start, end })?;
    check(file, size)?;
    place(mem, file, 0, addr, size).map_err(|error| match error {
        PlaceError::Seek(source) => InitrdError::Read(source),
        PlaceError::Copy(source) => InitrdError::Copy(source),
    })?;
    Ok(Initrd { addr, size })
}

/// The end of the RAM that starts at 0, below the hole for devices.
fn low_ram_end<M: GuestMemoryBackend>(mem: &M) -> u64 {
    let mut end = 0;
    while end < MMIO_HOLE_START {
        match mem.find_region(GuestAddress(end)) {
            Some(region) => end = region.last_addr().raw_value().saturating_add(1),
            None => break,
        }
    }
    end.min(MMIO_HOLE_START)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::{file_of, memory};
    use vm_memory::Bytes;

    #[test]
    fn lies_page_aligned_at_the_top() {
        let mem = memory(4 << 20);
        let data = [&[0x1f, 0x8b], [7; 4998].as_slice()].concat();
        let initrd = load(&mem, &mut file_of(&data), 0..0x20_0000).unwrap();
        assert_eq!((initrd.addr, initrd.size), ((4 << 20) - 0x2000, 5000));
        let byte = |at| mem.read_obj::<u8>(GuestAddress(initrd.addr + at)).unwrap();
        assert_eq!((byte(0), byte(4999), byte(5000)), (0x1f, 7, 0));
    }

    #[test]
    fn refuses_nothing_and_too_much() {
        let mem = memory(4 << 20);
        assert!(matches!(
            load(&mem, &mut file_of(&[]), 0..0),
            Err(InitrdError::Empty)
        ));
        for (size, kernel_end) in [(5 << 20, 0), (0x1001, (4 << 20) - 0x1000), (1, u64::MAX)] {
            assert!(matches!(
                load(&mem, &mut file_of(&vec![0; size]), 0..kernel_end),
                Err(InitrdError::DoesNotFit { .. })
            ));
        }
        let at_the_end = load(&mem, &mut file_of(b"BZh"), 0..(4 << 20) - 0x1000);
        assert!(at_the_end.is_ok());
    }

    #[test]
    fn lies_below_a_kernel_that_leaves_no_room_above() {
        let mem = memory(8 << 20);
        let data = [b"BZh".as_slice(), &[0; 0x1000]].concat();
        let kernel = 0x40_0000..0x80_0000;
        let initrd = load(&mem, &mut file_of(&data), kernel).unwrap();
        assert_eq!(initrd.addr, 0x40_0000 - 0x2000);
    }

    #[test]
    fn a_cut_archive_is_told_from_a_whole_one() {
        let mut archive = crate::initramfs::Initramfs::new(Vec::new()).unwrap();
        archive.file("init", 0o755, &[1; 1000]).unwrap();
        let whole = archive.finish().unwrap();
        let check = |data: &[u8]| check(&file_of(data), data.len() as u64);
        assert!(check(&whole).is_ok());
        assert!(check(&[whole.as_slice(), &[0; 512], b"more"].concat()).is_ok());
        for len in 5..whole.len() - 12 {
            assert!(
                matches!(check(&whole[..len]), Err(InitrdError::Truncated { .. })),
                "{len}"
            );
        }
        for other in [b"".as_slice(), b"x", b"\0\0\0\0", b"#!/bin/sh", b"\x7fELF"] {
            assert!(matches!(check(other), Err(InitrdError::NotAnInitrd)));
        }
        // A header that claims more than there is, or no number at all.
        let mut wrong = whole.clone();
        wrong[NEWC_FILE_SIZE..NEWC_FILE_SIZE + 8].copy_from_slice(b"ffffffff");
        assert!(matches!(check(&wrong), Err(InitrdError::Truncated { .. })));
        wrong[NEWC_FILE_SIZE] = b'-';
        assert!(matches!(check(&wrong), Err(InitrdError::Truncated { .. })));
    }
}
