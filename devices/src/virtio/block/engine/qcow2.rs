//! QEMU's image format (QEMU's `docs/interop/qcow2.txt`), by the crate `imago`.
//!
//! Nothing that the image names is opened: its header is checked here first,
//! and the backing file is the one that is given, or none.
//!
//! `imago` keeps counts of references back that tables on disk need already. So
//! an image is marked before it is first written to, until it was closed in
//! order: what a killed process left is not written to before it is repaired.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::{Mutex, PoisonError, RwLock};

use imago::file::File as Storage;
use imago::{DenyImplicitOpenGate, FormatDriverBuilder, Mapping, Storage as _, StorageExt as _};

use super::operation::Kind;
use super::page_cache::PageCache;
use super::plain_clusters::PlainClusters;
use super::threads::Worker;
use crate::bus::lock;

type Access = imago::FormatAccess<Storage>;

/// The size of the header's part that is checked.
const HEADER: usize = 104;
const MAGIC: [u8; 4] = *b"QFI\xfb";
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
const ENTRY: u64 = 8;
/// QEMU's limits on tables that are held in memory.
const L1_TABLE_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_MAX: u64 = 8 << 20;
/// A file's offsets are signed.
const SIZE_MAX: u64 = i64::MAX as u64;
/// Where the lowest byte of the incompatible features is; the lowest bit says
/// that the image was not closed.
const MARK: u64 = 79;
/// Incompatible features, by bit, and what to do about them.
const FEATURES: [(&str, &str); 5] = [
    (
        "was not closed cleanly: who used it was killed",
        "repair it: qemu-img check -r all IMAGE",
    ),
    (
        "is marked as corrupt",
        "repair it: qemu-img check -r all IMAGE",
    ),
    (
        "keeps its data in another file",
        "make it one file: qemu-img convert -O qcow2",
    ),
    (
        "is not compressed by zlib",
        "convert it: qemu-img convert -O qcow2",
    ),
    (
        "has extended L2 entries",
        "convert it: qemu-img convert -O qcow2",
    ),
];
/// How far behind a request it is looked where clusters lie.
const AHEAD: u64 = 16 << 20;
/// How much is copied at a time, where it has to be.
const CHUNK: usize = 256 << 10;

thread_local! {
    /// Kept from request to request: new memory would be mapped for each, and
    /// cost more than all the rest.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It has another format, or none.
    #[error("is not a qcow2 image; without format=qcow2 it is a raw one")]
    NoQcow2,
    /// It is of another version.
    #[error("is of version {0} of qcow2; versions 2 and 3 are known")]
    Version(u32),
    /// It is of the version that cannot be marked.
    #[error(
        "is of version 2 of qcow2, which cannot tell that its VM was killed; \
         make it version 3 (qemu-img amend -f qcow2 -o compat=v3 IMAGE), or take it with ,ro"
    )]
    Unmarkable,
    /// A feature that is not supported.
    #[error("{0}; {1}")]
    Feature(&'static str, &'static str),
    /// A feature of the future.
    #[error("has features that are not known: {0:#x}")]
    Unknown(u64),
    /// Its content is encrypted.
    #[error("is encrypted; decrypt it: qemu-img convert -O qcow2")]
    Encrypted,
    /// It has bitmaps, which writing would make wrong.
    #[error(
        "has bitmaps or other notes of its content, which do not follow what a guest writes; \
         remove them (qemu-img bitmap --remove), or take it with ,ro"
    )]
    Autoclear,
    /// A number in the header is impossible.
    #[error("is damaged: its {0} is impossible")]
    Damaged(&'static str),
    /// It needs a backing file.
    #[error("is only the difference to a backing file; name that, too: backing=FILE")]
    BackingNeeded,
    /// It has no backing file.
    #[error("has no backing file; leave backing= out")]
    NoBacking,
    /// Reading it failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What is believed of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    size: u64,
    backed: bool,
    cluster: u64,
    refcount_table: u64,
}

