//! The files of an archive, or of a directory, that holds images.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use mayfly_text::printable;

use crate::config::Descriptor;
use crate::digest::{Digest, Hashing};
use crate::error::{Context, Error};
use crate::section::{Section, SectionReader};
use crate::store::read_json;
use crate::tarball::{ArchiveError, Entries, Kind};
use crate::tree::{normalised, split};

/// The most files of an archive of images.
const MEMBERS_MAX: usize = 100_000;
/// How many bytes their names may have together.
const NAMES_MAX: usize = 64 << 20;
/// How many links lead to a file at most.
const LINKS_MAX: usize = 8;
/// How many bytes of JSON are read of an archive, however many documents those are.
const DOCUMENTS_MAX: u64 = 64 << 20;

/// The files of an archive or of a directory.
pub struct Files {
    kind: FilesKind,
    /// Blobs whose digest was found right: several images may have them.
    verified: RefCell<BTreeSet<Digest>>,
    documents_left: Cell<u64>,
}

enum FilesKind {
    Directory(PathBuf),
    Archive(BTreeMap<Vec<u8>, Member>),
}

enum Member {
    Data(Section),
    Link(Vec<u8>),
}

/// Keeps a member that cannot be read in place.
pub type Spool<'a> = &'a dyn Fn(&mut dyn Read) -> io::Result<Section>;

impl Files {
    fn new(kind: FilesKind) -> Self {
        Files {
            kind,
            verified: RefCell::default(),
            documents_left: Cell::new(DOCUMENTS_MAX),
        }
    }

    /// Those below a directory.
    pub fn directory(path: &Path) -> Self {
        Files::new(FilesKind::Directory(path.to_owned()))
    }

    /// A file, if it is there.
    pub fn open(&self, name: &str) -> Result<Option<Section>, Error> {
        let path = normalised(name.as_bytes())
            .map_err(|why| Error::invalid(format!("{name:?}: {why}")))?;
        match &self.kind {
            FilesKind::Directory(root) => {
                // The name as it is may be absolute.
                let path = root.join(OsStr::from_bytes(&path));
                let file = inside(root, &path).and_then(|()| {
                    File::options()
                        .read(true)
                        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                        .open(&path)
                });
                match file {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                    file => file
                        .and_then(Section::whole)
                        .map(Some)
                        .or_invalid(path.display()),
                }
            }
            FilesKind::Archive(members) => {
                let mut path = path;
                for _ in 0..LINKS_MAX {
                    match members.get(&path) {
                        None => return Ok(None),
                        Some(Member::Data(data)) => return Ok(Some(data.clone())),
                        Some(Member::Link(target)) => path = target.clone(),
                    }
                }
                Ok(None)
            }
        }
    }

    /// A file that must be there.
    pub fn need(&self, name: &str) -> Result<Section, Error> {
        self.open(name)?.ok_or_else(|| {
            let name = printable::line(name);
            Error::invalid(format!("{name} is missing"))
        })
    }

    /// A document that must be there.
    pub fn json(&self, name: &str) -> Result<Vec<u8>, Error> {
        self.read(&self.need(name)?, &printable::line(name))
    }

    fn read(&self, source: &Section, name: &str) -> Result<Vec<u8>, Error> {
        let left = self.documents_left.get().checked_sub(source.len());
        let left = left.ok_or_else(|| {
            Error::invalid(format!("{name}: more than 64 MiB of JSON in an archive"))
        })?;
        self.documents_left.set(left);
        read_json(source, name)
    }

    /// True if a blob is there.
    pub fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, Error> {
        Ok(self.open(&blob_name(descriptor))?.is_some())
    }

    /// A document of a digest.
    pub fn json_blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        let name = blob_name(descriptor);
        let data = self.json(&name)?;
        // What was read is what counts: the file may be another by now.
        match_digest(&name, descriptor, Digest::of(&data), data.len() as u64)?;
        Ok(data)
    }

    /// A blob, and all of it, of its digest.
    pub fn blob(&self, descriptor: &Descriptor) -> Result<Section, Error> {
        let name = blob_name(descriptor);
        let blob = self.need(&name)?;
        if !self.verified.borrow().contains(&descriptor.digest) {
            let (digest, len) = Hashing::new(blob.reader()).finish().or_host(&name)?;
            match_digest(&name, descriptor, digest, len)?;
            self.verified.borrow_mut().insert(digest);
        }
        Ok(blob)
    }

    /// Reads the list of an archive whose members can be read in place, but for those
    /// with holes, which are no larger together than `most`.
    pub fn list(archive: &Section, most: u64, spool: Spool) -> Result<Self, ArchiveError> {
        let mut members = BTreeMap::new();
        let mut entries = Entries::new(archive.reader());
        let mut names = 0_usize;
        let mut holey = 0_u64;
        while let Some(entry) = entries.next_entry()? {
            let refuse = |why| ArchiveError::entry(&entry.path, why);
            let path = normalised(&entry.path).map_err(refuse)?;
            let member = match &entry.kind {
                Kind::File if entries.has_holes() => {
                    holey = holey.saturating_add(entry.size);
                    if holey > most {
                        return Err(refuse("has holes, and is too large with them"));
                    }
                    Member::Data(spool(&mut entries)?)
                }
                Kind::File => {
                    let start = SectionReader::position(entries.get_ref());
                    let part = archive.part(start, entry.size);
                    Member::Data(part.ok_or(ArchiveError::Truncated)?)
                }
                Kind::Link(target) => Member::Link(normalised(target).map_err(refuse)?),
                Kind::Symlink(target) => Member::Link(beside(&path, target)),
                _ => continue,
            };
            let target = match &member {
                Member::Link(target) => target.len(),
                Member::Data(_) => 0,
            };
            names = names.saturating_add(path.len()).saturating_add(target);
            if members.len() >= MEMBERS_MAX || names > NAMES_MAX {
                return Err(ArchiveError::TooMuch(
                    "more than 100000 files in an archive of images".into(),
                ));
            }
            members.insert(path, member);
        }
        Ok(Files::new(FilesKind::Archive(members)))
    }
}

