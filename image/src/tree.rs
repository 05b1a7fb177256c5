//! A layer's files as they are when its archive is unpacked in order: checked
//! names, the last of what comes twice, whiteouts apart.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use super::limits::Limits;
use super::tarball::{ArchiveError, Entries, Entry, Kind, Meta};

/// Linux' own limits of a path, and of a name in one.
const PATH_MAX: usize = 4095;
const NAME_MAX: usize = 255;
const DEPTH_MAX: usize = 256;
const ENTRIES_MAX: usize = 2_000_000;
/// How many directories may be there only by what is in them. Each is looked for in all layers
/// below.
const IMPLIED_MAX: usize = 100_000;
/// How many bytes names, targets of links and attributes may have together.
const NAMES_MAX: usize = 256 << 20;

/// `.wh.NAME` in a layer says that NAME, of a layer below, is gone.
const WHITEOUT: &[u8] = b".wh.";
/// Notes of an older union file system. Files in its `.wh..wh.plnk` are what hard
/// links elsewhere are names of.
const NOTE: &[u8] = b".wh..wh.";
/// All that layers below have in the directory is gone.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What a name stands for. Hard links are names of one of these.
#[derive(Debug)]
pub struct Inode {
    /// The owner, the mode and the times.
    pub meta: Meta,
    /// The kind of the file.
    pub kind: InodeKind,
}

/// The kinds of inodes.
#[derive(Debug, PartialEq, Eq)]
pub enum InodeKind {
    /// A directory: whether it hides those below, and whether an entry says so or
    /// only its files do.
    Directory { opaque: bool, implied: bool },
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
    /// Directories that hide all that is below.
    opaque: BTreeSet<Vec<u8>>,
    /// Files in notes: no names of the layer, but what links may name.
    noted: BTreeMap<Vec<u8>, usize>,
    data: u64,
    weight: usize,
    /// How many directories no entry has described.
    implied: usize,
    limits: Limits,
}

impl Tree {
    /// Reads an archive to its end.
    pub fn read<R: Read>(entries: &mut Entries<R>, limits: &Limits) -> Result<Self, ArchiveError> {
        let mut tree = Tree {
            inodes: Vec::new(),
            names: BTreeMap::new(),
            whiteouts: BTreeSet::new(),
            opaque: BTreeSet::new(),
            noted: BTreeMap::new(),
            data: 0,
            weight: 0,
            implied: 0,
            limits: *limits,
        };
        tree.imply(b"", 0);
        let mut index = 0_usize;
        while let Some(entry) = entries.next_entry()? {
            if index >= ENTRIES_MAX {
                return Err(ArchiveError::TooMuch(
                    "more than two million entries".into(),
                ));
            }
            tree.add(entry, index)?;
            index = index.saturating_add(1);
        }
        tree.settle_opaque()?;
        tree.settle_whiteouts()?;
        Ok(tree)
    }

    /// All names, in order: a directory before what is in it.
    pub fn names(&self) -> impl Iterator<Item = (&[u8], usize, &Inode)> {
        self.names
            .iter()
            .filter_map(|(path, inode)| Some((path.as_slice(), *inode, self.inodes.get(*inode)?)))
    }

    /// What layers below have, and this one takes away.
    pub fn whiteouts(&self) -> impl Iterator<Item = &[u8]> {
        self.whiteouts.iter().map(Vec::as_slice)
    }

    /// Gives a directory that no entry describes what it has in a layer below.
    pub fn inherit(&mut self, path: &[u8], meta: Meta) {
        let inode = self
            .names
            .get(path)
            .and_then(|inode| self.inodes.get_mut(*inode));
        if let Some(inode) = inode {
            inode.meta = meta;
        }
    }