impl Header {
    /// Checks the header of a file of a length.
    fn parse(bytes: &[u8; HEADER], len: u64, writable: bool) -> Result<Self, ImageError> {
        let word = |at: usize| -> u32 {
            let field = bytes.get(at..).and_then(<[u8]>::first_chunk);
            field.map_or(0, |field| u32::from_be_bytes(*field))
        };
        let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
        if !bytes.starts_with(&MAGIC) {
            return Err(ImageError::NoQcow2);
        }
        let version = word(4);
        let (incompatible, autoclear) = match version {
            2 if writable => return Err(ImageError::Unmarkable),
            2 => (0, 0),
            3 => (long(72), long(88)),
            other => return Err(ImageError::Version(other)),
        };
        for (bit, (what, remedy)) in FEATURES.iter().enumerate() {
            if incompatible & 1 << bit != 0 {
                return Err(ImageError::Feature(what, remedy));
            }
        }
        if incompatible != 0 {
            return Err(ImageError::Unknown(incompatible));
        }
        if word(32) != 0 {
            return Err(ImageError::Encrypted);
        }
        if writable && autoclear != 0 {
            return Err(ImageError::Autoclear);
        }
        let possible = |possible, name| match possible {
            true => Ok(()),
            false => Err(ImageError::Damaged(name)),
        };
        let (cluster_bits, size) = (word(20), long(24));
        possible(CLUSTER_BITS.contains(&cluster_bits), "cluster size")?;
        possible(size <= SIZE_MAX, "size")?;
        let cluster = 1u64 << cluster_bits;
        let inside = |offset, size| lies_inside(offset, size, cluster, len);
        let l1 = u64::from(word(36)) * ENTRY;
        possible(l1 <= L1_TABLE_MAX, "L1 table")?;
        possible(l1 == 0 || inside(long(40), l1), "L1 table")?;
        let refcounts = u64::from(word(56)) << cluster_bits;
        possible(refcounts <= REFCOUNT_TABLE_MAX, "refcount table")?;
        possible(inside(long(48), refcounts), "refcount table")?;
        possible(refcounts > 0, "refcount table")?;
        possible(version == 2 || word(96) <= 6, "refcount size")?;
        Ok(Header {
            size,
            backed: long(8) != 0,
            cluster,
            refcount_table: long(48),
        })
    }
}

/// A table starts at a cluster behind the header's, and ends within the file.
fn lies_inside(offset: u64, size: u64, cluster: u64, len: u64) -> bool {
    let end = offset.checked_add(size);
    offset.is_multiple_of(cluster) && offset > 0 && end.is_some_and(|end| end <= len)
}

/// An image of this format.
#[derive(Debug)]
pub struct Qcow2 {
    /// Written to by whom must be alone: a discard gives room back that others
    /// may be about to use, zeroes may be a whole cluster that takes the place of
    /// one being written to, and a flush must not see tables without their counts.
    access: RwLock<Access>,
    /// The same file.
    file: File,
    cache: PageCache,
    /// Valid while `access` is held; what moves tables empties it.
    plain: PlainClusters,
    /// The file says that it was not closed.
    marked: Mutex<bool>,
    size: u64,
}

/// The size of an image's disk in bytes, as its header says, which must be one of an image
/// that can be used so.
pub fn qcow2_size(mut file: &File, writable: bool) -> Result<u64, ImageError> {
    let mut bytes = [0; HEADER];
    read_at(file, 0, &mut bytes)?;
    let len = file.seek(SeekFrom::End(0))?;
    Ok(Header::parse(&bytes, len, writable)?.size)
}

/// What an image is the difference to: an image that is only read.
pub struct Backing(Access);

impl Backing {
    /// A disk's bytes.
    pub fn raw(file: File) -> io::Result<Self> {
        let raw = imago::raw::Raw::builder(Storage::try_from(file)?).write(false);
        let raw = raw.open(DenyImplicitOpenGate::default())?;
        Ok(Backing(Access::new(raw)))
    }
}

impl From<Qcow2> for Backing {
    fn from(image: Qcow2) -> Self {
        let access = image.access.into_inner();
        Backing(access.unwrap_or_else(PoisonError::into_inner))
    }
}

