//! Gives guest memory back to the host.
//!
//! What is given back reads as zeroes from then on, whatever lay there.

#![allow(unsafe_code, reason = "guest memory is mapped")]

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use mayfly_boot::layout::PAGE_SIZE;
use mayfly_devices::bus::lock;
use mayfly_devices::virtio::balloon::Reclaim;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::memory::GuestMemory;
use crate::config::MemoryConfig;

/// Of a mapped file nothing smaller is given back: each hole makes a mapping
/// more, and the host has a limit that the guest must not reach.
const FILE_MIN: u64 = 64 << 10;

/// The ranges of guest memory that files are mapped over.
#[derive(Clone, Default)]
pub struct MappedFiles(Arc<Mutex<Vec<Range<u64>>>>);

impl MappedFiles {
    /// Notes a file.
    pub fn add(&self, start: u64, len: u64) {
        // The kernel maps whole pages.
        let end = start.saturating_add(len).next_multiple_of(PAGE_SIZE);
        lock(&self.0).push(start..end);
    }

    /// The first piece of a range that is all file or has none, and which.
    fn piece(&self, range: Range<u64>) -> (Range<u64>, bool) {
        let files = lock(&self.0);
        if let Some(file) = files.iter().find(|file| file.contains(&range.start)) {
            return (range.start..range.end.min(file.end), true);
        }
        let starts = files.iter().map(|file| file.start);
        let next = starts.filter(|start| range.contains(start)).min();
        (range.start..next.unwrap_or(range.end), false)
    }
}

/// Takes guest memory for the host.
pub struct Reclaimer {
    memory: GuestMemory,
    page: u64,
    files: MappedFiles,
}

impl Reclaimer {
    /// For memory that was made so, with files mapped over it.
    pub fn new(memory: &GuestMemory, config: &MemoryConfig, files: &MappedFiles) -> Self {
        Reclaimer {
            memory: memory.clone(),
            page: config.hugepages.map_or(PAGE_SIZE, |pages| pages.bytes()),
            files: files.clone(),
        }
    }

