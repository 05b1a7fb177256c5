//! Guest memory: anonymous pages, or a memory file.

#![allow(unsafe_code, reason = "guest memory is mapped")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

use mayfly_boot::layout;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionCollectionError, GuestRegionMmap,
    MmapRegion,
};

use crate::config::{HugePages, MemoryConfig};

/// The guest's memory, everywhere in mayfly.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host has no address space, or limits it.
    #[error("mapping {size} bytes of guest memory")]
    Map {
        /// How much.
        size: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// There is no file for it.
    #[error("making a memory file")]
    File(#[source] io::Error),
    /// A region lies out of what can be addressed.
    #[error("guest memory at {0:#x} is out of the address space")]
    Address(u64),
    /// The regions do not fit together.
    #[error("laying out guest memory")]
    Layout(#[from] GuestRegionCollectionError),
}

/// What a huge page's address is a multiple of, in the guest and here: only where both
/// agree, KVM maps it as one. Linux does so by itself from 6.7 on.
const ALIGNMENT: usize = 2 << 20;

/// Reserves memory, laid out around the hole for devices, until the process ends. A page
/// costs host memory only once the guest touches it.
pub fn guest_memory(config: &MemoryConfig) -> Result<GuestMemory, MemoryError> {
    let file = match config.hugepages.is_some() || config.shared {
        true => Some(memory_file(config).map_err(MemoryError::File)?),
        false => None,
    };
    let alignment = match config.hugepages {
        Some(pages) => usize::try_from(pages.bytes()).unwrap_or(ALIGNMENT),
        None => ALIGNMENT,
    };
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, len) in layout::ram_regions(config.size) {
        let bytes = usize::try_from(len).map_err(|_| MemoryError::Address(start))?;
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            match (&file, config.shared) {
                (None, _) => libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE,
                (Some(_), true) => libc::MAP_SHARED,
                (Some(_), false) => libc::MAP_PRIVATE,
            },
        );
        let file = match &file {
            None => None,
            Some(file) => {
                let file = file.try_clone().map_err(MemoryError::File)?;
                Some(FileOffset::new(file, offset))
            }
        };
        let failed = |source| MemoryError::Map { size: len, source };
        let host = map_aligned(bytes, alignment, prot, flags, file.as_ref()).map_err(failed)?;
        // SAFETY: a mapping of that size, made just now, that stays.
        let mut builder = unsafe { MmapRegionBuilder::new(bytes).with_raw_mmap_pointer(host) }
            .with_mmap_prot(prot)
            .with_mmap_flags(flags);
        if let Some(file) = file {
            builder = builder.with_file_offset(file);
        }
        let mapping: MmapRegion<()> = builder
            .build()
            .map_err(|error| failed(io::Error::other(error)))?;
        if config.hugepages.is_none() {
            // Advice: a kernel without transparent huge pages may refuse it.
            let _ = advise(&mapping, libc::MADV_HUGEPAGE);
        }
        regions.push(
            GuestRegionMmap::new(mapping, GuestAddress(start))
                .ok_or(MemoryError::Address(start))?,
        );
        offset += len;
    }
    Ok(GuestMemory::from_regions(regions)?)
}

/// Maps memory at a multiple of `alignment`.
fn map_aligned(
    bytes: usize,
    alignment: usize,
    prot: libc::c_int,
    flags: libc::c_int,
    file: Option<&FileOffset>,
) -> io::Result<*mut u8> {
    let mapped = |address: *mut libc::c_void| match address {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        address => Ok(address.cast::<u8>()),
    };
    let room = bytes
        .checked_add(alignment)
        .ok_or(io::ErrorKind::OutOfMemory)?;
    let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: takes addresses that nothing uses.
    let start = mapped(unsafe { libc::mmap(null_mut(), room, libc::PROT_NONE, reserve, -1, 0) })?;
    let before = start.addr().wrapping_neg() % alignment;
    let (fd, offset) = match file {
        Some(file) => (
            file.file().as_raw_fd(),
            libc::off_t::try_from(file.start()).map_err(io::Error::other)?,
        ),
        None => (-1, 0),
    };
    // SAFETY: `before` is less than `alignment`, so all three pieces lie in the
    // reservation, which nobody else knows: the outer two go, the middle one is replaced.
    unsafe {
        let ours = start.add(before);
        libc::munmap(ours.add(bytes).cast(), alignment - before);
        if before > 0 {
            libc::munmap(start.cast(), before);
        }
        mapped(libc::mmap(
            ours.cast(),
            bytes,
            prot,
            flags | libc::MAP_FIXED,
            fd,
            offset,
        ))
    }
}

