//! Guest memory: anonymous pages, or a memory file.

#![allow(unsafe_code, reason = "guest memory is mapped")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

use mayfly_boot::layout;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion,
    GuestRegionCollectionError, GuestRegionMmap, MmapRegion,
};

use crate::spec::{HugePages, MemorySpec};

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
    /// The file is another machine's, or incomplete.
    #[error("the memory file has {found} bytes instead of {size}")]
    Length {
        /// Its length.
        found: u64,
        /// The size of the guest's memory.
        size: u64,
    },
    /// It would be in core dumps.
    #[error("excluding guest memory from core dumps")]
    Dumps(#[source] io::Error),
    /// A region lies out of what can be addressed.
    #[error("guest memory at {0:#x} is out of the address space")]
    Address(u64),
    /// The regions do not fit together.
    #[error("laying out guest memory")]
    Layout(#[from] GuestRegionCollectionError),
}

/// How guest memory is mapped: a guest's code is not run from here.
const PROTECTION: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// How a file is mapped that guest memory begins as. As with pages of zeroes, the host need
/// not have room for all of it: clones share most.
const OVER: libc::c_int = libc::MAP_PRIVATE | libc::MAP_NORESERVE;

/// What keeps a memory file's size.
const SIZE_SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

/// What a huge page's address is a multiple of, in the guest and here: only where both
/// agree, KVM maps it as one. Linux does so by itself from 6.7 on.
const ALIGNMENT: usize = 2 << 20;

/// Reserves memory, laid out around the hole for devices, until the process ends. A page
/// costs host memory only once the guest touches it.
pub fn guest_memory(config: &MemorySpec) -> Result<GuestMemory, MemoryError> {
    let file = match config.hugepages.is_some() || config.shared {
        true => Some(memory_file(config).map_err(MemoryError::File)?),
        false => None,
    };
    let alignment = match config.hugepages {
        Some(pages) => usize::try_from(pages.bytes()).unwrap_or(ALIGNMENT),
        None => ALIGNMENT,
    };
    let source = match &file {
        None => Source::Anonymous,
        Some(file) if config.shared => Source::Shared(file),
        Some(file) => Source::Private(file),
    };
    let memory = map(config.size, source, alignment)?;
    if config.hugepages.is_none() {
        advise_huge(&memory);
    }
    Ok(memory)
}

/// Memory in a file of its own, which [`freeze`] can make the common ground of clones later.
/// Nobody can change the file's size.
pub fn forkable_memory(size: u64) -> Result<(GuestMemory, File), MemoryError> {
    let file = memfd(size, 0, SIZE_SEALS).map_err(MemoryError::File)?;
    let memory = map(size, Source::Shared(&file), ALIGNMENT)?;
    advise_huge(&memory);
    Ok((memory, file))
}

/// Memory that begins as a file is, and keeps what the guest writes to itself. The file has
/// the memory's regions one after the other, and nothing more.
pub fn memory_over(file: &File, size: u64) -> Result<GuestMemory, MemoryError> {
    let found = file.metadata().map_err(MemoryError::File)?.len();
    if found != size {
        return Err(MemoryError::Length { found, size });
    }
    let memory = map(size, Source::Over(file), ALIGNMENT)?;
    advise_huge(&memory);
    Ok(memory)
}

/// Puts the file of [`forkable_memory`] beyond change, while the guest does not run, and
/// while no I/O of its goes on: its memory stays where it is, but what it writes from now on
/// is its own. The result is the same memory, as it is mapped now.
pub fn freeze(memory: &GuestMemory, file: &File) -> Result<GuestMemory, MemoryError> {
    let mut regions = Vec::new();
    for region in memory.iter() {
        let (len, start) = (region.len(), region.start_addr().raw_value());
        let offset = region.file_offset().map_or(0, FileOffset::start);
        let file = file.try_clone().map_err(MemoryError::File)?;
        let file = FileOffset::new(file, offset);
        remap(region, OVER, Some(&file))
            .map_err(|source| MemoryError::Map { size: len, source })?;
        let host = region.as_ptr();
        regions.push(region_at(host, region.size(), OVER, Some(file), start)?);
    }
    seal(file, libc::F_SEAL_WRITE).map_err(MemoryError::File)?;
    let memory = GuestMemory::from_regions(regions)?;
    // The new mappings know nothing of what was asked for the old ones.
    exclude_from_dumps(&memory).map_err(MemoryError::Dumps)?;
    advise_huge(&memory);
    Ok(memory)
}

/// Where a guest's memory comes from.
#[derive(Clone, Copy)]
enum Source<'a> {
    /// Pages of zeroes.
    Anonymous,
    /// A file that shows what the guest writes.
    Shared(&'a File),
    /// A pool of pages that are set aside for the guest.
    Private(&'a File),
    /// A file that the guest's memory begins as.
    Over(&'a File),
}

/// Maps all regions, which lie one after the other in a file.
fn map(size: u64, source: Source, alignment: usize) -> Result<GuestMemory, MemoryError> {
    let (file, flags) = match source {
        Source::Anonymous => (
            None,
            libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        ),
        Source::Shared(file) => (Some(file), libc::MAP_SHARED),
        Source::Private(file) => (Some(file), libc::MAP_PRIVATE),
        Source::Over(file) => (Some(file), OVER),
    };
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, len) in layout::ram_regions(size) {
        let bytes = usize::try_from(len).map_err(|_| MemoryError::Address(start))?;
        let file = match file {
            None => None,
            Some(file) => {
                let file = file.try_clone().map_err(MemoryError::File)?;
                Some(FileOffset::new(file, offset))
            }
        };
        let host = map_aligned(bytes, alignment, PROTECTION, flags, file.as_ref())
            .map_err(|source| MemoryError::Map { size: len, source })?;
        regions.push(region_at(host, bytes, flags, file, start)?);
        offset += len;
    }
    Ok(GuestMemory::from_regions(regions)?)
}

/// A region of the guest's memory whose mapping is there, and stays.
fn region_at(
    host: *mut u8,
    bytes: usize,
    flags: libc::c_int,
    file: Option<FileOffset>,
    start: u64,
) -> Result<GuestRegionMmap<()>, MemoryError> {
    // SAFETY: both callers made a mapping of that size, which is never taken away.
    let mut builder = unsafe { MmapRegionBuilder::new(bytes).with_raw_mmap_pointer(host) }
        .with_mmap_prot(PROTECTION)
        .with_mmap_flags(flags);
    if let Some(file) = file {
        builder = builder.with_file_offset(file);
    }
    let mapping: MmapRegion<()> = builder.build().map_err(|error| MemoryError::Map {
        size: bytes.try_into().unwrap_or(u64::MAX),
        source: io::Error::other(error),
    })?;
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::Address(start))
}

/// Maps something else in a region's place.
fn remap(region: &MmapRegion<()>, flags: libc::c_int, file: Option<&FileOffset>) -> io::Result<()> {
    let (fd, offset) = place(file)?;
    let host: *mut libc::c_void = region.as_ptr().cast();
    // SAFETY: it replaces a mapping of ours by one of the same size. Rust refers to nothing in
    // it, and its content is anyone's to change.
    let mapped = unsafe {
        libc::mmap(
            host,
            region.size(),
            PROTECTION,
            flags | libc::MAP_FIXED,
            fd,
            offset,
        )
    };
    match mapped {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// A part of a file, as `mmap` wants it.
fn place(file: Option<&FileOffset>) -> io::Result<(libc::c_int, libc::off_t)> {
    Ok(match file {
        Some(file) => (
            file.file().as_raw_fd(),
            libc::off_t::try_from(file.start()).map_err(io::Error::other)?,
        ),
        None => (-1, 0),
    })
}

/// Asks for huge pages where the kernel has them to give.
fn advise_huge(memory: &GuestMemory) {
    for region in memory.iter() {
        // Advice: a kernel without transparent huge pages may refuse it.
        let _ = advise(region, libc::MADV_HUGEPAGE);
    }
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
    let (fd, offset) = place(file)?;
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

/// A file in memory of the guest's size, for whoever shares it: nobody can take it from
/// under us.
fn memory_file(config: &MemorySpec) -> io::Result<File> {
    let huge = match config.hugepages {
        None => 0,
        Some(HugePages::Mib2) => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        Some(HugePages::Gib1) => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
    };
    memfd(config.size, huge, SIZE_SEALS | libc::F_SEAL_SEAL)
}

fn memfd(size: u64, flags: libc::c_uint, seals: libc::c_int) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags;
    // SAFETY: a string that lives until the call returns.
    let fd = unsafe { libc::memfd_create(c"guest memory".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, that nothing else owns.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size)?;
    seal(&file, seals)?;
    Ok(file)
}

fn seal(file: &File, seals: libc::c_int) -> io::Result<()> {
    // SAFETY: an open descriptor, and numbers.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(()),
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

/// Makes pages be there that a guest is about to need: to be read, or to be written to. Ranges
/// that lie out of the guest's memory are left out; the others are of whole pages.
pub fn prefetch(memory: &GuestMemory, ranges: &[Range<u64>], written: bool) -> io::Result<()> {
    let advice = match written {
        true => libc::MADV_POPULATE_WRITE,
        false => libc::MADV_POPULATE_READ,
    };
    for range in ranges {
        let len = range.end.saturating_sub(range.start);
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let Ok(slice) = memory.get_slice(GuestAddress(range.start), len) else {
            continue;
        };
        let host = slice.ptr_guard_mut().as_ptr().cast();
        // SAFETY: it lies in our mapping of guest memory, as `slice` shows; such advice changes
        // no content.
        if unsafe { libc::madvise(host, len, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
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
    use vm_memory::Bytes;

    fn config(shared: bool) -> MemorySpec {
        MemorySpec {
            size: 1 << 20,
            shared,
            ..Default::default()
        }
    }

    #[test]
    fn huge_pages_of_the_guest_are_huge_pages_here() {
        for shared in [false, true] {
            let memory = guest_memory(&MemorySpec {
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

    #[test]
    fn a_file_of_another_size_is_no_memory() {
        let file = tempfile::tempfile().unwrap();
        for len in [0, (1 << 20) - 1, (1 << 20) + 4096] {
            file.set_len(len).unwrap();
            let error = memory_over(&file, 1 << 20).unwrap_err();
            assert!(matches!(error, MemoryError::Length { .. }), "{error}");
        }
    }

    #[test]
    fn clones_and_their_source_keep_to_themselves_what_they_write() {
        const SIZE: u64 = layout::MMIO_HOLE_START + (4 << 20);
        const PLACES: [u64; 3] = [0x5000, layout::MMIO_HOLE_START - 1, layout::MMIO_HOLE_END];
        let (memory, file) = forkable_memory(SIZE).unwrap();
        for at in PLACES {
            memory.write_obj(7u8, GuestAddress(at)).unwrap();
        }
        let host = memory.get_host_address(GuestAddress(0x5000)).unwrap();
        let source = freeze(&memory, &file).unwrap();
        assert_eq!(source.get_host_address(GuestAddress(0x5000)).unwrap(), host);
        let clones: Vec<_> = (0..2).map(|_| memory_over(&file, SIZE).unwrap()).collect();
        for at in PLACES {
            memory.write_obj(8u8, GuestAddress(at)).unwrap();
            clones[0].write_obj(9u8, GuestAddress(at)).unwrap();
            let now: [u8; 3] = [&source, &clones[0], &clones[1]]
                .map(|memory| memory.read_obj(GuestAddress(at)).unwrap());
            assert_eq!(now, [8, 9, 7]);
        }
        for region in source.iter().chain(clones[1].iter()) {
            assert_eq!(region.as_ptr().addr() % ALIGNMENT, 0);
            assert_eq!(region.flags() & libc::MAP_SHARED, 0);
        }
        // Nobody changes the ground of all three.
        assert!(std::os::unix::fs::FileExt::write_at(&file, &[1], 0).is_err());
        assert!(file.set_len(SIZE * 2).is_err());
    }
}
