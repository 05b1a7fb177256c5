//! Guest memory in a file, with holes for what is zero.
//!
//! The file has the memory's regions one after the other. It is written from the pages that
//! the guest touched alone: looking at the others would make them. What memory over another
//! file ([`Base`]) did not change is taken from that file, so a snapshot of a restored VM is
//! whole, however deep.

#![allow(unsafe_code, reason = "a file has holes that only a system call shows")]

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use mayfly_boot::layout::PAGE_SIZE;
use vm_memory::{Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::kvm::base::Base;
use crate::kvm::memory::GuestMemory;

/// Whoever may read a memory file may read the guest's secrets.
const MODE: u32 = 0o600;
/// How much is read and looked at at once: a huge page.
const CHUNK: u64 = 2 << 20;

const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE && CHUNK.is_multiple_of(PAGE_SIZE));

/// What a page that is left out holds.
static ZEROES: [u8; PAGE] = [0; PAGE];

/// How long an entry of the page map is.
const PAGE_ENTRY: u64 = 8;
/// Bits of an entry of the page map (Linux, admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// A file's page, or a shared one: nothing that was written to private memory.
const OF_FILE: u64 = 1 << 61;

/// Why guest memory does not get into a file, or out of it.
#[derive(Debug, thiserror::Error)]
pub enum MemoryFileError {
    /// The kernel does not say which pages are there.
    #[error("reading this process's page map")]
    Pagemap(#[source] io::Error),
    /// The file cannot be written: the disk may be full.
    #[error("writing the memory file")]
    Write(#[source] io::Error),
    /// Guest memory, or the file beneath it, cannot be read.
    #[error("reading guest memory")]
    Read(#[source] io::Error),
    /// It is no memory file of this machine and user.
    #[error("{0}")]
    Unfit(&'static str),
    /// The file's properties cannot be read.
    #[error("looking at the memory file")]
    Look(#[source] io::Error),
}

type Region = vm_memory::GuestRegionMmap<()>;

/// The page map of this process. It must be opened before the process has given up
/// `/proc`; it needs no privileges.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens it.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Pagemap)
    }

    /// The entries of a region's pages, from an offset on.
    fn read(&self, region: &Region, offset: u64, len: u64) -> io::Result<Vec<u64>> {
        let size = size_of::<u64>();
        let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)? / PAGE * size];
        let host = u64::try_from(region.as_ptr().addr()).map_err(io::Error::other)?;
        let page = (host + offset) / PAGE_SIZE;
        self.0.read_exact_at(&mut bytes, page * PAGE_ENTRY)?;
        let entries = bytes.as_chunks().0.iter();
        Ok(entries.copied().map(u64::from_ne_bytes).collect())
    }
}

/// What a memory file became.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Bytes that are not in holes, of the guest's own writing.
    pub own: u64,
    /// Bytes that come from the file beneath, and were copied.
    pub copied: u64,
    /// The file shares its blocks with the one beneath.
    pub cloned: bool,
}

/// Makes an empty memory file, for its owner alone. Nothing of this name is there yet.
pub fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(MODE)
        .open(path)
}

/// Refuses what is no memory file for so much memory, or one that others may change or read.
pub fn check(file: &File, size: u64) -> Result<(), MemoryFileError> {
    let found = file.metadata().map_err(MemoryFileError::Look)?;
    // SAFETY: takes nothing.
    let user = unsafe { libc::geteuid() };
    let unfit = |reason| Err(MemoryFileError::Unfit(reason));
    match found {
        _ if !found.is_file() => unfit("the memory file is no file"),
        _ if found.uid() != user => unfit("the memory file is another user's"),
        _ if found.mode() & 0o777 & !MODE != 0 => unfit("others may open the memory file"),
        _ if found.len() != size => unfit("the memory file has another size than the memory"),
        _ => Ok(()),
    }
}

