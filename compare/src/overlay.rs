//! The image's files under a layer for changes, which each instance has for itself.

#![allow(unsafe_code, reason = "a namespace of its own")]

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

/// The directory that takes what is written.
const UPPER: &str = "upper";
const WORK: &str = "work";

/// The options of overlayfs for a directory, and for one that holds `upper` and `work`.
pub fn options(lower: &Path, writable: &Path) -> io::Result<CString> {
    let mut options = Vec::new();
    let mut add = |name: &str, path: &Path| {
        options.extend(name.bytes());
        for &byte in path.as_os_str().as_bytes() {
            if matches!(byte, b'\\' | b':' | b',') {
                options.push(b'\\');
            }
            options.push(byte);
        }
    };
    add("lowerdir=", lower);
    add(",upperdir=", &writable.join(UPPER));
    add(",workdir=", &writable.join(WORK));
    // The only attributes that a user namespace may have (Linux 5.11); and none of them
    // lets an image lead overlayfs elsewhere.
    options.extend(b",userxattr");
    Ok(CString::new(options)?)
}

/// One that a launcher mounts for itself: it goes with the launcher and what that starts,
/// so that there is nothing to unmount.
#[derive(Debug)]
pub struct Overlay {
    options: CString,
    /// The mount point.
    target: CString,
}

impl Overlay {
    /// Makes its directories; returns also where the files will be.
    pub fn prepare(lower: &Path, directory: &Path) -> io::Result<(Self, PathBuf)> {
        let root = directory.join("root");
        for path in [&root, &directory.join(UPPER), &directory.join(WORK)] {
            fs::create_dir(path)?;
        }
        // It becomes the root directory's own.
        fs::set_permissions(directory.join(UPPER), fs::metadata(lower)?.permissions())?;
        let overlay = Overlay {
            options: options(lower, directory)?,
            target: CString::new(root.as_os_str().as_bytes())?,
        };
        Ok((overlay, root))
    }

    /// Mounts it in a namespace of the calling process's own. To be called between fork
    /// and exec: makes system calls only.
    pub fn mount(&self) -> io::Result<()> {
        // SAFETY: a number.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // What the host unmounts is unmounted here, too.
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change(c"/", slave)?;
        // Devices of the image are none.
        let flags = MountFlags::NODEV;
        mount(c"overlay", &*self.target, c"overlay", flags, &*self.options)?;
        Ok(())
    }
}
