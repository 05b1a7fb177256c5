//! A layer's files as they are when its archive is unpacked in order: checked
//! names, the last of what comes twice, whiteouts apart.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use super::tarball::{ArchiveError, Entries, Entry, Kind, Meta};

/// Linux' own limits of a path, and of a name in one.
const PATH_MAX: usize = 4095;
const NAME_MAX: usize = 255;
const DEPTH_MAX: usize = 256;
const ENTRIES_MAX: usize = 2_000_000;
/// How many bytes names and attributes may have together.
const NAMES_MAX: usize = 256 << 20;
/// What all files may have together, holes included.
const DATA_MAX: u64 = super::compression::TOTAL_MAX;

/// `.wh.NAME` in a layer says that NAME, of a layer below, is gone.
const WHITEOUT: &[u8] = b".wh.";
/// Notes of an older union file system.
const NOTE: &[u8] = b".wh..wh.";
/// All that layers below have in the folder is gone.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What a name stands for. Hard links are names of one of these.
#[derive(Debug)]
pub struct Inode {
    /// Who may do what.
    pub meta: Meta,
    /// What it is.
    pub kind: InodeKind,
}

/// What there is behind names.
#[derive(Debug, PartialEq, Eq)]
pub enum InodeKind {
    /// A folder: whether it hides those below, and whether an entry says so or
    /// only its files do.
    Folder { opaque: bool, implied: bool },
    /// A file: its length, and which entry has its data.
    File { size: u64, entry: usize },
    /// All else.
    Other(Kind),
}

/// A layer.
pub struct Tree {
    inodes: Vec<Inode>,
    /// Paths without a slash at either end; the root is the empty one.
    names: BTreeMap<Vec<u8>, usize>,
    whiteouts: BTreeSet<Vec<u8>>,
    data: u64,
    weight: usize,
}

impl Tree {
    /// Reads an archive to its end.
    pub fn read<R: Read>(entries: &mut Entries<R>) -> Result<Self, ArchiveError> {
        let mut tree = Tree {
            inodes: Vec::new(),
            names: BTreeMap::new(),
            whiteouts: BTreeSet::new(),
            data: 0,
            weight: 0,
        };
        tree.imply(b"", 0);
        let mut index = 0_usize;
        while let Some(entry) = entries.next()? {
            if index >= ENTRIES_MAX {
                return Err(ArchiveError::TooMuch("more than two million entries"));
            }
            tree.add(entry, index)?;
            index = index.saturating_add(1);
        }
        tree.settle_whiteouts();
        Ok(tree)
    }

    /// All names, in order: a folder before what is in it.
    pub fn names(&self) -> impl Iterator<Item = (&[u8], usize, &Inode)> {
        self.names
            .iter()
            .filter_map(|(path, inode)| Some((path.as_slice(), *inode, self.inodes.get(*inode)?)))
    }

    /// What layers below have, and this one takes away.
    pub fn whiteouts(&self) -> impl Iterator<Item = &[u8]> {
        self.whiteouts.iter().map(Vec::as_slice)
    }

    /// Gives a folder that no entry describes what it has in a layer below.
    pub fn inherit(&mut self, path: &[u8], meta: Meta) {
        let inode = self
            .names
            .get(path)
            .and_then(|inode| self.inodes.get_mut(*inode));
        if let Some(inode) = inode {
            inode.meta = meta;
        }
    }

    /// How many bytes its files have.
    pub fn data(&self) -> u64 {
        self.data
    }

    /// True if it changes nothing.
    pub fn is_empty(&self) -> bool {
        let root = self
            .names
            .get(&b""[..])
            .and_then(|root| self.inodes.get(*root));
        let silent = |root: &Inode| {
            root.kind
                == InodeKind::Folder {
                    opaque: false,
                    implied: true,
                }
        };
        self.names.len() == 1 && self.whiteouts.is_empty() && root.is_none_or(silent)
    }