/// Writes the memory of a guest that does not run into a new file. `base` is what it is
/// private over, if so. The file is not safe from a power failure until it is synchronized:
/// that takes long, and the guest need not wait for it.
pub fn write(
    memory: &GuestMemory,
    base: Option<&Base>,
    pagemap: &Pagemap,
    file: &File,
) -> Result<Written, MemoryFileError> {
    let size = memory.iter().map(GuestMemoryRegion::len).sum();
    let cloned = base.is_some_and(|base| rustix::fs::ioctl_ficlone(file, base.file()).is_ok());
    file.set_len(size).map_err(MemoryFileError::Write)?;
    let mut writer = Writer {
        memory,
        file,
        buffer: Vec::new(),
        written: Written {
            cloned,
            ..Default::default()
        },
    };
    let mut offset = 0;
    for region in memory.iter() {
        if region.flags() & libc::MAP_SHARED != 0 {
            writer.shared_region(region, offset)?;
        } else {
            writer.private_region(region, offset, base, pagemap)?;
        }
        offset += region.len();
    }
    Ok(writer.written)
}

/// What a page of private memory holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Page {
    /// What the guest wrote.
    Own,
    /// What the file beneath has.
    Base,
    /// Zeroes.
    Zero,
}

struct Writer<'a> {
    memory: &'a GuestMemory,
    file: &'a File,
    buffer: Vec<u8>,
    written: Written,
}

