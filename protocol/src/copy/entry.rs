//! What is copied: entries, where they come from and where they go to.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};

use super::path::{PATH_MAX, about, names};
use super::xattrs::{self, Xattrs};
use crate::agent::Bytes;

/// What an entry is, apart from its data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A file, with at most this number of bytes.
    File(u64),
    /// A directory.
    Folder,
    /// Another name, as it is written.
    Symlink(Bytes),
    /// Another name of an entry before it.
    Link(Bytes),
    /// A character device: major, minor.
    Char(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// A file, a folder, or what else has a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Below what is copied, which is the empty path.
    pub path: Bytes,
    /// The kind of the entry.
    pub kind: Kind,
    /// The lowest 12 bits of the mode.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// When it was changed: seconds since 1970.
    pub mtime: i64,
    /// Of a file or a folder: see [`xattrs`].
    pub xattrs: Xattrs,
    /// A file that takes less room than its data: where they are zeroes, nothing is.
    pub sparse: bool,
}

impl Entry {
    /// An entry whose paths lead nowhere but down.
    pub fn checked(self) -> io::Result<Self> {
        let refuse = |why: &str| Err(about(&self.path, io::Error::other(why)));
        names(&self.path)?;
        xattrs::check(&self.xattrs).map_err(|error| about(&self.path, error))?;
        match &self.kind {
            Kind::Link(target) => drop(names(target)?),
            Kind::Symlink(target)
                if target.is_empty() || target.len() > PATH_MAX || target.contains(&0) =>
            {
                return refuse("a symbolic link to nothing that can be");
            }
            _ => {}
        }
        Ok(self)
    }
}

/// A file's data: reading gives all of them, holes as zeroes.
pub trait Data: Read {
    /// Passes by a hole that comes next, and returns its length; 0 where there is none, or
    /// it is not known.
    fn skip_hole(&mut self) -> io::Result<u64> {
        Ok(0)
    }
}

impl Data for io::Empty {}
impl Data for &[u8] {}

/// Where entries come from, with the data of the last one.
pub trait Source: Data {
    /// The next entry; none at the end.
    fn next(&mut self) -> io::Result<Option<Entry>>;
}

/// A receiver of entries.
pub trait Sink {
    /// Makes an entry; a file's data come from `data`.
    fn put(&mut self, entry: &Entry, data: &mut dyn Data) -> io::Result<()>;
    /// There are no more.
    fn finish(&mut self) -> io::Result<()>;
}

/// Moves all that a source still has.
pub fn copy(source: &mut impl Source, sink: &mut impl Sink) -> io::Result<()> {
    while let Some(entry) = source.next()? {
        sink.put(&entry, source)?;
    }
    sink.finish()
}
