//! Where something is, or goes: a name in an open folder.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::path::about;
use crate::agent::{Bytes, Unpack};

/// A name in a folder.
#[derive(Debug)]
pub struct Place {
    /// The folder.
    pub folder: OwnedFd,
    /// The name; `.` for the folder itself.
    pub name: Bytes,
}

/// The path of a folder, if of anything.
fn is_folder_s(path: &[u8]) -> bool {
    [b"/".as_slice(), b"/.", b"/.."]
        .iter()
        .any(|end| path.ends_with(end))
        || [b".".as_slice(), b".."].contains(&path)
}

impl Place {
    /// Of something that there is: a symbolic link itself, or what it leads to.
    pub fn of_source(path: &[u8], follow: bool) -> io::Result<Self> {
        let found = match follow || is_folder_s(path) {
            true => Place::there(path),
            false => Place::named(path),
        };
        let place = found.map_err(|error| about(path, error))?;
        Ok(place)
    }

    /// Where something new goes, as `docker cp` has it.
    pub fn of_target(wish: &Unpack) -> io::Result<Self> {
        Place::target(wish).map_err(|error| about(&wish.path, error))
    }

    fn target(wish: &Unpack) -> io::Result<Self> {
        let path = &wish.path;
        let refuse = |why: &str| Err(io::Error::other(why));
        match fs::metadata(OsStr::from_bytes(path)) {
            Ok(found) if found.is_dir() => {
                let folder = open(&fs::canonicalize(OsStr::from_bytes(path))?)?;
                let name = match wish.name.as_slice() {
                    b"" => b".".to_vec(),
                    name => name.to_vec(),
                };
                Ok(Place { folder, name })
            }
            Ok(_) if wish.folder || wish.must_exist => refuse("is no folder"),
            Ok(found) if !found.is_file() => refuse("is neither a file nor a folder"),
            Ok(_) => Place::there(path),
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            Err(_) if wish.must_exist || (is_folder_s(path) && !wish.folder) => {
                refuse("there is no such folder")
            }
            Err(_) => Place::named(path),
        }
    }

    /// The place that a path leads to, links followed.
    fn there(path: &[u8]) -> io::Result<Self> {
        let real = fs::canonicalize(OsStr::from_bytes(path))?;
        let (folder, name) = match (real.parent(), real.file_name()) {
            (Some(folder), Some(name)) => (folder, name.as_bytes()),
            _ => (real.as_path(), b".".as_slice()),
        };
        Ok(Place {
            folder: open(folder)?,
            name: name.to_vec(),
        })
    }

    /// What a path names, though it may be a link, or not there.
    fn named(path: &[u8]) -> io::Result<Self> {
        let path = Path::new(OsStr::from_bytes(path));
        let Some(name) = path.file_name() else {
            return Err(ErrorKind::NotFound.into());
        };
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let name = name.as_bytes().to_vec();
        let folder = open(&fs::canonicalize(folder)?)?;
        Ok(Place { folder, name })
    }
}

/// Opens a folder whose path has no links in it; none may have come meanwhile.
fn open(path: &Path) -> io::Result<OwnedFd> {
    let how = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let links = ResolveFlags::NO_SYMLINKS;
    Ok(rustix::fs::openat2(CWD, path, how, Mode::empty(), links)?)
}
