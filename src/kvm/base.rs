//! The file that private guest memory begins as, and which pages no longer come from it.

#![allow(unsafe_code, reason = "guest memory is mapped")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mayfly_boot::layout::PAGE_SIZE;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::memory::GuestMemory;

/// How many pieces of a file's mapping may be replaced: each costs two mappings more, of
/// which Linux lets a process have 65,530 (`vm.max_map_count`).
const PIECES_MAX: usize = 16_384;

/// The ground of private guest memory: a file, but for what was given back to the host.
#[derive(Clone, Debug)]
pub struct Base {
    file: Arc<File>,
    released: Arc<Mutex<Released>>,
}

/// Pages that hold zeroes unless the guest wrote to them since.
#[derive(Debug, Default)]
struct Released {
    /// A bit for each page of the file.
    pages: Vec<u64>,
    /// How often a mapping was replaced by another.
    pieces: usize,
}

/// Looks at which pages were given back.
pub struct ReleasedPages<'a>(MutexGuard<'a, Released>);

impl ReleasedPages<'_> {
    /// Whether the page at an offset of the file was given back.
    pub fn contain(&self, offset: u64) -> bool {
        self.0.get(offset / PAGE_SIZE)
    }
}

impl Base {
    /// Of memory that was mapped over the file just now.
    pub fn new(file: File, memory: &GuestMemory) -> Self {
        let pages: u64 = memory.iter().map(|region| region.len() / PAGE_SIZE).sum();
        let words = usize::try_from(pages.div_ceil(u64::BITS.into())).unwrap_or(0);
        Base {
            file: Arc::new(file),
            released: Arc::new(Mutex::new(Released {
                pages: vec![0; words],
                pieces: 0,
            })),
        }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The pages that were given back. Meanwhile no more are.
    pub fn released(&self) -> ReleasedPages<'_> {
        ReleasedPages(self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Released> {
        self.released.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives whole pages of guest memory back to the host, so that they read as zeroes: the
    /// file's bytes, which would come back otherwise, are covered by an anonymous mapping.
    pub fn release(&self, memory: &GuestMemory, range: Range<u64>) -> io::Result<()> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = range.end.checked_sub(range.start).ok_or_else(outside)?;
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        let start = GuestAddress(range.start);
        let region = memory.find_region(start).ok_or_else(outside)?;
        let within = region.start_addr().raw_value();
        let offset = region
            .file_offset()
            .map(vm_memory::FileOffset::start)
            .and_then(|first| first.checked_add(range.start.checked_sub(within)?))
            .ok_or_else(outside)?;
        let slice = memory.get_slice(start, bytes).map_err(io::Error::other)?;
        let host: *mut libc::c_void = slice.ptr_guard_mut().as_ptr().cast();

        let pages = offset / PAGE_SIZE..(offset + len) / PAGE_SIZE;
        let mut released = self.lock();
        if pages.clone().all(|page| released.get(page)) {
            // SAFETY: empties anonymous pages within our mapping of guest memory, as `slice`
            // shows. Nothing in Rust refers to their content.
            return match unsafe { libc::madvise(host, bytes, libc::MADV_DONTNEED) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            };
        }
        if released.pieces >= PIECES_MAX {
            return Err(io::Error::other("the mapping is in too many pieces"));
        }
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: replaces a part of our mapping of guest memory, as `slice` shows, by one that
        // reads as zeroes. Nothing in Rust refers to its content.
        let mapped = unsafe { libc::mmap(host, bytes, protection, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        released.pieces += 1;
        pages.for_each(|page| released.set(page));
        drop(released);
        // As what was there: no dump has it, and huge pages are welcome.
        for advice in [libc::MADV_DONTDUMP, libc::MADV_HUGEPAGE] {
            // SAFETY: the mapping that was made just now; such advice changes no content.
            unsafe { libc::madvise(host, bytes, advice) };
        }
        Ok(())
    }
}

impl Released {
    fn get(&self, page: u64) -> bool {
        let Ok(word) = usize::try_from(page / u64::from(u64::BITS)) else {
            return false;
        };
        let bit = page % u64::from(u64::BITS);
        self.pages
            .get(word)
            .is_some_and(|word| word >> bit & 1 != 0)
    }

    fn set(&mut self, page: u64) {
        let Ok(word) = usize::try_from(page / u64::from(u64::BITS)) else {
            return;
        };
        let bit = page % u64::from(u64::BITS);
        if let Some(word) = self.pages.get_mut(word) {
            *word |= 1 << bit;
        }
    }
}
