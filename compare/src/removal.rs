//! Removing a directory that hostile programs have filled: no link is followed, no mount is
//! entered, and neither modes nor depth keep anything from being removed.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, Mode, OFlags, ResolveFlags, chmod, openat, openat2, renameat, unlinkat,
};
use rustix::io::Errno;

/// The owner's.
const ALL: Mode = Mode::RWXU;

/// Opens a directory itself, not what a link leads to.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?)
}

/// Removes a directory with all that is in it, as far as possible.
pub fn remove_directory(path: &Path) -> io::Result<()> {
    empty(open(path)?.as_fd())?;
    Ok(unlinkat(CWD, path, AtFlags::REMOVEDIR)?)
}

/// Removes what is in a directory. What its directories hold comes up here first, so that their
/// depth does not matter.
pub fn empty(directory: BorrowedFd) -> io::Result<()> {
    let mut moved = 0u64;
    loop {
        let mut progress = false;
        let mut kept = Ok(());
        for name in names(directory)? {
            match remove(directory, &name, &mut moved) {
                Ok(()) => progress = true,
                Err(error) => kept = Err(error),
            }
        }
        // The last pass finds nothing, or nothing that can be removed.
        if !progress {
            return kept;
        }
    }
}

fn remove(above: BorrowedFd, name: &CString, moved: &mut u64) -> io::Result<()> {
    match unlinkat(above, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        done => return Ok(done?),
    }
    let directory = enter(above, name)?;
    for inner in names(directory.as_fd())? {
        if unlinkat(&directory, &inner, AtFlags::empty()) == Err(Errno::ISDIR)
            && unlinkat(&directory, &inner, AtFlags::REMOVEDIR).is_err()
        {
            // Only who may write to a directory may move it.
            drop(enter(directory.as_fd(), &inner)?);
            // If that is taken by what cannot make way, the next pass has another name.
            *moved += 1;
            renameat(&directory, &inner, above, format!(".moved-{moved}"))?;
        }
    }
    Ok(unlinkat(above, name, AtFlags::REMOVEDIR)?)
}

/// Opens a directory in another, of the same mount; overlayfs keeps one that nobody may read.
fn enter(above: BorrowedFd, name: &CString) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let itself = openat2(above, name, flags | OFlags::PATH, Mode::empty(), resolve)?;
    let fd = format!("/proc/self/fd/{}", itself.as_raw_fd());
    chmod(&fd, ALL)?;
    Ok(openat(&itself, c".", flags, Mode::empty())?)
}

fn names(directory: BorrowedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn neither_modes_nor_depth_nor_links_matter() {
        let place = tempfile::tempdir().unwrap();
        let outside = place.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::set_permissions(&outside, Permissions::from_mode(0o751)).unwrap();
        fs::write(outside.join("file"), "safe").unwrap();
        let root = place.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::create_dir_all(root.join(".moved-1/deep")).unwrap();
        fs::write(root.join(".moved-2"), "").unwrap();
        symlink(&outside, root.join("link")).unwrap();
        for name in ["closed", "closed/within"] {
            fs::create_dir(root.join(name)).unwrap();
            fs::write(root.join(name).join("file"), "").unwrap();
            symlink(&outside, root.join(name).join("link")).unwrap();
        }
        for name in ["closed/within", "closed"] {
            fs::set_permissions(root.join(name), Permissions::from_mode(0o000)).unwrap();
        }
        // Deeper than a path can say, and than there are descriptors.
        let mut deepest = open(&root).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&deepest, c"d", ALL).unwrap();
            deepest = openat(&deepest, c"d", OFlags::DIRECTORY, Mode::empty()).unwrap();
        }
        drop(deepest);

        remove_directory(&root).unwrap();
        assert!(!root.exists());
        assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "safe");
        let mode = fs::metadata(&outside).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o751);
        symlink(&outside, &root).unwrap();
        assert!(remove_directory(&root).is_err());
    }
}
