//! Files that appear or are opened, seen for all instances of a batch at once: a user may have no more
//! than some hundred inotify descriptors (`fs.inotify.max_user_instances`).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify;

/// Directories in which something is awaited, and files whose opening is.
pub struct Watch {
    inotify: OwnedFd,
    watched: BTreeMap<i32, PathBuf>,
}

impl Watch {
    pub fn new() -> io::Result<Self> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        Ok(Watch {
            inotify: inotify::init(flags)?,
            watched: BTreeMap::new(),
        })
    }

    /// Awaits a path: what it lies in must be there, or what that lies in.
    pub fn await_path(&mut self, path: &Path) -> io::Result<()> {
        let parent = path.parent();
        match self.add_directory(parent) || self.add_directory(parent.and_then(Path::parent)) {
            true => Ok(()),
            false => Err(not_watched(path)),
        }
    }

    /// Awaits that a file is opened, which is there.
    pub fn await_opening(&mut self, path: &Path) -> io::Result<()> {
        match self.add(path, inotify::WatchFlags::OPEN) {
            true => Ok(()),
            false => Err(not_watched(path)),
        }
    }

    fn add_directory(&mut self, directory: Option<&Path>) -> bool {
        let events = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
        directory.is_some_and(|directory| self.add(directory, events))
    }

    fn add(&mut self, path: &Path, events: inotify::WatchFlags) -> bool {
        let added = inotify::add_watch(&self.inotify, path, events);
        added.is_ok_and(|number| {
            self.watched.insert(number, path.to_owned());
            true
        })
    }

    /// What has appeared since, or was opened.
    pub fn take(&mut self) -> Vec<PathBuf> {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        let mut paths = Vec::new();
        while let Ok(event) = events.next() {
            let Some(watched) = self.watched.get(&event.wd()) else {
                continue;
            };
            match event.file_name() {
                Some(name) => paths.push(watched.join(OsStr::from_bytes(name.to_bytes()))),
                None if event.events().contains(inotify::ReadFlags::OPEN) => {
                    paths.push(watched.clone());
                }
                // It is gone.
                None => {}
            }
            if events.is_buffer_empty() {
                break;
            }
        }
        paths
    }

    /// Whether a path is there, given what has appeared.
    pub fn is_there(&mut self, path: &Path, appeared: &[PathBuf]) -> bool {
        let came = |path: &Path| appeared.iter().any(|it| it == path);
        // A directory that has appeared is watched before its file is looked for.
        let parent = path.parent();
        came(path) || parent.is_some_and(came) && self.add_directory(parent) && path.exists()
    }
}

fn not_watched(path: &Path) -> io::Error {
    io::Error::other(format!("{}: can't be watched", path.display()))
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}
