//! Gives guest memory back to the host.
//!
//! What is given back reads as zeroes from then on, whatever lay there.

#![allow(unsafe_code, reason = "guest memory is mapped")]

use std::io;
use std::ops::Range;

use mayfly_boot::layout::PAGE_SIZE;
use mayfly_devices::virtio::balloon::Reclaim;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::memory::GuestMemory;
use crate::config::MemoryConfig;

/// Takes guest memory for the host.
pub struct Reclaimer {
    memory: GuestMemory,
    page: u64,
}

impl Reclaimer {
    /// For memory that was made so.
    pub fn new(memory: &GuestMemory, config: &MemoryConfig) -> Self {
        Reclaimer {
            memory: memory.clone(),
            page: config.hugepages.map_or(PAGE_SIZE, |pages| pages.bytes()),
        }
    }

    /// Takes whole pages.
    fn take(&self, range: Range<u64>) -> io::Result<u64> {
        let len = range.end - range.start;
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        let start = GuestAddress(range.start);
        let region = self.memory.find_region(start);
        let advice = match region.is_some_and(|region| region.flags() & libc::MAP_SHARED != 0) {
            true => libc::MADV_REMOVE,
            false => libc::MADV_DONTNEED,
        };
        let slice = self
            .memory
            .get_slice(start, bytes)
            .map_err(io::Error::other)?;
        let host = slice.ptr_guard_mut().as_ptr().cast();
        // SAFETY: empties pages within our own mapping of guest memory, as `slice`
        // shows. Nothing in Rust refers to their content.
        match unsafe { libc::madvise(host, bytes, advice) } {
            0 => Ok(len),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Reclaim for Reclaimer {
    fn reclaim(&mut self, start: u64, len: u64) -> Option<u64> {
        let bytes = usize::try_from(len).ok()?;
        self.memory.get_slice(GuestAddress(start), bytes).ok()?;
        let end = start.checked_add(len)?;
        let pages = start.checked_next_multiple_of(self.page)?..end - end % self.page;
        if pages.is_empty() {
            return Some(0);
        }
        // Where that fails the guest loses nothing, the host gains nothing.
        let taken = self.take(pages);
        Some(taken.unwrap_or_else(|error| {
            log::debug!("giving memory back: {error}");
            0
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::memory::guest_memory;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::Bytes;

    const SIZE: u64 = 4 << 20;

    fn made(shared: bool) -> (GuestMemory, Reclaimer) {
        let config = MemoryConfig {
            size: SIZE,
            shared,
            ..Default::default()
        };
        let memory = guest_memory(&config).unwrap();
        let reclaimer = Reclaimer::new(&memory, &config);
        (memory, reclaimer)
    }

    fn byte(memory: &GuestMemory, at: u64) -> u8 {
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    #[test]
    fn whole_pages_go_and_read_as_zeroes() {
        for shared in [false, true] {
            let (memory, mut reclaimer) = made(shared);
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
        let (memory, mut reclaimer) = made(true);
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
    fn nothing_outside_of_memory_goes() {
        let (_, mut reclaimer) = made(false);
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
