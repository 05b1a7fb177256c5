//! Tar archives: reading foreign ones, and writing plain ones.

mod header;
mod pax;
mod reader;
mod sparse;
mod writer;

pub use pax::percent_decoded;
pub use reader::Entries;
pub use sparse::{HOLE_MIN, PIECES_MAX};
pub use writer::Writer;

use std::collections::BTreeMap;
use std::io;

/// Why an archive is refused.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It ends too early.
    #[error("the archive is cut off")]
    Truncated,
    /// It is no tar archive, or a broken one.
    #[error("not a tar archive, or a broken one: {0}")]
    Malformed(&'static str),
    /// Something in it cannot be.
    #[error("{}: {why}", show(.path))]
    Entry {
        /// Its name.
        path: Vec<u8>,
        /// What is wrong.
        why: String,
    },
    /// It is not what it was when it was checked.
    #[error("the archive changed while it was read")]
    Changed,
    /// It unpacks to too much.
    #[error("the archive holds too much: {0}")]
    TooMuch(String),
}

impl ArchiveError {
    /// What decoders call an end that they did not expect is an archive that is cut off.
    pub fn plainly(self) -> Self {
        match self {
            ArchiveError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                ArchiveError::Truncated
            }
            error => error,
        }
    }

    /// About an entry.
    pub fn entry(path: &[u8], why: impl Into<String>) -> Self {
        ArchiveError::Entry {
            path: path.to_vec(),
            why: why.into(),
        }
    }
}

/// A name of any bytes, for a message.
pub fn show(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    text.chars()
        .take(200)
        .flat_map(char::escape_debug)
        .collect()
}

/// What an entry is, apart from its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data.
    File,
    /// Names.
    Folder,
    /// Another name, as it is written.
    Symlink(Vec<u8>),
    /// Another name of an entry before it.
    Link(Vec<u8>),
    /// A character device: major, minor.
    Char(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// Who may do what with an entry, and when it was changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// The lowest 12 bits of the mode.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u32,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// An entry's header.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name, as it is written.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Who may do what.
    pub meta: Meta,
    /// The length of its data, holes included.
    pub size: u64,
}

/// The size of a block.
const BLOCK: usize = 512;

/// How many bytes follow `len` bytes to the end of a block.
fn padding(len: u64) -> u64 {
    len.wrapping_neg() % BLOCK as u64
}

#[cfg(test)]
mod tests;