impl Writer<'_> {
    /// Memory that is a file's: the file knows what is in it.
    fn shared_region(&mut self, region: &Region, to: u64) -> Result<(), MemoryFileError> {
        let source = region
            .file_offset()
            .ok_or(MemoryFileError::Unfit("shared memory has no file"))?;
        let from = source.start();
        for data in data_ranges(source.file(), from..from + region.len()) {
            let data = data.map_err(MemoryFileError::Read)?;
            let len = data.end - data.start;
            let read = |buffer: &mut [u8], at| source.file().read_exact_at(buffer, at);
            self.written.own += self.copy(data.start, to + (data.start - from), len, read)?;
        }
        Ok(())
    }

    /// Memory that the page map knows, over a file or over nothing.
    fn private_region(
        &mut self,
        region: &Region,
        to: u64,
        base: Option<&Base>,
        pagemap: &Pagemap,
    ) -> Result<(), MemoryFileError> {
        let start = region.start_addr().raw_value();
        for (page, run) in runs(region, base, pagemap).map_err(MemoryFileError::Pagemap)? {
            let (from, to, len) = (start + run.start, to + run.start, run.end - run.start);
            match page {
                Page::Own => self.own(from, to, len)?,
                Page::Zero if self.written.cloned => self.punch(to, len)?,
                Page::Zero => {}
                Page::Base if self.written.cloned => {}
                Page::Base => {
                    if let (Some(base), Some(first)) = (base, region.file_offset()) {
                        self.base(base, first.start() + run.start, to, len)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes guest memory, whose address is `from`.
    fn own(&mut self, from: u64, to: u64, len: u64) -> Result<(), MemoryFileError> {
        if self.written.cloned {
            // What is zero is left out below.
            self.punch(to, len)?;
        }
        let memory = self.memory;
        let read = |buffer: &mut [u8], at| {
            memory
                .read_slice(buffer, GuestAddress(at))
                .map_err(io::Error::other)
        };
        self.written.own += self.copy(from, to, len, read)?;
        Ok(())
    }

    /// Copies what a file beneath has.
    fn base(&mut self, base: &Base, from: u64, to: u64, len: u64) -> Result<(), MemoryFileError> {
        for data in data_ranges(base.file(), from..from + len) {
            let data = data.map_err(MemoryFileError::Read)?;
            let read = |buffer: &mut [u8], at| base.file().read_exact_at(buffer, at);
            let len = data.end - data.start;
            self.written.copied += self.copy(data.start, to + (data.start - from), len, read)?;
        }
        Ok(())
    }

    /// Copies from one place to another, but for pages of zeroes. The result is how many
    /// bytes were written.
    fn copy(
        &mut self,
        from: u64,
        to: u64,
        len: u64,
        read: impl Fn(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<u64, MemoryFileError> {
        let mut written = 0;
        for (offset, len) in chunks(len) {
            let bytes = usize::try_from(len).unwrap_or(0);
            self.buffer.resize(bytes, 0);
            read(&mut self.buffer, from + offset).map_err(MemoryFileError::Read)?;
            for (start, bytes) in nonzero(&self.buffer) {
                self.file
                    .write_all_at(bytes, to + offset + start)
                    .map_err(MemoryFileError::Write)?;
                written += u64::try_from(bytes.len()).unwrap_or(0);
            }
        }
        Ok(written)
    }

    /// Makes a part of the file read as zeroes.
    fn punch(&self, to: u64, len: u64) -> Result<(), MemoryFileError> {
        use rustix::fs::FallocateFlags as Flags;
        let flags = Flags::PUNCH_HOLE | Flags::KEEP_SIZE;
        rustix::fs::fallocate(self.file, flags, to, len)
            .map_err(|error| MemoryFileError::Write(error.into()))
    }
}

/// Parts of a length, each at most [`CHUNK`]: offset and length.
fn chunks(len: u64) -> impl Iterator<Item = (u64, u64)> {
    let step = usize::try_from(CHUNK).unwrap_or(usize::MAX);
    (0..len)
        .step_by(step)
        .map(move |offset| (offset, CHUNK.min(len - offset)))
}

/// Runs of pages that are not all zero: offset and content.
fn nonzero(bytes: &[u8]) -> Vec<(u64, &[u8])> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (start, content) in (0..).step_by(PAGE).zip(bytes.chunks(PAGE)) {
        // As the C library compares: many bytes at a time.
        if ZEROES.get(..content.len()) == Some(content) {
            continue;
        }
        let end = start + content.len();
        match runs.last_mut() {
            Some(run) if run.1 == start => run.1 = end,
            _ => runs.push((start, end)),
        }
    }
    let content = |(start, end)| Some((u64::try_from(start).ok()?, bytes.get(start..end)?));
    runs.into_iter().filter_map(content).collect()
}

/// What private memory holds, in order: runs of offsets in the region.
fn runs(
    region: &Region,
    base: Option<&Base>,
    pagemap: &Pagemap,
) -> io::Result<Vec<(Page, Range<u64>)>> {
    let first = region.file_offset().map_or(0, FileOffset::start);
    let released = base.map(Base::released);
    let mut runs: Vec<(Page, Range<u64>)> = Vec::new();
    for (offset, len) in chunks(region.len()) {
        let entries = pagemap.read(region, offset, len)?;
        for (start, entry) in (offset..).step_by(PAGE).zip(entries) {
            let page = match &released {
                _ if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 => Page::Own,
                Some(released) if !released.contain(first + start) => Page::Base,
                // A page of zeroes that was looked at, or none at all.
                _ => Page::Zero,
            };
            match runs.last_mut() {
                Some((last, run)) if *last == page => run.end = start + PAGE_SIZE,
                _ => runs.push((page, start..start + PAGE_SIZE)),
            }
        }
    }
    Ok(runs)
}

/// Guest-physical ranges that the guest wrote to since its memory was mapped over `base`:
/// exactly those, page by page.
pub fn changed(
    memory: &GuestMemory,
    base: &Base,
    pagemap: &Pagemap,
) -> io::Result<Vec<Range<u64>>> {
    let mut changed = Vec::new();
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        for (page, run) in runs(region, Some(base), pagemap)? {
            if page != Page::Base {
                join(&mut changed, start + run.start..start + run.end);
            }
        }
    }
    Ok(changed)
}

/// Guest-physical ranges that are in this process's memory: what the guest needed so far.
pub fn touched(memory: &GuestMemory, pagemap: &Pagemap) -> io::Result<Vec<Range<u64>>> {
    let mut touched = Vec::new();
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        for (offset, len) in chunks(region.len()) {
            for (at, entry) in (start + offset..)
                .step_by(PAGE)
                .zip(pagemap.read(region, offset, len)?)
            {
                if entry & (PRESENT | SWAPPED) != 0 {
                    join(&mut touched, at..at + PAGE_SIZE);
                }
            }
        }
    }
    Ok(touched)
}

/// Adds a range to those before it.
fn join(ranges: &mut Vec<Range<u64>>, next: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ => ranges.push(next),
    }
}

/// The parts of a file's range that are not holes.
pub(super) fn data_ranges(
    file: &File,
    range: Range<u64>,
) -> impl Iterator<Item = io::Result<Range<u64>>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let found = next_data(file, at).and_then(|start| match start {
            Some(start) if start < range.end => {
                let end = seek(file, start, libc::SEEK_HOLE)?;
                // Linux knows no data of no length; nothing here loops if it did.
                Ok(Some(start..end.clamp(start + 1, range.end)))
            }
            _ => Ok(None),
        });
        at = match &found {
            Ok(Some(data)) => data.end,
            _ => range.end,
        };
        found.transpose()
    })
}

