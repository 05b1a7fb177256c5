//! Digests of files that are large and seldom change, such as guests' kernels: each version
//! of a file is read once.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mayfly_files::Directory;
use mayfly_image::Digest;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, OrFail};

/// The most versions that are remembered. Who needs more reads files again.
const ENTRIES_MAX: usize = 64;
/// A file that changed so lately could change again and show the same times: file systems'
/// clocks are coarse.
const SETTLED: Duration = Duration::from_secs(2);
const CHUNK: usize = 1 << 20;

/// One version of a file. Whoever changes a file changes the time of its last change, which
/// no program can set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Version {
    device: u64,
    inode: u64,
    bytes: u64,
    modified_ns: i128,
    changed_ns: i128,
}

impl Version {
    fn of(metadata: &Metadata) -> Self {
        let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        Version {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.ok().and_then(|now| i128::try_from(now.as_nanos()).ok());
        let settled = i128::try_from(SETTLED.as_nanos()).unwrap_or(i128::MAX);
        now.is_some_and(|now| self.changed_ns.saturating_add(settled) < now)
    }
}

/// The digests that were made before, in a file.
#[derive(Debug)]
pub struct FileDigests {
    file: PathBuf,
    name: &'static str,
    known: BTreeMap<String, (Version, Digest)>,
    is_new: bool,
}

impl FileDigests {
    /// Those in a file of a folder. One that cannot be read holds none.
    pub(super) fn open(directory: &Directory, name: &'static str) -> Self {
        let file = directory.path(name);
        let known = fs::read(&file).ok();
        let known = known.and_then(|text| serde_json::from_slice(&text).ok());
        FileDigests {
            file,
            name,
            known: known.unwrap_or_default(),
            is_new: false,
        }
    }

    /// A file's digest.
    pub fn of(&mut self, path: &Path) -> Result<Digest, Failure> {
        self.read(path).or_host(path.display())
    }

    fn read(&mut self, path: &Path) -> io::Result<Digest> {
        let mut file = File::open(path)?;
        let version = Version::of(&file.metadata()?);
        let name = format!("{}:{}", version.device, version.inode);
        if let Some((known, digest)) = self.known.get(&name)
            && *known == version
        {
            return Ok(*digest);
        }
        let digest = digest(&mut file)?;
        if version.is_settled() && Version::of(&file.metadata()?) == version {
            if self.known.len() >= ENTRIES_MAX {
                self.known.clear();
            }
            self.known.insert(name, (version, digest));
            self.is_new = true;
        }
        Ok(digest)
    }

    /// Remembers what is new.
    pub(super) fn write(&self, directory: &Directory) -> Result<(), Failure> {
        if !self.is_new {
            return Ok(());
        }
        let text = serde_json::to_vec(&self.known).or_internal(self.name)?;
        let _lock = directory.lock().or_host(self.file.display())?;
        directory
            .write(self.name, &text)
            .or_host(self.file.display())
    }
}

/// The digest of what is left of a file.
fn digest(file: &mut File) -> io::Result<Digest> {
    let mut hasher = mayfly_image::Hasher::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(count) => hasher.update(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_once_until_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let directory = Directory::open(&folder.path().join("root"), &[]).unwrap();
        let path = folder.path().join("kernel");
        fs::write(&path, "one").unwrap();
        let mut digests = FileDigests::open(&directory, "digests.json");
        // It has just been written: it may be written again within a tick.
        assert_eq!(digests.of(&path).unwrap(), Digest::of(b"one"));
        assert!(digests.known.is_empty());
        let version = Version::of(&fs::metadata(&path).unwrap());
        let old = Version {
            changed_ns: version.changed_ns - 10_000_000_000,
            ..version
        };
        assert!(old.is_settled() && !version.is_settled());

        let name = format!("{}:{}", version.device, version.inode);
        let planted = Digest::of(b"planted");
        digests.known.insert(name, (version, planted));
        digests.is_new = true;
        digests.write(&directory).unwrap();
        let mut digests = FileDigests::open(&directory, "digests.json");
        assert_eq!(digests.of(&path).unwrap(), planted);
        fs::write(&path, "two!").unwrap();
        assert_eq!(digests.of(&path).unwrap(), Digest::of(b"two!"));
        fs::write(directory.path("digests.json"), "{").unwrap();
        assert!(
            FileDigests::open(&directory, "digests.json")
                .known
                .is_empty()
        );
    }
}
