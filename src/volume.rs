//! Named volumes: disk images with an ext4 file system, in the user's data folder.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::NamedTempFile;

use crate::control::{NAME_MAX, valid_name};
use crate::data_folder::data_folder;
use crate::disk_lock;
use crate::failure::{Failure, OrFail};

/// The size of one that is made when it is first used: the file is sparse.
pub const SIZE: u64 = 8 << 30;
const SUFFIX: &str = ".img";
/// What is on its way to become one.
const NEW: &str = ".new-";
const PRIVATE: u32 = 0o700;
const BLOCK: u64 = 512;

/// The user's volumes.
pub struct Volumes(PathBuf);

/// A volume.
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Its disk's image.
    pub path: PathBuf,
    /// What a guest can put there, in bytes.
    pub size: u64,
    /// What it takes on the host, in bytes.
    pub used: u64,
    /// A VM has it.
    pub busy: bool,
}

impl Volumes {
    /// Those of the user: `mayfly/volumes` in `XDG_DATA_HOME`, or in `~/.local/share`.
    pub fn open_default() -> Result<Self, Failure> {
        Self::open(&data_folder()?.join("volumes"))
    }

    /// Those of a folder, which is made if it is missing.
    pub fn open(folder: &Path) -> Result<Self, Failure> {
        DirBuilder::new()
            .recursive(true)
            .mode(PRIVATE)
            .create(folder)
            .or_host(folder.display())?;
        Ok(Volumes(folder.to_owned()))
    }

    fn path(&self, name: &str) -> Result<PathBuf, Failure> {
        match valid_name(name) {
            true => Ok(self.0.join(format!("{name}{SUFFIX}"))),
            false => Err(Failure::config(format!(
                "volume {name}: write 1 to {NAME_MAX} letters, digits, and . _ -"
            ))),
        }
    }

    /// Makes one. False if there is one of that name.
    pub fn create(&self, name: &str, size: u64) -> Result<bool, Failure> {
        let path = self.path(name)?;
        let what = format!("volume {name}");
        if path.exists() {
            return Ok(false);
        }
        // Whole, or not at all.
        let fresh = self.fresh().or_host(&what)?;
        make_ext4(fresh.path(), size, Journal::Yes, &what)?;
        match fresh.persist_noclobber(&path) {
            Ok(_) => Ok(true),
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error.error).or_host(&what),
        }
    }

    /// A file for a volume that is being made, and locked until it is. Removes those
    /// whose makers were killed.
    fn fresh(&self) -> io::Result<NamedTempFile> {
        // A new one is not locked yet when it gets its name.
        let alone = File::open(&self.0)?;
        alone.lock()?;
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            let name = entry.file_name();
            // Nothing but files is made there.
            if name.as_encoded_bytes().starts_with(NEW.as_bytes())
                && entry.file_type()?.is_file()
                && let Ok(file) = File::open(entry.path())
                && file.try_lock().is_ok()
            {
                fs::remove_file(entry.path())?;
            }
        }
        let fresh = tempfile::Builder::new().prefix(NEW).tempfile_in(&self.0)?;
        fresh.as_file().lock()?;
        Ok(fresh)
    }

    /// The disk of one, which is made if it is missing.
    pub fn take(&self, name: &str) -> Result<PathBuf, Failure> {
        self.create(name, SIZE)?;
        self.path(name)
    }

    /// All of them, by name.
    pub fn list(&self) -> Result<Vec<Volume>, Failure> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.0).or_host(self.0.display())? {
            let path = entry.or_host(self.0.display())?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.and_then(|name| name.strip_suffix(SUFFIX));
            let Some(name) = name.filter(|name| valid_name(name)) else {
                continue;
            };
            // It may be removed meanwhile.
            let Ok(metadata) = path.metadata() else {
                continue;
            };
            all.push(Volume {
                name: name.to_owned(),
                size: metadata.len(),
                used: metadata.blocks() * BLOCK,
                busy: File::open(&path).is_ok_and(|file| file.try_lock().is_err()),
                path,
            });
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Removes one that no VM has.
    pub fn remove(&self, name: &str) -> Result<(), Failure> {
        let path = self.path(name)?;
        let what = format!("volume {name}");
        let file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(Failure::config(format!(
                    "{what}: there is none; see mayfly volume ls"
                )));
            }
            other => other.or_host(&what)?,
        };
        if disk_lock::take(&file, false).is_err() {
            return Err(Failure::config(format!("{what}: a VM uses it")));
        }
        fs::remove_file(&path).or_host(&what)
    }
}

/// Whether a file system outlives its machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Journal {
    /// It does, whatever happens.
    Yes,
    /// It does not.
    No,
}

/// Into less no file system goes.
const SIZE_MIN: u64 = 1 << 20;

