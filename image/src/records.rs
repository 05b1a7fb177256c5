//! What a layer says to those above it.
//!
//! Overlayfs shows a directory as its highest layer has it. A directory that a layer's
//! archive has files for but does not describe must look as it does below: it
//! takes what the layers below say of it, and the layer's name then says so too.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use super::digest::{Digest, Hasher};
use super::tarball::{Meta, percent_decoded};
use super::tree::{InodeKind, Tree};

/// What layers above need to know of one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The digest of the archive, uncompressed.
    pub diff_id: Digest,
    /// The bytes of its files.
    pub size: u64,
    /// It has nothing, and changes nothing.
    pub empty: bool,
    /// It hides all layers below.
    pub opaque: bool,
    /// Directories that it has files for and does not describe.
    implied: Vec<String>,
    /// Of those, the ones of which it shows nothing that is below.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    implied_opaque: BTreeSet<String>,
    /// The paths that it removes from the layers below.
    whiteouts: BTreeSet<String>,
    /// The directories that it describes. Stores call them so.
    #[serde(rename = "folders")]
    directories: BTreeMap<String, Directory>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Directory {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: u32,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    xattrs: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    opaque: bool,
}

/// Bytes as text, and back.
fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        match byte.is_ascii_graphic() && byte != b'%' {
            true => text.push(char::from(byte)),
            false => text.extend([
                '%',
                char::from_digit(u32::from(byte >> 4), 16).unwrap_or_default(),
                char::from_digit(u32::from(byte & 15), 16).unwrap_or_default(),
            ]),
        }
    }
    text
}

fn unescaped(text: &str) -> Vec<u8> {
    percent_decoded(text.as_bytes())
}

impl Directory {
    fn new(meta: &Meta, opaque: bool) -> Self {
        let xattrs = meta.xattrs.iter();
        Directory {
            mode: meta.mode,
            uid: meta.uid,
            gid: meta.gid,
            mtime: meta.mtime,
            xattrs: xattrs
                .map(|(key, value)| (escaped(key), escaped(value)))
                .collect(),
            opaque,
        }
    }

    fn meta(&self) -> Meta {
        let xattrs = self.xattrs.iter();
        Meta {
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            xattrs: xattrs
                .map(|(key, value)| (unescaped(key), unescaped(value)))
                .collect(),
        }
    }
}

impl Record {
    /// What it takes away from layers below.
    pub fn whiteouts(&self) -> impl Iterator<Item = Vec<u8>> {
        self.whiteouts.iter().map(|path| unescaped(path))
    }

    /// Directories of which it shows nothing that is below.
    pub fn opaque_directories(&self) -> impl Iterator<Item = Vec<u8>> {
        let described = self
            .directories
            .iter()
            .filter(|(_, directory)| directory.opaque);
        let described = described.map(|(path, _)| path);
        described
            .chain(&self.implied_opaque)
            .map(|path| unescaped(path))
    }

    pub(super) fn new(diff_id: Digest, tree: &Tree) -> Self {
        let (mut implied, mut implied_opaque) = (Vec::new(), BTreeSet::new());
        let mut directories = BTreeMap::new();
        let mut hides = false;
        for (path, _, inode) in tree.names() {
            if let InodeKind::Directory {
                opaque,
                implied: silent,
            } = inode.kind
            {
                hides |= path.is_empty() && opaque;
                match silent {
                    true => {
                        if opaque {
                            implied_opaque.insert(escaped(path));
                        }
                        implied.push(escaped(path));
                    }
                    false => {
                        directories.insert(escaped(path), Directory::new(&inode.meta, opaque));
                    }
                }
            }
        }
        Record {
            diff_id,
            size: tree.data(),
            empty: tree.is_empty(),
            opaque: hides,
            implied,
            implied_opaque,
            whiteouts: tree.whiteouts().map(escaped).collect(),
            directories,
        }
    }

    /// What the implied directories have in the layers below, lowest first.
    pub fn inherited(&self, below: &[&Record]) -> Inheritance {
        let mut said: BTreeMap<&str, Said> = BTreeMap::new();
        for path in &self.implied {
            // Who is in already is so with all it lies in.
            for path in outwards(path) {
                match said.entry(path) {
                    Entry::Occupied(_) => break,
                    Entry::Vacant(entry) => entry.insert(Said::default()),
                };
            }
        }
        for (level, layer) in below.iter().enumerate() {
            layer.say(level, &mut said);
        }
        let hides_all = below.iter().rposition(|layer| layer.opaque);
        // The layer that hides what lies in a directory and below that layer. A directory comes
        // before what is in it.
        let mut inside: HashMap<&str, Option<usize>> = HashMap::new();
        let mut metas = HashMap::new();
        for (path, said) in said {
            let outer = outwards(path).nth(1);
            let outer = outer.and_then(|outer| inside.get(outer)).copied();
            let hidden = outer.unwrap_or(hides_all).max(said.gone);
            inside.insert(path, hidden.max(said.opaque));
            if let Some((level, directory)) = said.directory
                && hidden <= Some(level)
            {
                metas.insert(path, directory);
            }
        }
        let found = self.implied.iter().filter_map(|path| {
            let directory = metas.get(path.as_str())?;
            Some((unescaped(path), directory.meta()))
        });
        Inheritance(found.collect())
    }