    /// The bytes of all files.
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
                == InodeKind::Directory {
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
        let target = match &entry.kind {
            Kind::Symlink(target) => target.len(),
            _ => 0,
        };
        self.count_names(path.len().saturating_add(xattrs).saturating_add(target))?;
        let (parent, name) = split(&path);
        if path
            .split(|byte| *byte == b'/')
            .any(|name| name.starts_with(NOTE) && name != OPAQUE)
        {
            return self.note(path, entry, index);
        }
        if parent
            .split(|byte| *byte == b'/')
            .any(|name| name.starts_with(WHITEOUT))
        {
            return Err(refuse("lies below a whiteout"));
        }
        if name.starts_with(WHITEOUT) {
            self.refuse_symlinks(&entry.path, parent)?;
        }
        if name == OPAQUE {
            self.opaque.insert(parent.to_vec());
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
        self.make_parents(&entry.path, entry.meta.mtime, parent)?;
        let kind = match entry.kind {
            Kind::Link(ref target) => return self.link(&entry, &path, target),
            Kind::Directory => {
                if let Some(Inode {
                    meta,
                    kind: InodeKind::Directory { implied, .. },
                }) = self
                    .names
                    .get(&path)
                    .and_then(|inode| self.inodes.get_mut(*inode))
                {
                    if std::mem::replace(implied, false) {
                        self.implied = self.implied.saturating_sub(1);
                    }
                    *meta = entry.meta;
                    return Ok(());
                }
                InodeKind::Directory {
                    opaque: false,
                    implied: false,
                }
            }
            Kind::File => self.file(entry.size, index)?,
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

    fn count_names(&mut self, bytes: usize) -> Result<(), ArchiveError> {
        self.weight = self.weight.saturating_add(bytes);
        match self.weight > NAMES_MAX {
            true => Err(ArchiveError::TooMuch("names of more than 256 MiB".into())),
            false => Ok(()),
        }
    }

    fn file(&mut self, size: u64, entry: usize) -> Result<InodeKind, ArchiveError> {
        self.data = self.data.saturating_add(size);
        match self.data > self.limits.size() {
            true => Err(ArchiveError::TooMuch(self.limits.too_large())),
            false => Ok(InodeKind::File { size, entry }),
        }
    }

    /// Keeps a file of the notes aside.
    fn note(&mut self, path: Vec<u8>, entry: Entry, index: usize) -> Result<(), ArchiveError> {
        if entry.kind == Kind::File {
            let kind = self.file(entry.size, index)?;
            let meta = entry.meta;
            let inode = self.inode(Inode { meta, kind });
            self.noted.insert(path, inode);
        }
        Ok(())
    }

    fn link(&mut self, entry: &Entry, path: &[u8], target: &[u8]) -> Result<(), ArchiveError> {
        let refuse =
            |why: &str| ArchiveError::entry(&entry.path, format!("a hard link, and {why}"));
        let target = normalised(target).map_err(|why| refuse(&format!("its target {why}")))?;
        let found = self.names.get(&target).or(self.noted.get(&target));
        let Some(inode) = found.copied() else {
            return Err(refuse("no entry before it is its target"));
        };
        let kind = self.inodes.get(inode).map(|inode| &inode.kind);
        if path.is_empty() || matches!(kind, Some(InodeKind::Directory { .. })) {
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
        self.implied = self.implied.saturating_add(1);
        let inode = self.inode(Inode {
            meta: Meta {
                mode: 0o755,
                mtime,
                ..Meta::default()
            },
            kind: InodeKind::Directory {
                opaque: false,
                implied: true,
            },
        });
        self.names.insert(path.to_vec(), inode);
    }

    /// What the layer has under a name.
    fn kind(&self, path: &[u8]) -> Option<&InodeKind> {
        let inode = self.inodes.get(*self.names.get(path)?)?;
        Some(&inode.kind)
    }

    fn is_directory(&self, path: &[u8]) -> bool {
        matches!(self.kind(path), Some(InodeKind::Directory { .. }))
    }

    /// Makes the directories that an entry lies in.
    fn make_parents(
        &mut self,
        entry: &[u8],
        mtime: u32,
        parent: &[u8],
    ) -> Result<(), ArchiveError> {
        // What lies in a directory has directories all the way.
        if self.is_directory(parent) {
            return Ok(());
        }
        for path in ancestors(parent) {
            match self.kind(path) {
                Some(InodeKind::Directory { .. }) => {}
                Some(InodeKind::Other(Kind::Symlink(_))) => return Err(below_symlink(entry, path)),
                Some(_) => {
                    let why = format!("lies below {}, no folder", super::tarball::show(path));
                    return Err(ArchiveError::entry(entry, why));
                }
                None => {
                    self.count_names(path.len())?;
                    if self.implied >= IMPLIED_MAX {
                        return Err(ArchiveError::TooMuch(
                            "more than 100,000 folders that no entry describes".into(),
                        ));
                    }
                    self.imply(path, mtime);
                }
            }
        }
        Ok(())
    }

    /// Refuses what a symbolic link of the layer would lead elsewhere.
    fn refuse_symlinks(&self, entry: &[u8], parent: &[u8]) -> Result<(), ArchiveError> {
        let symlink = ancestors(parent)
            .find(|path| matches!(self.kind(path), Some(InodeKind::Other(Kind::Symlink(_)))));
        match symlink {
            Some(path) => Err(below_symlink(entry, path)),
            None => Ok(()),
        }
    }

    /// Makes the directories that only a whiteout or a mark lies in, as directories of layers
    /// below look so. False if the layer has something else there, or takes one of them
    /// away: what is gone must not come back for that.
    fn make_marked(&mut self, marked: &[u8]) -> Result<bool, ArchiveError> {
        for path in ancestors(marked) {
            match self.kind(path) {
                Some(InodeKind::Directory { .. }) => {}
                None if !self.whiteouts.contains(path) => {}
                _ => return Ok(false),
            }
        }
        self.make_parents(marked, 0, marked)?;
        Ok(true)
    }

    fn settle_opaque(&mut self) -> Result<(), ArchiveError> {
        for path in std::mem::take(&mut self.opaque) {
            if self.make_marked(&path)? {
                self.hide_below(&path);
            }
        }
        Ok(())
    }

    fn hide_below(&mut self, path: &[u8]) {
        let inode = self.names.get(path);
        let inode = inode.and_then(|inode| self.inodes.get_mut(*inode));
        if let Some(InodeKind::Directory { opaque, .. }) = inode.map(|inode| &mut inode.kind) {
            *opaque = true;
        }
    }

    /// A whiteout hides what is below, not what this layer has under the name.
    fn settle_whiteouts(&mut self) -> Result<(), ArchiveError> {
        let mut settled = BTreeSet::new();
        for path in self.whiteouts.clone() {
            match self.kind(&path) {
                Some(InodeKind::Directory { .. }) => self.hide_below(&path),
                Some(_) => {}
                None => {
                    if self.make_marked(split(&path).0)? {
                        settled.insert(path);
                    }
                }
            }
        }
        self.whiteouts = settled;
        Ok(())
    }
}

/// A path's directories, from the outermost to itself.
fn ancestors(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
    let ends = slashes.map(|(at, _)| at).chain([path.len()]);
    ends.filter_map(|end| path.get(..end))
}

fn below_symlink(entry: &[u8], path: &[u8]) -> ArchiveError {
    let why = format!("lies below {}, a symbolic link", super::tarball::show(path));
    ArchiveError::entry(entry, why)
}

/// A path's directory, and its name there.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (
            path.get(..slash).unwrap_or_default(),
            path.get(slash.saturating_add(1)..).unwrap_or_default(),
        ),
        None => (b"", path),
    }
}

/// The path below the root: without empty and `.` components, and without `..`.
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