/// Makes a file a disk with an empty file system, sparse.
pub fn make_ext4(path: &Path, size: u64, journal: Journal, what: &str) -> Result<(), Failure> {
    let file = File::create(path).or_host(what)?;
    if size < SIZE_MIN {
        return Err(Failure::config(format!("{what}: a disk has at least 1M")));
    }
    match file.set_len(size) {
        // Of the file system, or the user's limit.
        Err(error) if error.kind() == ErrorKind::FileTooLarge => {
            return Err(Failure::host(format!(
                "{what}: the file system that is to keep it, or ulimit -f, allows no file of {size} \
                 bytes"
            )));
        }
        set => set.or_host(what)?,
    }
    // A new file is all zeroes: none need be written.
    let lazy = "lazy_itable_init=1,lazy_journal_init=1,nodiscard";
    let mut words = vec!["-q", "-F", "-m", "0", "-E", lazy];
    if journal == Journal::No {
        words.extend(["-O", "^has_journal"]);
    }
    e2fs("mkfs.ext4", &words, path, what)?;
    match journal {
        // Programs expect an empty folder.
        Journal::Yes => e2fs("debugfs", &["-w", "-R", "rmdir lost+found"], path, what),
        Journal::No => Ok(()),
    }
}

fn e2fs(program: &str, words: &[&str], path: &Path, what: &str) -> Result<(), Failure> {
    let done = Command::new(program)
        .args(words)
        .arg(path)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdin(Stdio::null())
        .output();
    match done {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(Failure::host(format!(
            "{what}: {program}: {}",
            String::from_utf8_lossy(&output.stderr)
                .trim()
                .replace('\n', "; ")
        ))),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(Failure::host(format!(
            "{what}: there is no {program}; install the package e2fsprogs"
        ))),
        Err(error) => Err(error).or_host(format_args!("{what}: {program}")),
    }
}

/// Whether a file or a device has an ext4 file system.
pub fn is_ext4(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    /// Of the superblock, which has a number that tells (Linux' `fs/ext4/ext4.h`).
    const AT: u64 = 1024 + 0x38;
    const MAGIC: [u8; 2] = 0xef53u16.to_le_bytes();
    let mut magic = [0; 2];
    match File::open(path)?.read_exact_at(&mut magic, AT) {
        Ok(()) => Ok(magic == MAGIC),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_come_once_and_go_when_nobody_has_them() {
        let folder = tempfile::tempdir().unwrap();
        let volumes = Volumes::open(&folder.path().join("a/b")).unwrap();
        assert!(volumes.create("one", 64 << 20).unwrap());
        assert!(!volumes.create("one", 32 << 20).unwrap());
        let path = volumes.take("one").unwrap();
        assert!(is_ext4(&path).unwrap());
        // What other tests fork may have the lock for a moment.
        let moments = (0..500).map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            volumes.list().unwrap()
        });
        let all = { moments }
            .find(|all| all.iter().all(|it| !it.busy))
            .unwrap();
        let [one] = &all[..] else { panic!() };
        assert_eq!((one.name.as_str(), one.size), ("one", 64 << 20));
        assert!(one.used < 2 << 20 && !one.busy, "{}", one.used);
        let held = File::open(&path).unwrap();
        held.lock().unwrap();
        assert!(volumes.list().unwrap()[0].busy);
        let refused = volumes.remove("one").unwrap_err().to_string();
        assert!(refused.contains("a VM uses it"), "{refused}");
        drop(held);
        volumes.remove("one").unwrap();
        let refused = volumes.remove("one").unwrap_err().to_string();
        assert!(refused.contains("there is none"), "{refused}");
        assert!(volumes.list().unwrap().is_empty());
    }

    #[test]
    fn what_a_killed_maker_left_goes_with_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let volumes = Volumes::open(folder.path()).unwrap();
        fs::write(folder.path().join(".new-killed"), "x").unwrap();
        let busy = volumes.fresh().unwrap();
        assert!(volumes.create("one", 64 << 20).unwrap());
        assert!(busy.path().exists());
        assert!(!folder.path().join(".new-killed").exists());
        assert!(!volumes.list().unwrap()[0].busy);
    }

    #[test]
    fn what_fails_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let volumes = Volumes::open(folder.path()).unwrap();
        for (name, size) in [
            ("../x", 64 << 20),
            (".x", 64 << 20),
            ("", 1 << 20),
            ("x", 4096),
        ] {
            assert!(volumes.create(name, size).is_err(), "{name}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn not_all_files_are_ext4() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!is_ext4(file.path()).unwrap());
        file.as_file().set_len(1 << 20).unwrap();
        assert!(!is_ext4(file.path()).unwrap());
    }
}
