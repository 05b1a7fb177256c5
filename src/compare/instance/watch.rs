//! Files that appear, seen for all instances of a batch at once: a user may have no more
//! than some hundred inotify descriptors (`fs.inotify.max_user_instances`).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify;

/// Folders in which something is awaited.
pub struct Watch {
    inotify: OwnedFd,
    folders: BTreeMap<i32, PathBuf>,
}

impl Watch {
    pub fn new() -> io::Result<Self> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        Ok(Watch {
            inotify: inotify::init(flags)?,
            folders: BTreeMap::new(),
        })
    }

    /// Awaits a path: what it lies in must be there, or what that lies in.
    pub fn await_path(&mut self, path: &Path) -> io::Result<()> {
        let watched = self.add(path.parent()) || self.add(path.parent().and_then(Path::parent));
        match watched {
            true => Ok(()),
            false => Err(io::Error::other(format!(
                "{}: can't be watched",
                path.display()
            ))),
        }
    }

    fn add(&mut self, folder: Option<&Path>) -> bool {
        let Some(folder) = folder else { return false };
        let events = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
        let added = inotify::add_watch(&self.inotify, folder, events);
        added.is_ok_and(|number| {
            self.folders.insert(number, folder.to_owned());
            true
        })
    }

    /// What has appeared since.
    pub fn take(&mut self) -> Vec<PathBuf> {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        let mut paths = Vec::new();
        while let Ok(event) = events.next() {
            if let (Some(name), Some(folder)) = (event.file_name(), self.folders.get(&event.wd())) {
                paths.push(folder.join(OsStr::from_bytes(name.to_bytes())));
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
        // A folder that has appeared is watched before its file is looked for.
        let parent = path.parent();
        came(path) || parent.is_some_and(came) && self.add(parent) && path.exists()
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}
