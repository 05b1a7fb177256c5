//! A layer's archive becomes a read-only file system.
//!
//! The archive is read twice: once to check it all and to know what is left in
//! the end, once for the files' data. `sqfstar` gets an archive of our own making,
//! and nothing is ever unpacked on the host.
//!
//! Overlayfs shows a folder as its highest layer has it. A folder that a layer's
//! archive has files for but does not describe must look as it does below: it
//! takes what the layers below say of it, and the layer's name then says so too.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::{self, JoinHandle};

use serde::{Deserialize, Serialize};

use super::digest::{Digest, Hasher, Hashing};
use super::limits::Limits;
use super::progress::{Progress, Task};
use super::section::Section;
use super::tarball::{ArchiveError, Entries, Kind, Meta, Writer};
use super::tree::{Inode, InodeKind, Tree};
use crate::helper;

/// Where a layer's files are in its file system: what is above is the tool's own,
/// which gives it an owner and a time of its choice.
pub const LAYER_ROOT: &str = "root";
/// The file with the file system.
pub const IMAGE_FILE: &str = "layer.squashfs";

/// Why there is no layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The archive is refused.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// It is not what it should be.
    #[error("it is {found}, not {expected}")]
    Digest {
        /// What was meant.
        expected: Digest,
        /// What came.
        found: Digest,
    },
    /// Debian's tool is not there.
    #[error("sqfstar is missing; install the package squashfs-tools (4.5 or newer)")]
    NoTool,
    /// It failed.
    #[error("sqfstar: {0}")]
    Tool(String),
    /// A file of the store.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What layers above need to know of one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The digest of the archive, uncompressed.
    pub diff_id: Digest,
    /// How many bytes its files have.
    pub size: u64,
    /// It has nothing, and changes nothing.
    pub empty: bool,
    /// It hides all layers below.
    pub opaque: bool,
    /// Folders that it has files for and does not describe.
    implied: Vec<String>,
    /// Of those, the ones of which it shows nothing that is below.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    implied_opaque: BTreeSet<String>,
    /// What it takes away.
    whiteouts: BTreeSet<String>,
    /// The folders that it describes.
    folders: BTreeMap<String, Folder>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Folder {
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
    super::tarball::percent_decoded(text.as_bytes())
}

impl Folder {
    fn new(meta: &Meta, opaque: bool) -> Self {
        let xattrs = meta.xattrs.iter();
        Folder {
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

    /// Folders of which it shows nothing that is below.
    pub fn opaque_folders(&self) -> impl Iterator<Item = Vec<u8>> {
        let described = self.folders.iter().filter(|(_, folder)| folder.opaque);
        let described = described.map(|(path, _)| path);
        described
            .chain(&self.implied_opaque)
            .map(|path| unescaped(path))
    }

    pub(super) fn new(diff_id: Digest, tree: &Tree) -> Self {
        let (mut implied, mut implied_opaque) = (Vec::new(), BTreeSet::new());
        let mut folders = BTreeMap::new();
        let mut hides = false;
        for (path, _, inode) in tree.names() {
            if let InodeKind::Folder {
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
                        folders.insert(escaped(path), Folder::new(&inode.meta, opaque));
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
            folders,
        }
    }

    /// What the implied folders have in the layers below, lowest first.
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
        // The layer that hides what lies in a folder and below that layer. A folder comes
        // before what is in it.
        let mut inside: HashMap<&str, Option<usize>> = HashMap::new();
        let mut metas = HashMap::new();
        for (path, said) in said {
            let outer = outwards(path).nth(1);
            let outer = outer.and_then(|outer| inside.get(outer)).copied();
            let hidden = outer.unwrap_or(hides_all).max(said.gone);
            inside.insert(path, hidden.max(said.opaque));
            if let Some((level, folder)) = said.folder
                && hidden <= Some(level)
            {
                metas.insert(path, folder);
            }
        }
        let found = self.implied.iter().filter_map(|path| {
            let folder = metas.get(path.as_str())?;
            Some((unescaped(path), folder.meta()))
        });
        Inheritance(found.collect())
    }

    /// Adds what this layer says of folders; those below it have said theirs.
    fn say<'a>(&'a self, level: usize, said: &mut BTreeMap<&str, Said<'a>>) {
        let add = |path: &str, said: &mut Said<'a>| {
            let folder = self.folders.get(path);
            if let Some(folder) = folder {
                said.folder = Some((level, folder));
            }
            if self.whiteouts.contains(path) {
                said.gone = Some(level);
            }
            if folder.is_some_and(|it| it.opaque) || self.implied_opaque.contains(path) {
                said.opaque = Some(level);
            }
        };
        let names = [self.whiteouts.len(), self.implied_opaque.len()];
        let names = names.iter().fold(self.folders.len(), |sum, len| sum + len);
        if said.len() < names {
            said.iter_mut().for_each(|(path, said)| add(path, said));
            return;
        }
        let names = self.folders.keys().chain(&self.whiteouts);
        for path in names.chain(&self.implied_opaque) {
            if let Some(said) = said.get_mut(path.as_str()) {
                add(path, said);
            }
        }
    }
}