/// Where data begins at or behind an offset, if any does.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match seek(file, at, libc::SEEK_DATA) {
        Ok(start) => Ok(Some(start)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

fn seek(file: &File, at: u64, whence: libc::c_int) -> io::Result<u64> {
    let at = libc::off_t::try_from(at).map_err(io::Error::other)?;
    // SAFETY: an open descriptor, and numbers. Nothing else uses the file's position.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::memory::{forkable_memory, guest_memory, memory_over, prefetch};
    use crate::spec::MemorySpec;
    use mayfly_boot::layout;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    /// With memory above the hole for devices.
    const LARGE: u64 = 5 << 30;
    const SMALL: u64 = 8 << 20;
    /// At edges of pages, of huge pages and of regions.
    const PLACES: [u64; 7] = [
        0,
        0x5fff,
        0x20_0000,
        layout::MMIO_HOLE_START - 1,
        layout::MMIO_HOLE_END,
        layout::MMIO_HOLE_END + 0x12_3456,
        layout::MMIO_HOLE_END + (2 << 30) - 1,
    ];

    fn private(size: u64) -> GuestMemory {
        let config = MemorySpec {
            size,
            ..Default::default()
        };
        guest_memory(&config).unwrap()
    }

    fn new_file() -> File {
        tempfile::tempfile().unwrap()
    }

    fn byte(memory: &GuestMemory, at: u64) -> u8 {
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn set(memory: &GuestMemory, at: u64, byte: u8) {
        memory.write_obj(byte, GuestAddress(at)).unwrap();
    }

    /// All of a small memory.
    fn content(memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = vec![0; SMALL as usize];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    #[test]
    fn a_large_memory_is_as_large_as_what_is_in_it() {
        let pagemap = Pagemap::open().unwrap();
        let (shared, _file) = forkable_memory(LARGE).unwrap();
        for memory in [private(LARGE), shared] {
            for (number, at) in (1..).zip(PLACES) {
                set(&memory, at, number);
            }
            // Touched, and yet zero.
            set(&memory, 0x40_0000, 0);
            byte(&memory, 0x60_0000);
            let before = touched(&memory, &pagemap).unwrap();

            let file = new_file();
            let written = write(&memory, None, &pagemap, &file).unwrap();
            assert_eq!(written.own, PLACES.len() as u64 * PAGE_SIZE);
            assert_eq!(file.metadata().unwrap().len(), LARGE);
            assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20);
            assert_eq!(touched(&memory, &pagemap).unwrap(), before);

            let clone = memory_over(&file, LARGE).unwrap();
            for (number, at) in (1..).zip(PLACES) {
                assert_eq!(byte(&clone, at), number, "{at:#x}");
                assert_eq!(byte(&clone, at ^ 0x800), 0);
            }
            assert_eq!(byte(&clone, 0x40_0000), 0);
        }
    }

    #[test]
    fn what_one_clone_touched_is_there_before_the_next_needs_it() {
        let pagemap = Pagemap::open().unwrap();
        let file = new_file();
        file.set_len(LARGE).unwrap();
        let first = memory_over(&file, LARGE).unwrap();
        byte(&first, 0x5000);
        set(&first, layout::MMIO_HOLE_END, 1);
        let needed = touched(&first, &pagemap).unwrap();
        let base = Base::new(file.try_clone().unwrap(), &first);
        let written = changed(&first, &base, &pagemap).unwrap();
        assert!(written[0].start == layout::MMIO_HOLE_END && written.len() == 1);

        let next = memory_over(&file, LARGE).unwrap();
        assert!(touched(&next, &pagemap).unwrap().is_empty());
        prefetch(&next, &needed, false).unwrap();
        prefetch(&next, &written, true).unwrap();
        // The kernel may bring a page's neighbours, too.
        let there = touched(&next, &pagemap).unwrap();
        for range in &needed {
            let found = |there: &Range<u64>| there.contains(&range.start);
            assert!(there.iter().any(found), "{range:x?} of {there:x?}");
        }
        let base = Base::new(file, &next);
        assert_eq!(changed(&next, &base, &pagemap).unwrap(), written);
        // Foreign ranges.
        let outside = [
            LARGE..u64::MAX,
            Range {
                start: u64::MAX,
                end: 0,
            },
            layout::MMIO_HOLE_START - 4096..LARGE,
        ];
        prefetch(&next, &outside, true).unwrap();
    }

    #[test]
    fn clones_of_clones_are_whole() {
        let pagemap = Pagemap::open().unwrap();
        let mut memory = private(SMALL);
        let mut base = None;
        for page in (0..SMALL).step_by(3 * 4096) {
            set(&memory, page, 0xff);
        }
        for generation in 0..5u8 {
            let own = u64::from(generation) * 0x10_0000;
            set(&memory, own + 0x1234, generation);
            set(&memory, own + 0x3000, 0);
            // Looked at, and not changed.
            byte(&memory, own + 0x6000);
            if let Some(base) = &base {
                let base: &Base = base;
                base.release(&memory, own + 0x9000..own + 0xd000).unwrap();
                set(&memory, own + 0xc001, 0xcc);
                let expected: Vec<_> = [0x1000..0x2000, 0x3000..0x4000, 0x9000..0xd000]
                    .map(|range: Range<u64>| own + range.start..own + range.end)
                    .into();
                assert_eq!(changed(&memory, base, &pagemap).unwrap(), expected);
            }
            let file = new_file();
            let written = write(&memory, base.as_ref(), &pagemap, &file).unwrap();
            assert_eq!(written.copied > 0, base.is_some() && !written.cloned);
            let clone = memory_over(&file, SMALL).unwrap();
            assert!(
                content(&clone) == content(&memory),
                "generation {generation}"
            );
            base = Some(Base::new(file, &clone));
            memory = clone;
        }
        assert_eq!(byte(&memory, 0x1234), 0);
        assert_eq!(byte(&memory, 0x40_1234), 4);
        assert_eq!(byte(&memory, 0x10_9000), 0);
        assert_eq!(byte(&memory, 0x10_c001), 0xcc);
    }

    #[test]
    fn what_others_may_change_or_read_is_no_memory_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let file = create(&path).unwrap();
        file.set_len(SMALL).unwrap();
        check(&file, SMALL).unwrap();
        assert!(create(&path).is_err());
        for mode in [0o640, 0o602, 0o604, 0o610] {
            file.set_permissions(Permissions::from_mode(mode)).unwrap();
            assert!(check(&file, SMALL).is_err(), "{mode:o}");
        }
        file.set_permissions(Permissions::from_mode(0o400)).unwrap();
        check(&file, SMALL).unwrap();
        check(&file, SMALL + 4096).unwrap_err();
        check(&File::open(folder.path()).unwrap(), SMALL).unwrap_err();
        check(&File::open("/dev/zero").unwrap(), 0).unwrap_err();
    }

    #[test]
    fn a_file_that_takes_no_more_is_an_error() {
        let pagemap = Pagemap::open().unwrap();
        let memory = private(SMALL);
        set(&memory, 0x5000, 1);
        let file = new_file();
        let read_only = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = File::open(read_only).unwrap();
        let error = write(&memory, None, &pagemap, &file).unwrap_err();
        assert!(matches!(error, MemoryFileError::Write(_)), "{error}");
    }

    #[test]
    fn runs_of_pages_are_found() {
        let mut bytes = vec![0; 5 * 4096];
        assert!(nonzero(&bytes).is_empty());
        for at in [0x1fff, 0x2000, 0x4fff] {
            bytes[at] = 1;
        }
        let starts = |runs: Vec<(u64, &[u8])>| -> Vec<_> {
            runs.iter()
                .map(|(start, bytes)| (*start, bytes.len()))
                .collect()
        };
        assert_eq!(
            starts(nonzero(&bytes)),
            [(0x1000, 0x2000), (0x4000, 0x1000)]
        );
        assert_eq!(starts(nonzero(&bytes[..0x4801])), [(0x1000, 0x2000)]);
    }
}