impl Qcow2 {
    /// Checks and takes over an image, open as `writable` says, and its backing
    /// file, if it has one. The files are not changed by this.
    pub fn open(file: File, writable: bool, backing: Option<Backing>) -> Result<Self, ImageError> {
        let mut bytes = [0; HEADER];
        read_at(&file, 0, &mut bytes)?;
        let len = (&file).seek(SeekFrom::End(0))?;
        let header = Header::parse(&bytes, len, writable)?;
        if writable {
            // Without a count of its own header's references, an image is not
            // one that room can be found in.
            let mut first = [0; size_of::<u64>()];
            read_at(&file, header.refcount_table, &mut first)?;
            let block = u64::from_be_bytes(first);
            if !lies_inside(block, header.cluster, header.cluster, len) {
                return Err(ImageError::Damaged("refcount table"));
            }
        }
        let backing = match (header.backed, backing) {
            (false, None) => None,
            (true, Some(Backing(access))) => Some(access),
            (true, None) => return Err(ImageError::BackingNeeded),
            (false, Some(_)) => return Err(ImageError::NoBacking),
        };
        let image = imago::qcow2::Qcow2::<Storage>::builder(Storage::try_from(file.try_clone()?)?)
            .write(writable)
            .backing(backing)
            .data_file(None)
            .open(DenyImplicitOpenGate::default())?;
        Ok(Qcow2 {
            access: RwLock::new(Access::new(image)),
            cache: PageCache::new(&file)?,
            plain: PlainClusters::new(header.cluster),
            file,
            marked: Mutex::new(false),
            size: header.size,
        })
    }

    /// Marks the image, before it is first written to.
    fn mark(&self) -> io::Result<()> {
        let mut marked = lock(&self.marked);
        if !*marked {
            // The other bits are not set: such images are refused.
            self.file.write_all_at(&[1], MARK)?;
            self.file.sync_data()?;
            *marked = true;
        }
        Ok(())
    }

    /// Takes the mark off, if all else is in the file.
    fn unmark(&self) -> io::Result<()> {
        let mut marked = lock(&self.marked);
        if *marked {
            self.flush()?;
            self.file.write_all_at(&[0], MARK)?;
            self.file.sync_data()?;
            *marked = false;
        }
        Ok(())
    }