/// What layers say of a folder: which was the last to, by its place from the lowest.
#[derive(Default)]
struct Said<'a> {
    /// How it looks.
    folder: Option<(usize, &'a Folder)>,
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
pub struct Inheritance(Vec<(Vec<u8>, Meta)>);

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

/// An archive that was read once and found good.
pub struct Checked<'a> {
    source: &'a Section,
    limits: Limits,
    /// What is left in the end.
    pub tree: Tree,
    /// What there is to know of it.
    pub record: Record,
}

/// Reads an archive, and checks all of it.
pub fn check<'a>(
    source: &'a Section,
    expected: Option<Digest>,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<Checked<'a>, LayerError> {
    let task = progress.begin("checking a layer", None);
    let input = Hashing::new(Watched {
        inner: source.unpacked(limits)?,
        task: &*task,
    });
    let mut entries = Entries::new(input);
    let tree = Tree::read(&mut entries, limits).map_err(ArchiveError::plainly)?;
    let found = entries.into_inner().finish();
    let (found, _) = found.map_err(|error| ArchiveError::from(error).plainly())?;
    if let Some(expected) = expected.filter(|expected| *expected != found) {
        return Err(LayerError::Digest { expected, found });
    }
    let record = Record::new(found, &tree);
    Ok(Checked {
        source,
        limits: *limits,
        tree,
        record,
    })
}

impl Checked<'_> {
    /// Makes the file system, in a folder that is nobody else's.
    pub fn build(
        &mut self,
        inheritance: &Inheritance,
        folder: &Path,
        progress: &dyn Progress,
    ) -> Result<(), LayerError> {
        for (path, meta) in &inheritance.0 {
            self.tree.inherit(path, meta.clone());
        }
        let image = folder.join(IMAGE_FILE);
        let mut tool = Tool::start(&image)?;
        let total = self.tree.data();
        let written = tool.input().and_then(|input| {
            let task = progress.begin("making a file system", Some(total));
            self.write(BufWriter::with_capacity(256 << 10, input), &*task)
        });
        // Why the tool stopped to read says more than that it did.
        match written {
            Err(LayerError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                tool.finish()?;
                return Err(LayerError::Io(error));
            }
            Err(error) => return Err(error),
            Ok(()) => tool.finish()?,
        }
        let file = OpenOptions::new().read(true).write(true).open(&image)?;
        set_root_time(&file)?;
        file.sync_all()?;
        Ok(())
    }

    /// Writes the archive that the tool gets.
    pub fn write(&self, output: impl Write, task: &dyn Task) -> Result<(), LayerError> {
        let mut out = Writer::new(output);
        let mut nothing = io::empty();
        let mut data: BTreeMap<usize, (&[u8], &Inode)> = BTreeMap::new();
        let mut first: BTreeMap<usize, &[u8]> = BTreeMap::new();
        let mut links = Vec::new();
        for (path, number, inode) in self.tree.names() {
            let meta = clean(
                &inode.meta,
                matches!(inode.kind, InodeKind::Folder { opaque: true, .. }),
            );
            if let Some(target) = first.get(&number) {
                links.push((path, *target));
                continue;
            }
            match &inode.kind {
                InodeKind::File { size: 1.., entry } => {
                    first.insert(number, path);
                    data.insert(*entry, (path, inode));
                }
                InodeKind::File { .. } => {
                    first.insert(number, path);
                    out.entry(&inside(path), &Kind::File, &meta, 0, &mut nothing)?;
                }
                InodeKind::Folder { .. } => {
                    out.entry(&inside(path), &Kind::Folder, &meta, 0, &mut nothing)?;
                }
                InodeKind::Other(kind) => {
                    first.insert(number, path);
                    out.entry(&inside(path), kind, &meta, 0, &mut nothing)?;
                }
            }
        }
        for path in self.tree.whiteouts() {
            out.entry(
                &inside(path),
                &Kind::Char(0, 0),
                &Meta::default(),
                0,
                &mut nothing,
            )?;
        }
        self.write_data(&mut out, &data, task)?;
        for (path, target) in links {
            let kind = Kind::Link(inside(target));
            out.entry(&inside(path), &kind, &Meta::default(), 0, &mut nothing)?;
        }
        out.finish()?;
        Ok(())
    }

    /// The files' data, in the order of the archive. It must still be what was checked.
    fn write_data(
        &self,
        out: &mut Writer<impl Write>,
        wanted: &BTreeMap<usize, (&[u8], &Inode)>,
        task: &dyn Task,
    ) -> Result<(), LayerError> {
        let changed = || ArchiveError::Changed;
        let Some(last) = wanted.last_key_value().map(|(entry, _)| *entry) else {
            return Ok(());
        };
        let source = self.source.unpacked(&self.limits)?;
        let mut entries = Entries::new(Hashing::new(source));
        for number in 0..=last {
            let entry = entries
                .next()
                .map_err(ArchiveError::plainly)?
                .ok_or_else(changed)?;
            let Some((path, inode)) = wanted.get(&number) else {
                continue;
            };
            if (InodeKind::File {
                size: entry.size,
                entry: number,
            }) != inode.kind
            {
                return Err(changed().into());
            }
            let meta = clean(&inode.meta, false);
            let mut data = Watched {
                inner: &mut entries,
                task,
            };
            out.entry(&inside(path), &Kind::File, &meta, entry.size, &mut data)?;
        }
        let found = entries.into_inner().finish();
        match found
            .map_err(|error| ArchiveError::from(error).plainly())?
            .0
            == self.record.diff_id
        {
            true => Ok(()),
            false => Err(changed().into()),
        }
    }
}

