//! The initial RAM disk.

use std::fs::File;
use std::io;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::kernel::{MapFile, PlaceError, place};
use crate::layout::{HIMEM_START, MMIO_HOLE_START, PAGE_SIZE};

/// The highest byte that Linux on x86 accepts for an initial RAM disk (its
/// `initrd_addr_max` since 2.6).
pub const INITRD_ADDR_MAX: u64 = 0x7fff_ffff;

/// An initial RAM disk in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// Where it lies.
    pub addr: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// Why the initial RAM disk could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
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
    /// Mapping it over guest memory failed.
    #[error("mapping the initial RAM disk into guest memory")]
    Map(#[source] io::Error),
    /// Copying it to guest memory failed.
    #[error("copying the initial RAM disk into guest memory")]
    Copy(#[source] vm_memory::GuestMemoryError),
}

/// Loads the file as high as the kernel accepts it, above `kernel_end`.
pub fn load<M: GuestMemoryBackend>(
    mem: &M,
    file: &mut File,
    mapper: &dyn MapFile,
    kernel_end: u64,
) -> Result<Initrd, InitrdError> {
    let size = file.metadata().map_err(InitrdError::Read)?.len();
    if size == 0 {
        return Err(InitrdError::Empty);
    }
    let start = kernel_end.max(HIMEM_START);
    let end = low_ram_end(mem).min(INITRD_ADDR_MAX + 1);
    let addr = end
        .checked_sub(size)
        .map(|addr| addr - addr % PAGE_SIZE)
        .filter(|&addr| addr >= start)
        .ok_or(InitrdError::DoesNotFit { size, start, end })?;
    place(mem, file, mapper, 0, addr, size).map_err(|error| match error {
        PlaceError::Map(source) => InitrdError::Map(source),
        PlaceError::Seek(source) => InitrdError::Read(source),
        PlaceError::Copy(_, source) => InitrdError::Copy(source),
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
    use crate::kernel::CopyOnly;
    use crate::kernel::tests::{file_of, memory};
    use vm_memory::Bytes;

    #[test]
    fn lies_page_aligned_at_the_top() {
        let mem = memory(4 << 20);
        let initrd = load(&mem, &mut file_of(&[7; 5000]), &CopyOnly, 0x20_0000).unwrap();
        assert_eq!((initrd.addr, initrd.size), ((4 << 20) - 0x2000, 5000));
        let byte = |at| mem.read_obj::<u8>(GuestAddress(initrd.addr + at)).unwrap();
        assert_eq!((byte(0), byte(4999), byte(5000)), (7, 7, 0));
    }

    #[test]
    fn refuses_nothing_and_too_much() {
        let mem = memory(4 << 20);
        assert!(matches!(
            load(&mem, &mut file_of(&[]), &CopyOnly, 0),
            Err(InitrdError::Empty)
        ));
        for (size, kernel_end) in [(5 << 20, 0), (0x1001, (4 << 20) - 0x1000), (1, u64::MAX)] {
            assert!(matches!(
                load(&mem, &mut file_of(&vec![0; size]), &CopyOnly, kernel_end),
                Err(InitrdError::DoesNotFit { .. })
            ));
        }
        assert!(load(&mem, &mut file_of(&[1]), &CopyOnly, (4 << 20) - 0x1000).is_ok());
    }
}