    fn add(&mut self, entry: Entry, index: usize) -> Result<(), ArchiveError> {
        let refuse = |why: &str| ArchiveError::entry(&entry.path, why);
        let path = normalised(&entry.path).map_err(refuse)?;
        let xattrs = entry.meta.xattrs.iter();
        let xattrs: usize = xattrs.map(|(key, value)| key.len() + value.len()).sum();
        self.weight = self
            .weight
            .saturating_add(path.len())
            .saturating_add(xattrs);
        if self.weight > NAMES_MAX {
            return Err(ArchiveError::TooMuch("names of more than 256 MiB"));
        }
        let (parent, name) = split(&path);
        if path
            .split(|byte| *byte == b'/')
            .any(|name| name.starts_with(NOTE) && name != OPAQUE)
        {
            return Ok(());
        }
        if parent
            .split(|byte| *byte == b'/')
            .any(|name| name.starts_with(WHITEOUT))
        {
            return Err(refuse("lies below a whiteout"));
        }
        self.make_parents(&entry, parent)?;
        if name == OPAQUE {
            let folder = self
                .names
                .get(parent)
                .and_then(|inode| self.inodes.get_mut(*inode));
            if let Some(Inode {
                kind: InodeKind::Folder { opaque, .. },
                ..
            }) = folder
            {
                *opaque = true;
            }
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(refuse("a whiteout of no name"));
            }
            let mut path = parent.to_vec();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(hidden);
            self.whiteouts.insert(path);
            return Ok(());
        }
        let kind = match entry.kind {
            Kind::Link(ref target) => return self.link(&entry, &path, target),
            Kind::Folder => {
                if let Some(Inode {
                    meta,
                    kind: InodeKind::Folder { implied, .. },
                }) = self
                    .names
                    .get(&path)
                    .and_then(|inode| self.inodes.get_mut(*inode))
                {
                    *implied = false;
                    *meta = entry.meta;
                    return Ok(());
                }
                InodeKind::Folder {
                    opaque: false,
                    implied: false,
                }
            }
            Kind::File => {
                self.data = self.data.saturating_add(entry.size);
                if self.data > DATA_MAX {
                    return Err(ArchiveError::TooMuch("files of more than 64 GiB"));
                }
                InodeKind::File {
                    size: entry.size,
                    entry: index,
                }
            }
            Kind::Symlink(ref target) => {
                if target.is_empty() || target.len() > PATH_MAX || target.contains(&0) {
                    return Err(refuse("a symbolic link to nothing that can be"));
                }
                InodeKind::Other(entry.kind)
            }
            Kind::Char(major, minor) | Kind::Block(major, minor) => {
                // What Linux and squashfs have places for.
                if major > 0xfff || minor > 0xf_ffff {
                    return Err(refuse("a device's numbers are too large"));
                }
                InodeKind::Other(entry.kind)
            }
            Kind::Fifo => InodeKind::Other(entry.kind),
        };
        if path.is_empty() {
            return Err(ArchiveError::entry(&entry.path, "the root is no folder"));
        }
        let inode = self.inode(Inode {
            meta: entry.meta,
            kind,
        });
        self.name(path, inode);
        Ok(())
    }

    fn link(&mut self, entry: &Entry, path: &[u8], target: &[u8]) -> Result<(), ArchiveError> {
        let refuse =
            |why: &str| ArchiveError::entry(&entry.path, format!("a hard link, and {why}"));
        let target = normalised(target).map_err(|why| refuse(&format!("its target {why}")))?;
        let Some(inode) = self.names.get(&target).copied() else {
            return Err(refuse("no entry before it is its target"));
        };
        let kind = self.inodes.get(inode).map(|inode| &inode.kind);
        if path.is_empty() || matches!(kind, Some(InodeKind::Folder { .. })) {
            return Err(refuse("its target is a folder"));
        }
        if path != target {
            self.name(path.to_vec(), inode);
        }
        Ok(())
    }

    fn inode(&mut self, inode: Inode) -> usize {
        self.inodes.push(inode);
        self.inodes.len().saturating_sub(1)
    }

    /// Gives a name. What had it is gone, and all below it.
    fn name(&mut self, path: Vec<u8>, inode: usize) {
        let below = [path.as_slice(), b"/"].concat();
        while let Some((found, _)) = self.names.range(below.clone()..).next() {
            if !found.starts_with(&below) {
                break;
            }
            let found = found.clone();
            self.names.remove(&found);
        }
        self.names.insert(path, inode);
    }

    fn imply(&mut self, path: &[u8], mtime: u32) {
        let inode = self.inode(Inode {
            meta: Meta {
                mode: 0o755,
                mtime,
                ..Meta::default()
            },
            kind: InodeKind::Folder {
                opaque: false,
                implied: true,
            },
        });
        self.names.insert(path.to_vec(), inode);
    }

    fn make_parents(&mut self, entry: &Entry, parent: &[u8]) -> Result<(), ArchiveError> {
        // What lies in a folder has folders all the way.
        let found = self
            .names
            .get(parent)
            .and_then(|inode| self.inodes.get(*inode));
        if found.is_some_and(|inode| matches!(inode.kind, InodeKind::Folder { .. })) {
            return Ok(());
        }
        let slashes = parent.iter().enumerate().filter(|(_, byte)| **byte == b'/');
        let ends: Vec<usize> = slashes.map(|(at, _)| at).chain([parent.len()]).collect();
        for end in ends {
            let path = parent.get(..end).unwrap_or_default();
            let found = self
                .names
                .get(path)
                .and_then(|inode| self.inodes.get(*inode));
            match found.map(|inode| &inode.kind) {
                Some(InodeKind::Folder { .. }) => {}
                Some(InodeKind::Other(Kind::Symlink(_))) => {
                    let why = format!("lies below {}, a symbolic link", super::tarball::show(path));
                    return Err(ArchiveError::entry(&entry.path, why));
                }
                Some(_) => {
                    let why = format!("lies below {}, no folder", super::tarball::show(path));
                    return Err(ArchiveError::entry(&entry.path, why));
                }
                None => {
                    self.weight = self.weight.saturating_add(path.len());
                    if self.names.len() >= ENTRIES_MAX {
                        return Err(ArchiveError::TooMuch("more than two million folders"));
                    }
                    self.imply(path, entry.meta.mtime);
                }
            }
        }
        Ok(())
    }

    /// A whiteout hides what is below, not what this layer has under the name.
    fn settle_whiteouts(&mut self) {
        for path in std::mem::take(&mut self.whiteouts) {
            let found = self
                .names
                .get(&path)
                .and_then(|inode| self.inodes.get_mut(*inode));
            match found.map(|inode| &mut inode.kind) {
                Some(InodeKind::Folder { opaque, .. }) => *opaque = true,
                Some(_) => {}
                None => {
                    let (parent, _) = split(&path);
                    let parent = self
                        .names
                        .get(parent)
                        .and_then(|inode| self.inodes.get(*inode));
                    if parent.is_some_and(|inode| matches!(inode.kind, InodeKind::Folder { .. })) {
                        self.whiteouts.insert(path);
                    }
                }
            }
        }
    }
}

/// A path's folder, and its name there.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (
            path.get(..slash).unwrap_or_default(),
            path.get(slash.saturating_add(1)..).unwrap_or_default(),
        ),
        None => (b"", path),
    }
}

/// The path below the root: without what says nothing, and without a way out.
pub fn normalised(raw: &[u8]) -> Result<Vec<u8>, &'static str> {
    if raw.contains(&0) {
        return Err("has a NUL in its name");
    }
    let mut path = Vec::with_capacity(raw.len().min(PATH_MAX));
    let mut depth = 0_usize;
    for name in raw.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => continue,
            b".." => return Err("leads out of its folder with .."),
            _ if name.len() > NAME_MAX => return Err("has a name of more than 255 bytes"),
            _ => {}
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        depth = depth.saturating_add(1);
        if depth > DEPTH_MAX {
            return Err("lies more than 256 folders deep");
        }
        if path.len() > PATH_MAX {
            return Err("has a path of more than 4095 bytes");
        }
    }
    Ok(path)
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