/// The path in the file system.
pub fn inside(path: &[u8]) -> Vec<u8> {
    match path {
        b"" => LAYER_ROOT.into(),
        path => [LAYER_ROOT.as_bytes(), b"/", path].concat(),
    }
}

/// What the file system can keep, and only we may say: how layers lie upon
/// another is none of an archive's business.
pub fn clean(meta: &Meta, opaque: bool) -> Meta {
    let mut meta = meta.clone();
    let kept = |name: &[u8]| {
        let known = [&b"user."[..], b"trusted.", b"security."];
        let overlay = [&b"user.overlay."[..], b"trusted.overlay."];
        known
            .iter()
            .any(|prefix| name.starts_with(prefix) && name.len() > prefix.len())
            && !overlay.iter().any(|prefix| name.starts_with(prefix))
    };
    meta.xattrs.retain(|name, _| kept(name));
    if opaque {
        meta.xattrs
            .insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
    }
    meta
}

/// `sqfstar` at work; ended with this.
struct Tool {
    child: Child,
    errors: Option<JoinHandle<String>>,
}

/// What its caches may hold together.
const TOOL_MEMORY: &str = "256M";
/// How much of what it says is shown.
const TOOL_TEXT_MAX: u64 = 2000;

impl Tool {
    fn start(image: &Path) -> Result<Self, LayerError> {
        let mut command = Command::new("sqfstar");
        // Inodes are not compressed, so that the root's time can be set.
        command
            .args([
                "-comp",
                "lz4",
                "-noI",
                "-mkfs-time",
                "0",
                "-root-mode",
                "0755",
            ])
            .args([
                "-no-progress",
                "-quiet",
                "-exit-on-error",
                "-mem",
                TOOL_MEMORY,
            ])
            .arg(image)
            .env_remove("SOURCE_DATE_EPOCH")
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // Ctrl-C is for us, who then end it.
        helper::end_with_us(&mut command);
        let mut child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => LayerError::NoTool,
            _ => LayerError::Io(error),
        })?;
        let errors = child.stderr.take();
        let errors = errors.map(|errors| thread::spawn(move || words_of(errors)));
        Ok(Tool { child, errors })
    }

    fn input(&mut self) -> Result<ChildStdin, LayerError> {
        let input = self.child.stdin.take();
        input.ok_or_else(|| LayerError::Tool("has no standard input".into()))
    }

    fn finish(mut self) -> Result<(), LayerError> {
        let status = self.child.wait()?;
        if status.success() {
            return Ok(());
        }
        let text = self.errors.take().and_then(|errors| errors.join().ok());
        let text = text.filter(|text| !text.is_empty());
        Err(LayerError::Tool(text.unwrap_or_else(|| status.to_string())))
    }
}

