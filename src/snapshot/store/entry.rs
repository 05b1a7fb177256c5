//! A folder of a store: what may be in it, and who may have made it.

use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use mayfly_files::lock;
use rustix::fs::{Mode, OFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::process::geteuid;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::super::memory;

/// The guest's memory.
pub const MEMORY: &str = "memory";
/// The rest of the machine's state.
pub const STATE: &str = "state";
/// What it is.
pub const MANIFEST: &str = "manifest.json";
/// The longest manifest, in bytes.
pub const MANIFEST_MAX: u64 = 1 << 20;

/// Bits of a mode that are others', or let a file be executed.
const NOT_PRIVATE: u32 = 0o177;
const FOLDER_NOT_PRIVATE: u32 = 0o077;
/// What is complete does not change any more.
const COMPLETE: u32 = 0o400;
/// The unit of a file's blocks, in bytes (`stat(2)`).
const BLOCK: u64 = 512;

/// A folder that stays as long as this does.
#[derive(Debug)]
pub struct Entry {
    path: PathBuf,
    held: File,
}

impl Entry {
    /// Opens a folder and holds it, beside others who do. `None` if there is none.
    pub fn hold(path: &Path) -> io::Result<Option<Self>> {
        let Some(held) = lock::hold(path)? else {
            return Ok(None);
        };
        let found = held.metadata()?;
        let user = geteuid().as_raw();
        if !found.is_dir() || found.uid() != user || found.mode() & FOLDER_NOT_PRIVATE != 0 {
            return refused("must be a folder of yours with mode 0700");
        }
        let path = path.to_owned();
        Ok(Some(Entry { path, held }))
    }

    /// Whether both are the same folder, wherever that is by now.
    pub fn is(&self, other: &Entry) -> bool {
        let folder = |entry: &Entry| entry.held.metadata().map(|it| (it.dev(), it.ino()));
        matches!((folder(self), folder(other)), (Ok(one), Ok(two)) if one == two)
    }

    /// Opens one of its files to be read, if that is its owner's alone.
    pub fn file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: OwnedFd = rustix::fs::openat(&self.held, name, flags, Mode::empty())?;
        let file = File::from(file);
        let found = file.metadata()?;
        let private = found.mode() & NOT_PRIVATE == 0 && found.uid() == geteuid().as_raw();
        match found.is_file() && private {
            true => Ok(file),
            false => refused("its files must be yours alone"),
        }
    }

    /// Reads its manifest, which is made of a version (`version`) and what is of that version.
    pub fn manifest<M: DeserializeOwned>(&self, version: u32) -> io::Result<M> {
        let mut text = Vec::new();
        { self.file(MANIFEST)?.take(MANIFEST_MAX + 1) }.read_to_end(&mut text)?;
        parse_manifest(&text, version).map_err(io::Error::other)
    }

    /// Notes that it is used now.
    pub fn note_use(&self) -> io::Result<()> {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_NOW,
        };
        let omit = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        };
        let times = Timestamps {
            last_access: omit,
            last_modification: now,
        };
        Ok(rustix::fs::futimens(&self.held, &times)?)
    }

    /// The time of its last use.
    pub fn used(&self) -> io::Result<SystemTime> {
        self.held.metadata()?.modified()
    }

    /// The bytes that it takes on disk: holes take none.
    pub fn bytes(&self) -> io::Result<u64> {
        let mut bytes = 0_u64;
        for file in fs::read_dir(&self.path)? {
            let blocks = file?.metadata()?.blocks();
            bytes = bytes.saturating_add(blocks.saturating_mul(BLOCK));
        }
        Ok(bytes)
    }
}

/// Why a manifest is refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is too long to be one.
    #[error("the manifest is longer than {} KiB", MANIFEST_MAX >> 10)]
    TooLong,
    /// It is not what mayfly writes.
    #[error("the manifest")]
    Json(#[source] serde_json::Error),
    /// Another mayfly wrote it.
    #[error("the manifest has version {0}, which this mayfly does not read")]
    Version(u32),
}

/// What all manifests have.
#[derive(serde::Deserialize)]
struct Versioned {
    version: u32,
}

/// Reads a manifest of a version.
pub fn parse_manifest<M: DeserializeOwned>(text: &[u8], version: u32) -> Result<M, ManifestError> {
    if u64::try_from(text.len()).is_ok_and(|len| len > MANIFEST_MAX) {
        return Err(ManifestError::TooLong);
    }
    let found: Versioned = serde_json::from_slice(text).map_err(ManifestError::Json)?;
    if found.version != version {
        return Err(ManifestError::Version(found.version));
    }
    serde_json::from_slice(text).map_err(ManifestError::Json)
}

fn refused<T>(why: &'static str) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

/// A folder's files that are written at present, for their owner alone.
#[derive(Debug)]
pub struct NewEntry {
    path: PathBuf,
    files: Vec<(String, File)>,
}

impl NewEntry {
    /// Makes the folder.
    pub fn create(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().mode(0o700).create(path)?;
        Ok(NewEntry {
            path: path.to_owned(),
            files: Vec::new(),
        })
    }

    /// Makes an empty file in it.
    pub fn add(&mut self, name: &str) -> io::Result<File> {
        let file = memory::create(&self.path.join(name))?;
        self.files.push((name.to_owned(), file.try_clone()?));
        Ok(file)
    }

    /// Writes the manifest, and all of it to the disk: nobody writes to it any more.
    pub fn complete(mut self, manifest: &impl Serialize) -> io::Result<PathBuf> {
        use std::io::Write;
        let text = serde_json::to_vec(manifest).map_err(io::Error::other)?;
        self.add(MANIFEST)?.write_all(&text)?;
        for (_, file) in &self.files {
            file.set_permissions(Permissions::from_mode(COMPLETE))?;
            file.sync_all()?;
        }
        File::open(&self.path)?.sync_all()?;
        Ok(self.path)
    }
}
