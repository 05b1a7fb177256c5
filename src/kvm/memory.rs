//! Guest memory: anonymous pages, with files mapped privately over them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use mayfly_boot::{MapFile, layout};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestRegionCollectionError,
    GuestRegionMmap, MmapRegion,
};

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
    /// A region lies out of what can be addressed.
    #[error("guest memory at {0:#x} is out of the address space")]
    Address(u64),
    /// The regions do not fit together.
    #[error("laying out guest memory")]
    Layout(#[from] GuestRegionCollectionError),
}

/// Reserves `size` bytes, laid out around the hole for devices. A page costs
/// host memory only once the guest touches it.
pub fn guest_memory(size: u64) -> Result<GuestMemory, MemoryError> {
    let mut regions = Vec::new();
    for (start, len) in layout::ram_regions(size) {
        let bytes = usize::try_from(len).map_err(|_| MemoryError::Address(start))?;
        let mapping: MmapRegion<()> = MmapRegionBuilder::new(bytes)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .build()
            .map_err(|source| MemoryError::Map { size: len, source })?;
        regions.push(
            GuestRegionMmap::new(mapping, GuestAddress(start))
                .ok_or(MemoryError::Address(start))?,
        );
    }
    Ok(GuestMemory::from_regions(regions)?)
}

/// Maps files over a guest's memory.
pub struct FileMapper<'a>(pub &'a GuestMemory);

impl MapFile for FileMapper<'_> {
    fn map_file(&self, file: &File, offset: u64, addr: u64, len: u64) -> io::Result<bool> {
        let invalid = |error: GuestMemoryError| io::Error::new(io::ErrorKind::InvalidInput, error);
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        // The range must lie in one region, so that it lies in one mapping.
        let slice = self
            .0
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
            _ => Ok(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    #[test]
    fn a_mapped_file_shows_in_guest_memory_and_is_never_written() {
        let memory = guest_memory(1 << 20).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 0x2000]).unwrap();
        assert!(
            FileMapper(&memory)
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
        let memory = guest_memory(1 << 20).unwrap();
        let file = tempfile::tempfile().unwrap();
        let mapper = FileMapper(&memory);
        assert!(mapper.map_file(&file, 0, 0xff000, 0x2000).is_err());
        assert!(mapper.map_file(&file, 0, u64::MAX - 0xfff, 0x1000).is_err());
    }
}
