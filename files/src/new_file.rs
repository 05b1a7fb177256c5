//! A file that has its name when it is complete.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use tempfile::NamedTempFile;

/// A file for its owner alone. Until it is kept it has no name, so that nothing is left of
/// it however its process ends. Where the file system has no such files it has another
/// name, which a killed process leaves.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    made: Made,
}

#[derive(Debug)]
enum Made {
    Nameless(File),
    Named(NamedTempFile),
}

impl NewFile {
    /// Makes one that can be kept under a path.
    pub fn beside(path: &Path) -> io::Result<Self> {
        let folder = path.parent().filter(|it| !it.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let made = match rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Made::Nameless(File::from(file)),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
                Made::Named(NamedTempFile::new_in(folder)?)
            }
            Err(error) => return Err(error.into()),
        };
        let path = path.to_owned();
        Ok(NewFile { path, made })
    }

    /// What is written to.
    pub fn file(&self) -> &File {
        match &self.made {
            Made::Nameless(file) => file,
            Made::Named(file) => file.as_file(),
        }
    }

    /// Gives it its name, when all of it is on the disk. Fails with
    /// [`io::ErrorKind::AlreadyExists`] if there is something of that name.
    pub fn keep(self) -> io::Result<()> {
        self.file().sync_all()?;
        match self.made {
            Made::Named(file) => {
                let kept = file.persist_noclobber(&self.path);
                kept.map(drop).map_err(|error| error.error)
            }
            Made::Nameless(file) => {
                let own = format!("/proc/self/fd/{}", file.as_raw_fd());
                let follow = AtFlags::SYMLINK_FOLLOW;
                Ok(rustix::fs::linkat(CWD, own, CWD, &self.path, follow)?)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_has_its_name_when_it_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let files = || fs::read_dir(folder.path()).unwrap().count();
        let new = NewFile::beside(&path).unwrap();
        new.file().write_all(b"x").unwrap();
        assert_eq!(files(), 0);
        drop(new);
        assert_eq!(files(), 0);
        let new = NewFile::beside(&path).unwrap();
        new.file().write_all(b"x").unwrap();
        new.keep().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"x");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = NewFile::beside(&path).unwrap().keep().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(files(), 1);
    }
}
