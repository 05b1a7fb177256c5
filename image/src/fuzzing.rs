//! The importer, for fuzz targets: without the tool that makes file systems.

use std::collections::BTreeMap;
use std::fs::File;

use super::config::Manifest;
use super::layers::{self, LayerError, clean, inside};
use super::limits::Limits;
use super::progress::Quiet;
use super::section::Section;
use super::tarball::{Entries, Kind, Meta};
use super::tree::{Inode, InodeKind, Tree};

/// Names, and what they stand for in words.
pub type Told = BTreeMap<Vec<u8>, String>;

/// Checks a layer's archive, and returns the one that the tool would get, with what it
/// should hold; none if its files have more than `most` bytes.
pub fn rewritten(archive: File, most: u64) -> Result<Option<(Vec<u8>, Told)>, LayerError> {
    let section = Section::whole(archive)?;
    let checked = layers::check(&section, None, &Limits::default(), &Quiet)?;
    checked.record.inherited(&[&checked.record]);
    if checked.record.size > most {
        return Ok(None);
    }
    let mut out = Vec::new();
    checked.write(&mut out, &Quiet)?;
    let mut told = Told::new();
    for (path, _, inode) in checked.tree.names() {
        let opaque = matches!(inode.kind, InodeKind::Directory { opaque: true, .. });
        told.insert(
            inside(path),
            words(&inode.kind, &clean(&inode.meta, opaque)),
        );
    }
    for path in checked.tree.whiteouts() {
        let kind = InodeKind::Other(Kind::Char(0, 0));
        told.insert(inside(path), words(&kind, &Meta::default()));
    }
    Ok(Some((out, told)))
}

/// What an archive of our own leaves.
pub fn told(archive: &[u8]) -> Result<Told, LayerError> {
    let tree = Tree::read(&mut Entries::new(archive), &Limits::default())?;
    let names = tree.names().filter(|(path, ..)| !path.is_empty());
    let entry = |(path, _, Inode { meta, kind }): (&[u8], usize, &Inode)| {
        (path.to_vec(), words(kind, meta))
    };
    let gone = tree
        .whiteouts()
        .map(|path| (path.to_vec(), "whiteout".to_owned()));
    Ok(names.map(entry).chain(gone).collect())
}

fn words(kind: &InodeKind, meta: &Meta) -> String {
    match kind {
        InodeKind::Directory { .. } => format!("folder {meta:?}"),
        InodeKind::File { size, .. } => format!("file of {size} {meta:?}"),
        InodeKind::Other(kind) => format!("{kind:?} {meta:?}"),
    }
}

/// Whether something is an image's manifest, or an index.
pub fn is_manifest(text: &[u8]) -> bool {
    Manifest::read(text).is_ok()
}
