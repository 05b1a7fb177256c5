//! Gives guest memory back to the host.
//!
//! What is given back reads as zeroes from then on, whatever lay there.

#![allow(unsafe_code, reason = "guest memory is mapped")]

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use mayfly_boot::layout::PAGE_SIZE;
use mayfly_devices::virtio::balloon::Reclaim;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::base::Base;
use super::memory::GuestMemory;
use crate::spec::MemorySpec;

/// Takes guest memory for the host.
pub struct Reclaimer {
    memory: GuestMemory,
    page: u64,
    base: BaseSlot,
}

/// What the memory is private over, if it is, and for whom else knows. A live fork changes it.
pub type BaseSlot = Arc<Mutex<Option<Base>>>;

impl Reclaimer {
    /// For memory that was made so.
    pub fn new(memory: &GuestMemory, config: &MemorySpec) -> Self {
        Reclaimer {
            memory: memory.clone(),
            page: config.hugepages.map_or(PAGE_SIZE, |pages| pages.bytes()),
            base: BaseSlot::default(),
        }
    }

    /// Says over which file the memory is private, now and later.
    pub fn with_base(self, base: BaseSlot) -> Self {
        Reclaimer { base, ..self }
    }

    /// Takes whole pages.
    fn take(&self, range: Range<u64>) -> io::Result<u64> {
        let len = range.end - range.start;
        let base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(base) = &*base {
            return base.release(&self.memory, range).map(|()| len);
        }
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
    use crate::kvm::memory::{exclude_from_dumps, guest_memory, memory_over};
    use std::os::unix::fs::{FileExt, MetadataExt};
    use vm_memory::Bytes;

    const SIZE: u64 = 4 << 20;

    fn made(shared: bool) -> (GuestMemory, Reclaimer) {
        let config = MemorySpec {
            size: SIZE,
            shared,
            ..Default::default()
        };
        let memory = guest_memory(&config).unwrap();
        let reclaimer = Reclaimer::new(&memory, &config);
        (memory, reclaimer)
    }

    /// Memory over a file full of sevens.
    fn over_a_file() -> (GuestMemory, Reclaimer, Base) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; SIZE as usize], 0).unwrap();
        let memory = memory_over(&file, SIZE).unwrap();
        let base = Base::new(file, &memory);
        let config = MemorySpec {
            size: SIZE,
            ..Default::default()
        };
        let slot = Arc::new(Mutex::new(Some(base.clone())));
        let reclaimer = Reclaimer::new(&memory, &config).with_base(slot);
        (memory, reclaimer, base)
    }

    #[test]
    fn what_a_file_had_does_not_come_back() {
        let (memory, mut reclaimer, base) = over_a_file();
        exclude_from_dumps(&memory).unwrap();
        memory
            .write_slice(&[8; 0x3000], GuestAddress(0x10000))
            .unwrap();
        assert_eq!(reclaimer.reclaim(0x11000, 0x1000), Some(0x1000));
        assert_eq!(reclaimer.reclaim(0x200000, 0x200000), Some(0x200000));
        for (at, expected) in [
            (0xffff, 7),
            (0x10fff, 8),
            (0x11000, 0),
            (0x11fff, 0),
            (0x12000, 8),
            (0x13000, 7),
            (0x200000, 0),
            (SIZE - 1, 0),
        ] {
            assert_eq!(byte(&memory, at), expected, "{at:#x}");
        }
        assert!(base.released().contain(0x11000) && !base.released().contain(0x12000));
        // Once more, with what the guest wrote since.
        memory
            .write_slice(&[9; 0x3000], GuestAddress(0x10000))
            .unwrap();
        assert_eq!(byte(&memory, 0x11000), 9);
        assert_eq!(reclaimer.reclaim(0x11000, 0x1000), Some(0x1000));
        assert_eq!(byte(&memory, 0x11000), 0);
        assert_eq!(byte(&memory, 0x12000), 9);
        // Nothing of it reaches the file, and no dump has any of it.
        let mut bytes = vec![0; SIZE as usize];
        base.file().read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 7));
        assert!(dumped(&memory).is_empty());
    }

    /// Mappings of guest memory that a dump would have.
    fn dumped(memory: &GuestMemory) -> Vec<String> {
        let start = memory.get_host_address(GuestAddress(0)).unwrap().addr();
        let ours = start..start + SIZE as usize;
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut current = false;
        let mut found = Vec::new();
        for line in maps.lines() {
            if let Some((from, _)) = line.split_once('-')
                && let Ok(from) = usize::from_str_radix(from, 16)
            {
                current = ours.contains(&from);
            }
            if current && line.starts_with("VmFlags:") && !line.contains(" dd") {
                found.push(line.to_owned());
            }
        }
        found
    }

    #[test]
    fn a_mapping_is_never_in_more_pieces_than_linux_allows() {
        const PAGES: u64 = 40_000;
        let file = tempfile::tempfile().unwrap();
        let size = PAGES * PAGE_SIZE;
        file.set_len(size).unwrap();
        let memory = memory_over(&file, size).unwrap();
        let base = Base::new(file, &memory);
        let every_other = |page: u64| page * 2 * PAGE_SIZE..(page * 2 + 1) * PAGE_SIZE;
        let given = (0..PAGES / 2)
            .take_while(|page| base.release(&memory, every_other(*page)).is_ok())
            .count();
        assert_eq!(given, 16_384);
        // Those that are in pieces go on.
        base.release(&memory, every_other(0)).unwrap();
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
