//! Reads an archive from a foreign party: every length is checked, and nothing
//! is kept that is larger than it may be.

use std::io::{self, Read};

use tar::{EntryType, Header};

use super::block::{BLOCK, padding};
use super::entry::{Entry, Kind, Meta};
use super::error::ArchiveError;
use super::header::{device, number, path as path_in, small, time};
use super::pax::Extensions;
use super::sparse::Map;

/// An archive's label, by GNU tar.
const LABEL: u8 = b'V';
/// A directory with a list of what was in it when it was saved, by GNU tar.
const DUMPED_DIRECTORY: u8 = b'D';
/// The rest of a file that began in another volume.
const CONTINUED: u8 = b'M';
/// Solaris' names for what others have, or leave out.
const SOLARIS_HEADER: u8 = b'X';
const SOLARIS_ACL: u8 = b'A';
const SOLARIS_ATTRIBUTES: u8 = b'E';

/// The most that the extended headers and long names of one entry have together.
const EXTENSION_MAX: u64 = 1 << 20;

/// The entries of an archive, one after the other.
pub struct Entries<R> {
    input: R,
    /// Data of the current entry that are stored and not read yet.
    stored: u64,
    /// The padding behind them, in bytes.
    padding: u64,
    map: Option<Map>,
    size: u64,
    position: u64,
}

impl<R: Read> Entries<R> {
    /// The entries of an uncompressed archive.
    pub fn new(input: R) -> Self {
        Entries {
            input,
            stored: 0,
            padding: 0,
            map: None,
            size: 0,
            position: 0,
        }
    }

    /// What it reads from, after the end.
    pub fn into_inner(self) -> R {
        self.input
    }

    /// The input that it reads from.
    pub fn get_ref(&self) -> &R {
        &self.input
    }

    /// True if the current entry's data are not stored as they are read.
    pub fn has_holes(&self) -> bool {
        self.map.is_some()
    }

    /// The next entry. What was not read of the one before is skipped.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let mut extensions = Extensions::default();
        let mut extended = false;
        let mut left = EXTENSION_MAX;
        loop {
            self.skip()?;
            let Some(header) = self.header()? else {
                return match extended {
                    true => Err(ArchiveError::Truncated),
                    false => Ok(None),
                };
            };
            let kind = header.entry_type();
            extended = true;
            match (kind, kind.as_byte()) {
                // What is true of all entries, and an archive's own name: of no use here.
                (EntryType::XGlobalHeader, _) | (_, LABEL) => {
                    self.expect(size(&header)?);
                    extended = false;
                }
                // Access lists and attributes of Solaris, which are the next entry's.
                (_, SOLARIS_ACL | SOLARIS_ATTRIBUTES) => self.expect(size(&header)?),
                (EntryType::XHeader, _) | (_, SOLARIS_HEADER) => {
                    let data = self.extension(&header, &mut left)?;
                    extensions.parse(&data)?;
                }
                (EntryType::GNULongName, _) => {
                    let data = self.extension(&header, &mut left)?;
                    extensions.path.get_or_insert(until_nul(data));
                }
                (EntryType::GNULongLink, _) => {
                    let data = self.extension(&header, &mut left)?;
                    extensions.link.get_or_insert(until_nul(data));
                }
                _ => return self.entry(&header, extensions).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header,
        mut extensions: Extensions,
    ) -> Result<Entry, ArchiveError> {
        let path = extensions.sparse.name.take().or(extensions.path.take());
        let path = path.unwrap_or_else(|| path_in(header));
        let link = extensions.link.take();
        let link = || {
            link.or_else(|| header.link_name_bytes().map(|link| link.into_owned()))
                .unwrap_or_default()
        };
        let kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink(link()),
            EntryType::Link => Kind::Link(link()),
            EntryType::Char => device(header).map(|(major, minor)| Kind::Char(major, minor))?,
            EntryType::Block => device(header).map(|(major, minor)| Kind::Block(major, minor))?,
            EntryType::Fifo => Kind::Fifo,
            other if other.as_byte() == DUMPED_DIRECTORY => Kind::Directory,
            other if other.as_byte() == CONTINUED => {
                let why = "begins in an archive before this one, of several volumes";
                return Err(ArchiveError::entry(&path, why));
            }
            other => {
                let why = format!(
                    "entries of type {:?} are not known",
                    char::from(other.as_byte())
                );
                return Err(ArchiveError::entry(&path, why));
            }
        };
        self.map = None;
        self.position = 0;
        self.size = 0;
        if kind == Kind::File {
            let stored = match extensions.size {
                Some(size) => size,
                None => size(header)?,
            };
            // The blocks of an old map come before the data, a new one is part of them.
            let old = match header.entry_type() {
                EntryType::GNUSparse => Some(Map::old(header, &mut self.input)?),
                _ => None,
            };
            self.expect(stored);
            self.map = match old {
                Some(map) => Some(map),
                None => {
                    let mut data = (&mut self.input).take(stored);
                    let map = extensions.sparse.map(&mut data)?;
                    self.stored = data.limit();
                    map
                }
            };
            self.size = match &self.map {
                Some(map) => {
                    map.check(self.stored)?;
                    map.size()
                }
                None => self.stored,
            };
        }
        if header.entry_type().as_byte() == DUMPED_DIRECTORY {
            // A list of what was in it.
            self.expect(size(header)?);
            self.size = 0;
        }
        let id = |extension: Option<u32>, field: &[u8]| match extension {
            Some(id) => Ok(id),
            None => u32::try_from(number(field)?)
                .map_err(|_| ArchiveError::entry(&path, "its owner's number is too large")),
        };
        let meta = Meta {
            mode: small(&header.as_old().mode)? & 0o7777,
            uid: id(extensions.uid, &header.as_old().uid)?,
            gid: id(extensions.gid, &header.as_old().gid)?,
            mtime: match extensions.mtime {
                Some(mtime) => mtime,
                None => time(&header.as_old().mtime)?,
            },
            xattrs: extensions.xattrs,
        };
        Ok(Entry {
            path,
            kind,
            meta,
            size: self.size,
        })
    }