    /// Adds what this layer says of directories; those below it have said theirs.
    fn say<'a>(&'a self, level: usize, said: &mut BTreeMap<&str, Said<'a>>) {
        let add = |path: &str, said: &mut Said<'a>| {
            let directory = self.directories.get(path);
            if let Some(directory) = directory {
                said.directory = Some((level, directory));
            }
            if self.whiteouts.contains(path) {
                said.gone = Some(level);
            }
            if directory.is_some_and(|it| it.opaque) || self.implied_opaque.contains(path) {
                said.opaque = Some(level);
            }
        };
        let names = [self.whiteouts.len(), self.implied_opaque.len()];
        let names = names
            .iter()
            .fold(self.directories.len(), |sum, len| sum + len);
        if said.len() < names {
            said.iter_mut().for_each(|(path, said)| add(path, said));
            return;
        }
        let names = self.directories.keys().chain(&self.whiteouts);
        for path in names.chain(&self.implied_opaque) {
            if let Some(said) = said.get_mut(path.as_str()) {
                add(path, said);
            }
        }
    }
}

/// What layers say of a directory: which was the last to, by its place from the lowest.
#[derive(Default)]
struct Said<'a> {
    /// The directory, and the layer that has it.
    directory: Option<(usize, &'a Directory)>,
    /// It is taken away.
    gone: Option<usize>,
    /// What layers below have in it is hidden.
    opaque: Option<usize>,
}

/// An escaped path, and all that it lies in: a slash is never escaped.
fn outwards(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| match path.rsplit_once('/') {
        Some((outer, _)) => Some(outer),
        None => (!path.is_empty()).then_some(""),
    })
}

/// What a layer takes from those below.
#[derive(Debug)]
pub struct Inheritance(pub(super) Vec<(Vec<u8>, Meta)>);

impl Inheritance {
    /// The name of a layer with this. Most take nothing.
    pub fn name(&self, diff_id: &Digest) -> String {
        if self.0.is_empty() {
            return diff_id.hex();
        }
        let mut hasher = Hasher::new();
        for (path, meta) in &self.0 {
            hasher.update(format!("{} {meta:?}\n", escaped(path)).as_bytes());
        }
        let hex = hasher.finish().hex();
        format!("{}-{}", diff_id.hex(), hex.get(..16).unwrap_or(&hex))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Limits;
    use crate::tarball::{Entries, Kind, Writer};
    use serde_json::json;
    use std::io;

    /// A layer of directories (`a/`), opaque ones (`a/.wh..wh..opq`), whiteouts and files.
    fn record(entries: &[(&str, u32)]) -> Record {
        let mut out = Writer::new(Vec::new());
        for (name, mode) in entries {
            let kind = match name.strip_suffix('/') {
                Some(_) => Kind::Directory,
                None => Kind::File,
            };
            let mode = *mode;
            let meta = Meta {
                mode,
                ..Meta::default()
            };
            let name = name.trim_end_matches('/').as_bytes();
            out.entry(name, &kind, &meta, 0, &mut io::empty()).unwrap();
        }
        let archive = out.finish().unwrap();
        let tree = Tree::read(&mut Entries::new(&archive[..]), &Limits::default()).unwrap();
        Record::new(Digest::of(&archive), &tree)
    }

    #[test]
    fn a_record_in_a_store_has_the_names_that_it_always_had() {
        let directory = json!({ "mode": 0o755, "uid": 0, "gid": 0, "mtime": 0 });
        let stored = json!({
            "diff_id": Digest::of(b"a"),
            "size": 1,
            "empty": false,
            "opaque": false,
            "implied": [],
            "whiteouts": [],
            "folders": { "etc": directory },
        });
        let record: Record = serde_json::from_value(stored.clone()).unwrap();
        assert!(record.directories.contains_key("etc"));
        assert_eq!(serde_json::to_value(record).unwrap(), stored);
    }

    #[test]
    fn directories_look_as_the_highest_layer_below_that_shows_them() {
        let modes = |below: &[&Record]| {
            let above = record(&[("a b/c/file", 0)]);
            let found = above.inherited(below).0;
            let found = found.into_iter();
            found
                .map(|(path, meta)| (String::from_utf8(path).unwrap(), meta.mode))
                .collect::<Vec<_>>()
        };
        let described = record(&[("a b/", 0o700), ("a b/c/", 0o711)]);
        let (outer, inner) = (("a b".to_owned(), 0o700), ("a b/c".to_owned(), 0o711));
        let both = [outer.clone(), inner.clone()];
        assert_eq!(modes(&[&described]), both);
        for (layer, expected) in [
            (record(&[("other/", 0o755)]), &both[..]),
            // A whiteout, of it and of what it lies in.
            (record(&[("a b/.wh.c", 0)]), &both[..1]),
            (record(&[(".wh.a b", 0)]), &[]),
            // Opaque: what hides all in it is described, or only implied.
            (record(&[(".wh..wh..opq", 0)]), &[]),
            (record(&[("a b/.wh..wh..opq", 0)]), &both[..1]),
            (
                record(&[("a b/", 0o500), ("a b/.wh..wh..opq", 0)]),
                &[("a b".to_owned(), 0o500)],
            ),
            // One that is opaque itself looks as below.
            (record(&[("a b/c/.wh..wh..opq", 0)]), &both),
            // Many that are of no interest.
            (
                record(&[
                    ("a b/c/", 0o555),
                    ("w/", 0),
                    ("x/", 0),
                    ("y/", 0),
                    ("z/", 0),
                ]),
                &[outer.clone(), ("a b/c".to_owned(), 0o555)],
            ),
        ] {
            assert_eq!(modes(&[&described, &layer]), expected, "{layer:?}");
            // What is below them is hidden, what is above is not.
            assert_eq!(modes(&[&layer, &described]), both);
        }
        assert_eq!(escaped(b"a b/%\xff"), "a%20b/%25%ff");
        assert_eq!(unescaped("a%20b/%25%ff"), b"a b/%\xff");
    }
}
