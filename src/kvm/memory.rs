//! Guest memory: anonymous pages, with files mapped privately over them, or a
//! memory file.

#![allow(unsafe_code, reason = "guest memory is mapped")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use mayfly_boot::{MapFile, layout};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestRegionCollectionError,
    GuestRegionMmap, MmapRegion,
};

use super::reclaim::MappedFiles;
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
        source: MmapRegionError,
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

/// Reserves memory, laid out around the hole for devices. A page costs host
/// memory only once the guest touches it.
pub fn guest_memory(config: &MemoryConfig) -> Result<GuestMemory, MemoryError> {
    let file = match config.hugepages.is_some() || config.shared {
        true => Some(memory_file(config).map_err(MemoryError::File)?),
        false => None,
    };
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, len) in layout::ram_regions(config.size) {
        let bytes = usize::try_from(len).map_err(|_| MemoryError::Address(start))?;
        let builder = MmapRegionBuilder::new(bytes)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(match (&file, config.shared) {
                (None, _) => libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE,
                (Some(_), true) => libc::MAP_SHARED,
                (Some(_), false) => libc::MAP_PRIVATE,
            });
        let builder = match &file {
            None => builder,
            Some(file) => {
                let file = file.try_clone().map_err(MemoryError::File)?;
                builder.with_file_offset(FileOffset::new(file, offset))
            }
        };
        let mapping: MmapRegion<()> = builder
            .build()
            .map_err(|source| MemoryError::Map { size: len, source })?;
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
        .try_for_each(|region| advise(region, libc::MADV_POPULATE_WRITE))
}

/// Leaves a guest's memory out of core dumps: it holds what the user keeps secret.
/// Called when all files are mapped.
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

/// Maps files over a guest's memory.
pub struct FileMapper<'a> {
    /// The memory.
    pub memory: &'a GuestMemory,
    /// Where it is noted.
    pub files: &'a MappedFiles,
}

impl MapFile for FileMapper<'_> {
    fn map_file(&self, file: &File, offset: u64, addr: u64, len: u64) -> io::Result<bool> {
        let invalid = |error: GuestMemoryError| io::Error::new(io::ErrorKind::InvalidInput, error);
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        // Whoever shares the memory must see what is loaded, and huge pages
        // cannot be replaced one by one: copy instead.
        if self
            .memory
            .iter()
            .any(|region| region.file_offset().is_some())
        {
            return Ok(false);
        }
        // The range must lie in one region, so that it lies in one mapping.
        let slice = self
            .memory
            .get_slice(GuestAddress(addr), bytes)
            .map_err(invalid)?;
        let host = slice.ptr_guard_mut();
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: replaces pages that lie within our own mapping of guest
        // memory, as `slice` shows, by private pages of the file. Nothing in
        // Rust refers to their content: guest memory is only copied.
        let mapped = unsafe {
            libc::mmap(
                host.as_ptr().cast(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        match mapped {
            libc::MAP_FAILED => match io::Error::last_os_error() {
                // A file system that does not map: copy instead.
                error if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
                error => Err(error),
            },
            _ => {
                self.files.add(addr, len);
                Ok(true)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    fn config(shared: bool) -> MemoryConfig {
        MemoryConfig {
            size: 1 << 20,
            shared,
            ..Default::default()
        }
    }

    fn mapper<'a>(memory: &'a GuestMemory, files: &'a MappedFiles) -> FileMapper<'a> {
        FileMapper { memory, files }
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
        let other = tempfile::tempfile().unwrap();
        let mapped = mapper(&memory, &MappedFiles::default()).map_file(&other, 0, 0x5000, 0x1000);
        assert!(!mapped.unwrap());
        prefault(&memory).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 7);
    }

    #[test]
    fn a_mapped_file_shows_in_guest_memory_and_is_never_written() {
        let memory = guest_memory(&config(false)).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 0x2000]).unwrap();
        assert!(
            mapper(&memory, &MappedFiles::default())
                .map_file(&file, 0x1000, 0x5000, 0x1000)
                .unwrap()
        );
        let at = GuestAddress(0x5000);
        assert_eq!(memory.read_obj::<u8>(at).unwrap(), 7);
        memory.write_obj(9u8, at).unwrap();
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 0x1000).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn files_are_not_mapped_outside_of_memory() {
        let memory = guest_memory(&config(false)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let files = MappedFiles::default();
        let mapper = mapper(&memory, &files);
        assert!(mapper.map_file(&file, 0, 0xff000, 0x2000).is_err());
        assert!(mapper.map_file(&file, 0, u64::MAX - 0xfff, 0x1000).is_err());
    }
}