    /// Takes whole pages, all of a mapped file or none.
    fn take(&self, range: Range<u64>, file: bool) -> io::Result<u64> {
        let len = range.end - range.start;
        if file && len < FILE_MIN {
            return Ok(0);
        }
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        let start = GuestAddress(range.start);
        let region = self.memory.find_region(start);
        let shared = region.is_some_and(|region| region.flags() & libc::MAP_SHARED != 0);
        let slice = self
            .memory
            .get_slice(start, bytes)
            .map_err(io::Error::other)?;
        let host = slice.ptr_guard_mut().as_ptr().cast();
        let failed = if file {
            // Dropping the pages would show the file again, even if it was
            // changed since.
            // SAFETY: replaces pages within our own mapping of guest memory, as
            // `slice` shows. Nothing in Rust refers to their content.
            let mapped = unsafe {
                libc::mmap(
                    host,
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            mapped == libc::MAP_FAILED
        } else {
            let advice = match shared {
                true => libc::MADV_REMOVE,
                false => libc::MADV_DONTNEED,
            };
            // SAFETY: empties pages within our own mapping of guest memory, as
            // `slice` shows. Nothing in Rust refers to their content.
            unsafe { libc::madvise(host, bytes, advice) != 0 }
        };
        match failed {
            false => Ok(len),
            true => Err(io::Error::last_os_error()),
        }
    }
}

impl Reclaim for Reclaimer {
    fn reclaim(&mut self, start: u64, len: u64) -> Option<u64> {
        let bytes = usize::try_from(len).ok()?;
        self.memory.get_slice(GuestAddress(start), bytes).ok()?;
        let end = start.checked_add(len)?;
        let mut rest = start.checked_next_multiple_of(self.page)?..end - end % self.page;
        let mut taken = 0;
        while rest.start < rest.end {
            let (piece, file) = self.files.piece(rest.clone());
            rest.start = piece.end;
            match self.take(piece, file) {
                Ok(len) => taken += len,
                // The guest loses nothing, the host gains nothing.
                Err(error) => log::debug!("giving memory back: {error}"),
            }
        }
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::memory::{FileMapper, guest_memory};
    use mayfly_boot::MapFile;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::Bytes;

    const SIZE: u64 = 4 << 20;

    fn made(shared: bool) -> (GuestMemory, Reclaimer, MappedFiles) {
        let config = MemoryConfig {
            size: SIZE,
            shared,
            ..Default::default()
        };
        let memory = guest_memory(&config).unwrap();
        let files = MappedFiles::default();
        let reclaimer = Reclaimer::new(&memory, &config, &files);
        (memory, reclaimer, files)
    }

    fn byte(memory: &GuestMemory, at: u64) -> u8 {
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    #[test]
    fn whole_pages_go_and_read_as_zeroes() {
        for shared in [false, true] {
            let (memory, mut reclaimer, _) = made(shared);
            let all = [7; 0x5000];
            memory.write_slice(&all, GuestAddress(0x10000)).unwrap();
            assert_eq!(reclaimer.reclaim(0x10800, 0x3000), Some(0x2000));
            assert_eq!(byte(&memory, 0x10fff), 7);
            assert_eq!(byte(&memory, 0x11000), 0);
            assert_eq!(byte(&memory, 0x12fff), 0);
            assert_eq!(byte(&memory, 0x13000), 7);
            assert_eq!(reclaimer.reclaim(0x10800, 0x800), Some(0));
            assert_eq!(reclaimer.reclaim(0x10000, 0), Some(0));
        }
    }

    #[test]
    fn a_memory_file_gets_smaller() {
        let (memory, mut reclaimer, _) = made(true);
        memory.write_slice(&[7; 1 << 20], GuestAddress(0)).unwrap();
        let region = memory.iter().next().unwrap();
        let blocks = || {
            region
                .file_offset()
                .unwrap()
                .file()
                .metadata()
                .unwrap()
                .blocks()
        };
        let before = blocks();
        assert_eq!(reclaimer.reclaim(0, 1 << 20), Some(1 << 20));
        assert!(blocks() + (1 << 20) / 512 <= before);
    }

    #[test]
    fn a_mapped_file_does_not_show_again() {
        let (memory, mut reclaimer, files) = made(false);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 0x30000]).unwrap();
        let mapper = FileMapper {
            memory: &memory,
            files: &files,
        };
        assert!(mapper.map_file(&file, 0, 0x100000, 0x30000).unwrap());
        memory
            .write_slice(&[9; 0x1000], GuestAddress(0x130000))
            .unwrap();
        // Too small to be worth a mapping; what follows is no file.
        assert_eq!(reclaimer.reclaim(0x12f000, 0x2000), Some(0x1000));
        assert_eq!(byte(&memory, 0x12ffff), 7);
        assert_eq!(byte(&memory, 0x130000), 0);
        assert_eq!(reclaimer.reclaim(0xf0000, 0x20000), Some(0x20000));
        assert_eq!(byte(&memory, 0x100000), 0);
        assert_eq!(byte(&memory, 0x110000), 7);
        assert_eq!(reclaimer.reclaim(0, SIZE), Some(SIZE));
        assert_eq!(byte(&memory, 0x110000), 0);
        memory.write_obj(5u8, GuestAddress(0x110000)).unwrap();
        assert_eq!(byte(&memory, 0x110000), 5);
    }

    #[test]
    fn nothing_outside_of_memory_goes() {
        let (_, mut reclaimer, _) = made(false);
        for (start, len) in [
            (SIZE, 0x1000),
            (SIZE - 0x1000, 0x2000),
            (u64::MAX - 0xfff, 0x1000),
            (0, u64::MAX),
            (u64::MAX, u64::MAX),
        ] {
            assert_eq!(reclaimer.reclaim(start, len), None, "{start:#x} {len:#x}");
        }
    }
}