    /// The next header, or nothing at the end.
    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.input.read(rest) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(ArchiveError::Truncated),
                Ok(count) => filled = filled.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sums = |byte: fn(u8) -> i64| -> i64 {
            let bytes = header.as_bytes().iter().enumerate();
            let sum = |(at, value): (usize, &u8)| match (148..156).contains(&at) {
                true => i64::from(b' '),
                false => byte(*value),
            };
            bytes.map(sum).sum()
        };
        let expected = i64::from(small(&header.as_old().cksum)?);
        if sums(i64::from) != expected && sums(|byte| i64::from(byte.cast_signed())) != expected {
            return Err(ArchiveError::Malformed("a header's checksum is wrong"));
        }
        Ok(Some(header))
    }

    /// What one of an entry's extended headers has. They may be many: `left` is what all that
    /// follow may still have.
    fn extension(&mut self, header: &Header, left: &mut u64) -> Result<Vec<u8>, ArchiveError> {
        let size = size(header)?;
        *left = left.checked_sub(size).ok_or_else(|| {
            ArchiveError::TooMuch("extended headers of an entry of more than 1 MiB".into())
        })?;
        self.expect(size);
        let mut data = Vec::new();
        self.read_to_end(&mut data)?;
        Ok(data)
    }

    fn expect(&mut self, size: u64) {
        self.map = None;
        self.position = 0;
        self.size = size;
        self.stored = size;
        self.padding = padding(size);
    }

    fn skip(&mut self) -> Result<(), ArchiveError> {
        let left = self.stored.saturating_add(self.padding);
        let skipped = io::copy(&mut (&mut self.input).take(left), &mut io::sink())?;
        // The last entry's padding is missing from some archives.
        if skipped < self.stored {
            return Err(ArchiveError::Truncated);
        }
        self.expect(0);
        Ok(())
    }
}

impl<R: Read> Read for Entries<R> {
    /// Reads the current entry's data.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.size.saturating_sub(self.position);
        let most = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let buffer = buffer.get_mut(..most).unwrap_or_default();
        if buffer.is_empty() {
            return Ok(0);
        }
        let mut stored = (&mut self.input).take(self.stored);
        let count = match &self.map {
            Some(map) => map.read(self.position, &mut stored, buffer)?,
            None => stored.read(buffer)?,
        };
        self.stored = stored.limit();
        if count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                ArchiveError::Truncated,
            ));
        }
        self.position = self.position.saturating_add(count as u64);
        Ok(count)
    }
}

/// The length of what is stored behind a header.
fn size(header: &Header) -> Result<u64, ArchiveError> {
    number(&header.as_old().size)
}

fn until_nul(mut data: Vec<u8>) -> Vec<u8> {
    if let Some(end) = data.iter().position(|byte| *byte == 0) {
        data.truncate(end);
    }
    data
}

const _: () = assert!(BLOCK == 512, "the size of tar's header");
