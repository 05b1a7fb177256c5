//! A layer's archive becomes a read-only file system.
//!
//! The archive is read twice: once to check it all and to know what is left in
//! the end, once for the files' data. `sqfstar` gets an archive of our own making,
//! and nothing is ever unpacked on the host.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::{self, JoinHandle};

use mayfly_process::programs;

use super::digest::{Digest, Hashing};
use super::limits::Limits;
use super::progress::{Progress, Task};
pub use super::records::{Inheritance, Record};
use super::section::Section;
use super::tarball::{ArchiveError, Entries, Kind, Meta, Writer};
use super::tree::{Inode, InodeKind, Tree};

/// Where a layer's files are in its file system: what is above is the tool's own,
/// which gives it an owner and a time of its choice.
pub const LAYER_ROOT: &str = "root";
/// The file with the file system.
pub const IMAGE_FILE: &str = "layer.squashfs";

/// The reason why a layer could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The archive is refused.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// It is not what it should be.
    #[error("it is {found}, not {expected}")]
    Digest {
        /// The digest that the image names.
        expected: Digest,
        /// The digest of the data.
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

/// An archive that was read once and found good.
pub struct Checked<'a> {
    source: &'a Section,
    limits: Limits,
    /// The tree of the files that are left in the end.
    pub tree: Tree,
    /// The record that the store keeps of it.
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
    /// Makes the file system, in a directory that is nobody else's.
    pub fn build(
        &mut self,
        inheritance: &Inheritance,
        directory: &Path,
        progress: &dyn Progress,
    ) -> Result<(), LayerError> {
        for (path, meta) in &inheritance.0 {
            self.tree.inherit(path, meta.clone());
        }
        let image = directory.join(IMAGE_FILE);
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
                matches!(inode.kind, InodeKind::Directory { opaque: true, .. }),
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
                InodeKind::Directory { .. } => {
                    out.entry(&inside(path), &Kind::Directory, &meta, 0, &mut nothing)?;
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
                .next_entry()
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
        programs::end_with_us(&mut command);
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
    use crate::progress::Quiet;

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
