//! What archives hold.

use std::collections::BTreeMap;

/// What an entry is, apart from its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
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
    /// The kind of the entry.
    pub kind: Kind,
    /// The owner, the mode and the times.
    pub meta: Meta,
    /// The length of its data, holes included.
    pub size: u64,
}