/// A file in memory of the guest's size.
fn memory_file(config: &MemoryConfig) -> io::Result<File> {
    let huge = match config.hugepages {
        None => 0,
        Some(HugePages::Mib2) => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        Some(HugePages::Gib1) => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
    };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge;
    // SAFETY: a string that lives until the call returns.
    let fd = unsafe { libc::memfd_create(c"guest memory".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, that nothing else owns.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(config.size)?;
    // Whoever shares it must not take it from under us.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: an open descriptor, and numbers.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes all pages of a guest's memory be there.
pub fn prefault(memory: &GuestMemory) -> io::Result<()> {
    memory
        .iter()
        .try_for_each(|region| match advise(region, libc::MADV_POPULATE_WRITE) {
            // Kernels before 5.14 do not know it.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                touch(region);
                Ok(())
            }
            done => done,
        })
}

/// Writes to each page what it holds. No vCPU runs yet.
fn touch(region: &MmapRegion<()>) {
    let page = usize::try_from(layout::PAGE_SIZE).unwrap_or(1);
    for offset in (0..region.size()).step_by(page) {
        let byte = region.as_ptr().wrapping_add(offset);
        // SAFETY: it lies in the mapping, which is ours, and no other thread writes there.
        unsafe { byte.write_volatile(byte.read_volatile()) };
    }
}

/// Leaves a guest's memory out of core dumps: it holds what the user keeps secret.
pub fn exclude_from_dumps(memory: &GuestMemory) -> io::Result<()> {
    memory
        .iter()
        .try_for_each(|region| advise(region, libc::MADV_DONTDUMP))
}

fn advise(region: &MmapRegion<()>, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: a mapping of that size, which is ours; no such advice changes
    // what it holds.
    match unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryRegion};

    fn config(shared: bool) -> MemoryConfig {
        MemoryConfig {
            size: 1 << 20,
            shared,
            ..Default::default()
        }
    }

    #[test]
    fn huge_pages_of_the_guest_are_huge_pages_here() {
        for shared in [false, true] {
            let memory = guest_memory(&MemoryConfig {
                size: layout::MMIO_HOLE_START + (6 << 20),
                ..config(shared)
            })
            .unwrap();
            for region in memory.iter() {
                assert_eq!(region.as_ptr().addr() % ALIGNMENT, 0);
                memory.write_obj(7u8, region.last_addr()).unwrap();
            }
        }
    }

    /// Also where the kernel would not have it so by itself.
    #[test]
    fn a_mapping_begins_where_it_should() {
        for alignment in [1 << 21, 1 << 26, 1 << 30] {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let start = map_aligned(1 << 20, alignment, libc::PROT_READ, flags, None).unwrap();
            assert_eq!(start.addr() % alignment, 0, "{alignment:#x}");
        }
    }

    #[test]
    fn no_dump_has_a_guest_s_memory() {
        let memory = guest_memory(&config(false)).unwrap();
        exclude_from_dumps(&memory).unwrap();
        let start = memory.get_host_address(GuestAddress(0)).unwrap() as usize;
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (_, ours) = maps.split_once(&format!("{start:x}-")).unwrap();
        let flags = ours.lines().find(|line| line.starts_with("VmFlags:"));
        assert!(flags.unwrap().contains(" dd"), "{flags:?}");
    }

    #[test]
    fn shared_memory_is_a_file_that_shows_everything() {
        let memory = guest_memory(&config(true)).unwrap();
        memory.write_obj(7u8, GuestAddress(0x5000)).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut byte, 0x5000).unwrap();
        assert_eq!(byte, [7]);
        assert!(file.set_len(0).is_err());
        prefault(&memory).unwrap();
        // As on an old kernel.
        memory.iter().for_each(|region| touch(region));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 7);
    }
}
