//! A folder into which files come by a rename, when they are whole.
//!
//! ```text
//! lock       held while something comes or goes
//! tmp/…      what is being made; its maker has it locked
//! ```
//!
//! Everything else is its user's. What a killed process left in `tmp` is removed by who
//! comes next.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use tempfile::{NamedTempFile, TempDir};

use crate::lock;

const PRIVATE: u32 = 0o700;
/// Bits of a mode that let others write.
const WRITABLE_BY_OTHERS: u32 = 0o022;
const TMP: &str = "tmp";
const LOCK: &str = "lock";

/// A folder of the user's.
#[derive(Debug)]
pub struct Directory(PathBuf);

impl Directory {
    /// Opens one, and makes what is missing of it and of the folders in it that `parts`
    /// names. Fails if another user owns it, or may write to it.
    pub fn open(root: &Path, parts: &[&str]) -> io::Result<Self> {
        for path in ["", TMP].iter().chain(parts) {
            DirBuilder::new()
                .recursive(true)
                .mode(PRIVATE)
                .create(root.join(path))?;
        }
        // What is ours alone needs no check of its parts later.
        let metadata = fs::metadata(root)?;
        let user = geteuid().as_raw();
        let shared = metadata.mode() & WRITABLE_BY_OTHERS != 0;
        if !metadata.is_dir() || metadata.uid() != user || shared {
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

    /// A path below the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Waits until nobody else lets things come or go.
    pub fn lock(&self) -> io::Result<File> {
        lock::take_file(&self.path(LOCK), || {})
    }

    /// A new folder to make something in, removed with its value; if the process
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
        Ok(())
    }

    /// Removes a folder: its name first, as half of it must not have that. The
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

/// A folder in which something is made.
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

/// Makes the names in a path's folder last.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_a_killed_maker_left_goes_and_what_is_being_made_stays() {
        let folder = tempfile::tempdir().unwrap();
        let directory = Directory::open(&folder.path().join("a/b"), &["kept"]).unwrap();
        let left = directory.path(TMP).join("left");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("half"), "x").unwrap();
        fs::write(directory.path(TMP).join("file"), "x").unwrap();
        let work = directory.work().unwrap();
        let lock = directory.lock().unwrap();
        directory.clean().unwrap();
        assert!(left.exists());
        drop(lock);
        directory.clean().unwrap();
        assert!(!left.exists() && work.path().exists());
        let made = work.path().to_owned();
        drop(work);
        assert!(!made.exists());
    }

    #[test]
    fn a_folder_that_others_may_write_to_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        Directory::open(&root, &[]).unwrap();
        for mode in [0o720, 0o702, 0o777] {
            fs::set_permissions(&root, Permissions::from_mode(mode)).unwrap();
            let error = Directory::open(&root, &[]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{mode:o}");
        }
    }
}
