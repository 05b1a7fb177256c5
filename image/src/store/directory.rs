//! The directories of a store, and how files come into them: whole, or not at all.
//!
//! ```text
//! lock              held while names, images or layers come or go
//! names.json        names → images
//! images/ID.json    an image: its configuration, its layers
//! layers/NAME/      a layer: layer.squashfs, layer.json; NAME is its archive's
//!                   digest, and what it takes from layers below
//! partial/DIGEST    a blob on its way from a registry
//! tmp/…             what is being made; its maker has it locked
//! ```

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use tempfile::{NamedTempFile, TempDir};

use super::lock;

const PRIVATE: u32 = 0o700;
/// The directories in a store.
pub const IMAGES: &str = "images";
pub const LAYERS: &str = "layers";
pub const PARTIAL: &str = "partial";
const TMP: &str = "tmp";
const LOCK: &str = "lock";
const SCRATCH: &str = "scratch-";

/// A store's directories.
#[derive(Debug)]
pub struct Directory(PathBuf);

impl Directory {
    /// Opens a store, and makes what is missing.
    pub fn open(root: &Path) -> io::Result<Self> {
        for path in ["", IMAGES, LAYERS, PARTIAL, TMP] {
            DirBuilder::new()
                .recursive(true)
                .mode(PRIVATE)
                .create(root.join(path))?;
        }
        // What is ours alone needs no check of its parts later.
        let metadata = fs::metadata(root)?;
        let user = geteuid().as_raw();
        if !metadata.is_dir() || metadata.uid() != user || metadata.mode() & 0o022 != 0 {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "must be a folder of yours that nobody else may write to",
            ));
        }
        // What nobody could lock could not be swept.
        let directory = Directory(root.to_owned());
        File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(directory.path(LOCK))?;
        Ok(directory)
    }

    /// A path below the store's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Waits until nobody else changes names, images or layers.
    pub fn lock(&self) -> io::Result<File> {
        lock::take_file(&self.path(LOCK), || {})
    }

    /// A new directory to make something in, removed with its value; if the process
    /// is killed, by who comes next.
    pub fn work(&self) -> io::Result<Work> {
        let _lock = self.lock()?;
        let directory = tempfile::Builder::new().tempdir_in(self.path(TMP))?;
        let held = File::open(directory.path())?;
        held.lock()?;
        Ok(Work {
            directory,
            _held: held,
        })
    }

    /// Removes what killed processes left. Does nothing while others are busy.
    pub fn clean(&self) -> io::Result<()> {
        let Some(_lock) = lock::take(&self.path(LOCK))? else {
            return Ok(());
        };
        for entry in fs::read_dir(self.path(TMP))? {
            let path = entry?.path();
            if let Some(_held) = lock::take(&path)? {
                match path.is_dir() {
                    true => fs::remove_dir_all(&path)?,
                    false => fs::remove_file(&path)?,
                }
            }
        }
        // Disks that earlier versions gave a name until they were made.
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            let name = entry.file_name();
            let old = name.as_encoded_bytes().starts_with(SCRATCH.as_bytes());
            if old && entry.file_type()?.is_file() {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes a directory: its name first, as half of it must not have that. The
    /// caller has the lock.
    pub fn discard(&self, path: &Path) -> io::Result<()> {
        let work = tempfile::tempdir_in(self.path(TMP))?;
        fs::rename(path, work.path().join("gone"))?;
        work.close()
    }

    /// Writes a file that takes the place of an older one whole. The caller has
    /// the lock.
    pub fn write(&self, name: &str, data: &[u8]) -> io::Result<()> {
        let path = self.path(name);
        let mut file = NamedTempFile::new_in(self.path(TMP))?;
        file.write_all(data)?;
        file.as_file().sync_all()?;
        file.persist(&path).map_err(|error| error.error)?;
        sync_parent(&path)
    }
}

/// A directory in which something is made.
#[derive(Debug)]
pub struct Work {
    directory: TempDir,
    _held: File,
}

impl Work {
    /// The path.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Makes the names in a path's directory last.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}
