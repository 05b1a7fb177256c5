//! Files on their way: out of a folder, over a connection, into a folder.
//!
//! A [`Source`] tells entry for entry what there is, a folder before what is in it;
//! a [`Sink`] makes it. Both ends of a connection use the same ones, and the other
//! end may be hostile: entries are checked where they come in, and [`Files`] makes
//! nothing outside of its place, whatever they say.

mod files;
mod place;
mod walk;
pub mod wire;
pub mod xattrs;

pub use files::{Files, Keep};
pub use place::Place;
pub use walk::Walk;

use std::io::{self, Read};

use serde::{Deserialize, Serialize};

use self::xattrs::Xattrs;
use crate::protocol::Bytes;

/// Linux' own limits of a name and of a path.
const NAME_MAX: usize = 255;
const PATH_MAX: usize = 4095;
/// How many folders lie in each other, at most: each is open.
const DEPTH_MAX: usize = 256;

/// What an entry is, apart from its data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Data: at most so many bytes.
    File(u64),
    /// Names.
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
    /// What it is.
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

/// Where entries go to.
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

/// The names in a path, of which none leads elsewhere.
fn names(path: &[u8]) -> io::Result<Vec<&[u8]>> {
    let refuse = |why: &str| Err(about(path, io::Error::other(why)));
    if path.is_empty() {
        return Ok(Vec::new());
    }
    if path.len() > PATH_MAX {
        return refuse("a path of more than 4095 bytes");
    }
    if path.contains(&0) {
        return refuse("a NUL in its name");
    }
    let names: Vec<&[u8]> = path.split(|&byte| byte == b'/').collect();
    if names.len() > DEPTH_MAX {
        return refuse("lies more than 256 folders deep");
    }
    for name in &names {
        match *name {
            b"" | b"." | b".." => return refuse("no plain path"),
            name if name.len() > NAME_MAX => return refuse("a name of more than 255 bytes"),
            _ => {}
        }
    }
    Ok(names)
}

/// An error that names its file.
fn about(path: &[u8], error: impl Into<io::Error>) -> io::Error {
    let error = error.into();
    let path = String::from_utf8_lossy(path);
    io::Error::new(error.kind(), format!("{path}: {error}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