fn blob_name(descriptor: &Descriptor) -> String {
    format!("blobs/sha256/{}", descriptor.digest.hex())
}

fn match_digest(name: &str, wanted: &Descriptor, digest: Digest, len: u64) -> Result<(), Error> {
    if digest != wanted.digest {
        return Err(Error::invalid(format!("{name}: its digest is {digest}")));
    }
    match len == wanted.size {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "{name}: it has {len} bytes, not {}",
            wanted.size
        ))),
    }
}

/// No directory on the way to a file is a symbolic link that leads out of the root.
fn inside(root: &Path, path: &Path) -> io::Result<()> {
    let parent = path.parent().unwrap_or(root);
    match parent.canonicalize()?.starts_with(root.canonicalize()?) {
        true => Ok(()),
        false => Err(io::Error::other("lies outside of the folder")),
    }
}

/// What a symbolic link in an archive means; nothing outside of it.
fn beside(path: &[u8], target: &[u8]) -> Vec<u8> {
    let start = match target.starts_with(b"/") {
        true => b"",
        false => split(path).0,
    };
    let mut names: Vec<&[u8]> = Vec::new();
    let parts = start
        .split(|byte| *byte == b'/')
        .chain(target.split(|byte| *byte == b'/'));
    for name in parts {
        match name {
            b"" | b"." => {}
            b".." => {
                names.pop();
            }
            name => names.push(name),
        }
    }
    names.join(&b'/')
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::progress::Quiet;
    use crate::tarball::{Meta, Writer};

    fn files(entries: &[(&str, Kind, &str)]) -> Files {
        let mut out = Writer::new(Vec::new());
        for (name, kind, data) in entries {
            let len = data.len() as u64;
            out.entry(
                name.as_bytes(),
                kind,
                &Meta::default(),
                len,
                &mut data.as_bytes(),
            )
            .unwrap();
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&out.finish().unwrap()).unwrap();
        let spool: Spool = &|input| Section::spooled(input, Path::new("/tmp"), &Quiet);
        Files::list(&Section::whole(file).unwrap(), 1 << 20, spool).unwrap()
    }

    #[test]
    fn links_in_an_archive_lead_nowhere_else() {
        let symlink = |target: &str| Kind::Symlink(target.as_bytes().to_vec());
        let files = files(&[
            ("./a/layer.tar", Kind::File, "data"),
            ("b/layer.tar", symlink("../a/layer.tar"), ""),
            ("c", Kind::Link(b"b/layer.tar".to_vec()), ""),
            ("d", symlink("/../../a/./layer.tar"), ""),
            ("round", symlink("and-round"), ""),
            ("and-round", symlink("round"), ""),
            ("out", symlink("/etc/passwd"), ""),
        ]);
        for name in ["a/layer.tar", "b/layer.tar", "c", "d", "./a//layer.tar"] {
            let mut text = String::new();
            let found = files.open(name).unwrap().unwrap();
            found.reader().read_to_string(&mut text).unwrap();
            assert_eq!(text, "data", "{name}");
        }
        for name in ["round", "out", "missing", "a"] {
            assert!(files.open(name).unwrap().is_none(), "{name}");
        }
        assert!(files.open("../a").is_err());
    }

    #[test]
    fn names_in_a_directory_lead_nowhere_else() {
        let directory = tempfile::tempdir().unwrap();
        let (root, secret) = (
            directory.path().join("image"),
            directory.path().join("secret"),
        );
        std::fs::create_dir_all(root.join("blobs")).unwrap();
        std::fs::write(root.join("blobs/a"), "data").unwrap();
        std::fs::write(&secret, "secret").unwrap();
        std::os::unix::fs::symlink(directory.path(), root.join("out")).unwrap();
        std::os::unix::fs::symlink(&secret, root.join("link")).unwrap();
        let files = Files::directory(&root);
        for name in ["blobs/a", "/blobs/a", "./blobs//a"] {
            assert_eq!(files.open(name).unwrap().unwrap().len(), 4, "{name}");
        }
        let absolute = secret.to_str().unwrap();
        for name in [
            absolute,
            "out/secret",
            "link",
            "../secret",
            "blobs/b",
            "x/y",
        ] {
            assert!(!matches!(files.open(name), Ok(Some(_))), "{name}");
        }
    }
}