/// What a program says, in a line: its start, and the rest is not kept.
fn words_of(mut errors: impl Read) -> String {
    let mut text = Vec::new();
    let _ = (&mut errors).take(TOOL_TEXT_MAX).read_to_end(&mut text);
    let _ = io::copy(&mut errors, &mut io::sink());
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join("; ")
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sets the time of the file system's own root, which the tool takes from the
/// clock: equal layers are equal files.
fn set_root_time(file: &File) -> io::Result<()> {
    const ROOT_INODE: u64 = 32;
    const INODE_TABLE: u64 = 64;
    const MTIME: u64 = 8;
    const METADATA_BLOCK: u64 = 8192;
    const UNCOMPRESSED: u16 = 0x8000;
    let number = |at: u64| -> io::Result<u64> {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at)?;
        Ok(u64::from_le_bytes(bytes))
    };
    let root = number(ROOT_INODE)?;
    let (block, offset) = (root >> 16, root & 0xffff);
    let mut block = number(INODE_TABLE)?.saturating_add(block);
    let mut at = offset.saturating_add(MTIME);
    // Each metadata block has two bytes with its length before it.
    if at >= METADATA_BLOCK {
        at = at.saturating_sub(METADATA_BLOCK);
        block = block.saturating_add(METADATA_BLOCK + 2);
    }
    let mut header = [0; 2];
    file.read_exact_at(&mut header, block)?;
    if u16::from_le_bytes(header) & UNCOMPRESSED == 0 || at > METADATA_BLOCK - 4 {
        // Another version of the tool: only the time is not as it should be.
        return Ok(());
    }
    file.write_all_at(&[0; 4], block.saturating_add(2).saturating_add(at))
}

/// Tells of what passes.
struct Watched<'a, R> {
    inner: R,
    task: &'a dyn Task,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.task.advance(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::progress::Quiet;

    fn archive(entries: &[(&str, &str)]) -> Vec<u8> {
        let mut out = Writer::new(Vec::new());
        for (name, text) in entries {
            let (meta, len) = (Meta::default(), text.len() as u64);
            let mut data = text.as_bytes();
            out.entry(name.as_bytes(), &Kind::File, &meta, len, &mut data)
                .unwrap();
        }
        out.finish().unwrap()
    }

    /// A layer of folders (`a/`), opaque ones (`a/.wh..wh..opq`), whiteouts and files.
    fn record(entries: &[(&str, u32)]) -> Record {
        let mut out = Writer::new(Vec::new());
        for (name, mode) in entries {
            let kind = match name.strip_suffix('/') {
                Some(_) => Kind::Folder,
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
    fn folders_look_as_the_highest_layer_below_that_shows_them() {
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
            (record(&[("a b/.wh.c", 0)]), &[outer.clone()]),
            (record(&[(".wh.a b", 0)]), &[]),
            // Opaque: what hides all in it is described, or only implied.
            (record(&[(".wh..wh..opq", 0)]), &[]),
            (record(&[("a b/.wh..wh..opq", 0)]), &[outer.clone()]),
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

    /// Between the two readings somebody writes to the archive: the layer must not have
    /// a genuine digest's name then.
    #[test]
    fn what_is_written_is_what_was_checked() {
        let good = archive(&[("a", "good"), ("b", "")]);
        for bad in [
            archive(&[("a", "evil"), ("b", "")]),
            archive(&[("a", "good"), ("b", "x")]),
        ] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&good).unwrap();
            let other = file.try_clone().unwrap();
            let source = Section::whole(file).unwrap();
            let digest = Digest::of(&good);
            let checked = check(&source, Some(digest), &Limits::default(), &Quiet).unwrap();
            checked.write(io::sink(), &Quiet).unwrap();
            other.write_all_at(&bad, 0).unwrap();
            let error = checked.write(io::sink(), &Quiet).unwrap_err().to_string();
            assert_eq!(error, "the archive changed while it was read");
        }
    }
}