    fn shared(&self, work: impl FnOnce(&Access) -> io::Result<()>) -> io::Result<()> {
        work(&self.access.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn exclusive(&self, work: impl FnOnce(&mut Access) -> io::Result<()>) -> io::Result<()> {
        let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        self.plain.clear();
        work(&mut access)
    }

    /// The image is marked, and nobody is about to change that.
    fn is_marked(&self) -> bool {
        self.marked.try_lock().is_ok_and(|marked| *marked)
    }

    fn flush(&self) -> io::Result<()> {
        // It moves no data.
        let access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        access.flush()?;
        drop(access);
        self.shared(|access| access.sync())
    }

    /// The image's file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// Reads bytes of a file; those behind its end stay as they are.
fn read_at(file: &File, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Buffers in guest memory, a part at a time.
#[derive(Clone, Copy)]
struct Pieces<'a> {
    iovecs: &'a [libc::iovec],
    /// What is done of the first.
    done: usize,
}

impl Pieces<'_> {
    /// # Safety
    ///
    /// There must be `count` of them, which are valid while this lives, as is
    /// what they point to.
    unsafe fn new<'a>(iovecs: *const libc::iovec, count: usize) -> Pieces<'a> {
        let iovecs = match count {
            0 => &[],
            // SAFETY: the caller's promise.
            _ => unsafe { std::slice::from_raw_parts(iovecs, count) },
        };
        Pieces { iovecs, done: 0 }
    }

    fn len(&self) -> usize {
        self.iovecs
            .iter()
            .fold(0, |sum, iovec| sum.saturating_add(iovec.iov_len))
    }

    /// The next piece of at most `len` bytes, which are at least one.
    fn next(&mut self, len: usize) -> Option<libc::iovec> {
        loop {
            let (first, others) = self.iovecs.split_first()?;
            let len = len.min(first.iov_len - self.done);
            if len > 0 {
                let start = first.iov_base.wrapping_byte_add(self.done);
                self.done += len;
                return Some(libc::iovec {
                    iov_base: start,
                    iov_len: len,
                });
            }
            (self.iovecs, self.done) = (others, 0);
        }
    }

    /// The next pieces, of `len` bytes together, or all that there are.
    fn take(&mut self, len: usize) -> Vec<libc::iovec> {
        let mut pieces = Vec::new();
        let mut left = len;
        while left > 0
            && let Some(piece) = self.next(left)
        {
            left -= piece.iov_len;
            pieces.push(piece);
        }
        pieces
    }

    fn write(&mut self, mut data: &[u8]) {
        while !data.is_empty()
            && let Some(piece) = self.next(data.len())
        {
            let (now, later) = data.split_at(piece.iov_len);
            // SAFETY: the piece is valid for its length, and it is no Rust object.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), piece.iov_base.cast(), now.len()) };
            data = later;
        }
    }

    fn zero(&mut self, mut len: usize) {
        while len > 0
            && let Some(piece) = self.next(len)
        {
            // SAFETY: the piece is valid for its length, and it is no Rust object.
            unsafe { ptr::write_bytes(piece.iov_base.cast::<u8>(), 0, piece.iov_len) };
            len -= piece.iov_len;
        }
    }

    /// Reads or writes the next `len` bytes where a file has them, at an offset;
    /// behind its end are zeroes.
    fn transfer(&mut self, file: &File, kind: Kind, mut at: u64, mut len: usize) -> io::Result<()> {
        while len > 0 {
            let mut later = *self;
            let now = later.take(len);
            // SAFETY: the pieces are valid.
            match unsafe { file.run(kind, at, now.as_ptr(), now.len()) } {
                Ok(0) if kind == Kind::Read => {
                    self.zero(len);
                    len = 0;
                }
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(moved) if moved == len => {
                    *self = later;
                    len = 0;
                }
                Ok(moved) => {
                    self.take(moved);
                    at = at.saturating_add(moved as u64);
                    len = len.saturating_sub(moved);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Straight into guest memory where the image has the data as they are;
    /// through a buffer otherwise: `imago` has slices of bytes, which nobody else
    /// may write to meanwhile.
    fn read(&self, access: &Access, mut at: u64, mut pieces: Pieces<'_>) -> io::Result<()> {
        let mut left = pieces.len();
        while left > 0 {
            let (mapping, mapped) = access.get_mapping(at, left as u64)?;
            let len = usize::try_from(mapped).map_or(left, |mapped| mapped.min(left));
            if len == 0 {
                // Behind the end of the disk.
                pieces.zero(left);
                break;
            }
            match mapping {
                // Data that may be written to are in this file: not in its backing
                // file, and not held by two clusters.
                Mapping::Raw {
                    offset, writable, ..
                } if writable => {
                    self.remember(access, at, len as u64);
                    pieces.transfer(&self.file, Kind::Read, offset, len)?;
                }
                Mapping::Zero { .. } => pieces.zero(len),
                _ => BUFFER.with_borrow_mut(|buffer| {
                    let mut done = 0;
                    while done < len {
                        let chunk = room(buffer, len - done);
                        access.read(&mut *chunk, at.saturating_add(done as u64))?;
                        pieces.write(chunk);
                        done += chunk.len();
                    }
                    io::Result::Ok(())
                })?,
            }
            at = at.saturating_add(len as u64);
            left -= len;
        }
        Ok(())
    }

    /// Remembers where clusters lie, if their data may be written to there, and those behind
    /// them: asking for many at once costs as much as for one. Those behind them may be
    /// damaged; then nothing is remembered.
    fn remember(&self, access: &Access, at: u64, len: u64) {
        if self.plain.find(at, len).is_some() {
            return;
        }
        if let Ok((mapping, len)) = access.get_mapping(at, len.max(AHEAD))
            && let Mapping::Raw {
                storage,
                offset,
                writable: true,
                ..
            } = mapping
            && let Ok(size) = storage.size()
        {
            self.plain.add(at, offset, len, size);
        }
    }

    /// Straight from guest memory to where the image will have the data.
    fn write(&self, access: &Access, mut at: u64, mut pieces: Pieces<'_>) -> io::Result<()> {
        let mut left = pieces.len();
        while left > 0 {
            let mapping = access.prepare_data_mapping(at, left as u64, true)?;
            let len = usize::try_from(mapping.length()).map_or(left, |mapped| mapped.min(left));
            let end = mapping.offset().saturating_add(len as u64);
            // `imago` remembers how long the file is: what it did not see grow, it
            // would cut off when it fills a cluster up with zeroes.
            if end > mapping.storage().size()? {
                mapping.storage().write([0].as_slice(), end - 1)?;
            }
            let write = Kind::Write { durable: false };
            pieces.transfer(&self.file, write, mapping.offset(), len)?;
            access.commit_data_mapping(mapping)?;
            self.remember(access, at, len as u64);
            at = at.saturating_add(len as u64);
            left -= len;
        }
        Ok(())
    }
}

/// At most `len` bytes of a buffer, which grows as needed up to its bound.
fn room(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    let len = len.min(CHUNK);
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    buffer.get_mut(..len).unwrap_or_default()
}

impl Worker for Qcow2 {
    unsafe fn run(
        &self,
        kind: Kind,
        offset: u64,
        iovecs: *const libc::iovec,
        count: usize,
    ) -> io::Result<usize> {
        // SAFETY: the caller's promise.
        let pieces = unsafe { Pieces::new(iovecs, count) };
        match kind {
            Kind::Read => self.shared(|access| self.read(access, offset, pieces))?,
            Kind::Flush => self.flush()?,
            Kind::Write { durable } => {
                self.mark()?;
                self.shared(|access| self.write(access, offset, pieces))?;
                if durable {
                    self.flush()?;
                }
            }
            Kind::Discard { len } => {
                self.mark()?;
                self.exclusive(|access| access.discard_to_any(offset, len))?;
            }
            Kind::Zero { len, unmap } => {
                self.mark()?;
                self.exclusive(|access| match unmap {
                    true => access.discard_to_zero(offset, len),
                    false => access.write_zeroes(offset, len),
                })?;
            }
        }
        Ok(pieces.len())
    }

    unsafe fn try_at_once(
        &self,
        kind: Kind,
        offset: u64,
        iovecs: &[libc::iovec],
    ) -> Option<io::Result<usize>> {
        if kind != Kind::Read && !self.is_marked() {
            return None;
        }
        let len = Pieces { iovecs, done: 0 }.len();
        // Held until the transfer is over: the clusters stay where they are.
        let _access = self.access.try_read().ok()?;
        let at = self.plain.find(offset, len as u64)?;
        // SAFETY: the caller's promise.
        unsafe { self.cache.transfer(&self.file, kind, at, iovecs) }
    }

    fn close(&self) {
        if let Err(error) = self.unmark() {
            log::error!("a qcow2 image was not closed, and must be repaired: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use imago::FormatCreateBuilder;

    use super::*;

    #[test]
    fn what_moves_tables_waits_for_writes_and_those_for_nobody() {
        let file = tempfile::tempfile().unwrap();
        let storage = Storage::try_from(file.try_clone().unwrap()).unwrap();
        let builder = imago::qcow2::Qcow2::<Storage>::create_builder(storage);
        builder.size(1 << 20).create().unwrap();
        let image = Qcow2::open(file, true, None).unwrap();
        let len = 512;
        for (kind, waits) in [
            (Kind::Read, false),
            (Kind::Write { durable: false }, false),
            (Kind::Write { durable: true }, true),
            (Kind::Flush, true),
            (Kind::Discard { len }, true),
            (Kind::Zero { len, unmap: true }, true),
            (Kind::Zero { len, unmap: false }, true),
        ] {
            thread::scope(|scope| {
                let another = image.access.read().unwrap();
                // SAFETY: there are no buffers.
                let work = scope.spawn(|| unsafe { image.run(kind, 0, ptr::null(), 0) }.unwrap());
                let polls = if waits { 20 } else { 1000 };
                for _ in 0..polls {
                    if work.is_finished() {
                        break;
                    }
                    thread::sleep(Duration::from_millis(1));
                }
                assert_eq!(work.is_finished(), !waits, "{kind:?}");
                drop(another);
            });
        }
    }
}
