//! An image's files as a directory, for those that cannot mount its layers.
//!
//! Each layer is unpacked by itself, where nothing of another one can lead its files
//! elsewhere; then directories are put together without following links.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::layers::{LAYER_ROOT, Record};
use super::store::{Image, RECORD_FILE};
use crate::error::{Context, Error};

const TOOL: &str = "unsquashfs";

impl Image {
    /// Puts the image's files into a directory that does not exist yet. An ordinary user
    /// becomes their owner.
    pub fn unpack(&self, root: &Path) -> Result<(), Error> {
        let what = || format!("unpacking the image to {}", root.display());
        fs::create_dir(root).or_host(what())?;
        let work = root.with_extension("layer");
        for layer in &self.layers {
            let record = layer.with_file_name(RECORD_FILE);
            let record = fs::read(&record).or_host(record.display())?;
            let record: Record = serde_json::from_slice(&record).or_host(what())?;
            unsquash(layer, &work).or_host(what())?;
            // An ordinary user may only move and remove what may be written to.
            make_writable(&work.join(LAYER_ROOT)).or_host(what())?;
            if record.opaque {
                hide(root, Path::new("")).or_host(what())?;
            }
            let gone = record.whiteouts().chain(record.opaque_directories());
            for path in gone {
                let path = PathBuf::from(std::ffi::OsString::from_vec(path));
                hide(root, &path).or_host(what())?;
                // The whiteout itself, where it could be made.
                let marker = work.join(LAYER_ROOT).join(&path);
                if fs::symlink_metadata(&marker).is_ok_and(|it| !it.is_dir()) {
                    fs::remove_file(&marker).or_host(what())?;
                }
            }
            merge(&work.join(LAYER_ROOT), root).or_host(what())?;
            fs::remove_dir_all(&work).or_host(what())?;
        }
        Ok(())
    }
}

fn unsquash(layer: &Path, into: &Path) -> io::Result<()> {
    let root = rustix::process::geteuid().is_root();
    let mut command = Command::new(TOOL);
    command.args(["-quiet", "-no-progress", "-dest"]).arg(into);
    if !root {
        command.arg("-no-xattrs");
    }
    command
        .arg(layer)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let output = command
        .stderr(Stdio::piped())
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => io::Error::other(format!(
                "{TOOL} is missing; install the package squashfs-tools"
            )),
            _ => error,
        })?;
    // 2: devices and the like could not be made.
    match output.status.code() {
        Some(0) => Ok(()),
        Some(2) if !root => Ok(()),
        _ => Err(io::Error::other(format!(
            "{TOOL}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ))),
    }
}

/// Removes what a layer hides, unless a link leads there.
fn hide(root: &Path, path: &Path) -> io::Result<()> {
    let mut place = root.to_owned();
    let parts: Vec<_> = path.components().collect();
    for (index, part) in parts.iter().enumerate() {
        let std::path::Component::Normal(name) = part else {
            return Err(io::Error::other("a layer hides what is outside of it"));
        };
        place.push(name);
        match fs::symlink_metadata(&place) {
            Ok(found) if found.is_dir() => {}
            Ok(_) if index + 1 == parts.len() => return fs::remove_file(&place),
            _ => return Ok(()),
        }
    }
    match parts.is_empty() {
        true => {
            for entry in fs::read_dir(root)? {
                remove(&entry?.path())?;
            }
            Ok(())
        }
        false => fs::remove_dir_all(&place),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path)?.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    }
}

/// Moves a directory's entries over another's.
fn merge(from: &Path, to: &Path) -> io::Result<()> {
    let directory = from.symlink_metadata()?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match target.symlink_metadata() {
            Ok(there) if there.is_dir() && entry.file_type()?.is_dir() => {
                merge(&entry.path(), &target)?;
                continue;
            }
            Ok(_) => remove(&target)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        fs::rename(entry.path(), target)?;
    }
    // Whatever may not be is not: an ordinary user's directories are the user's.
    let _ = std::os::unix::fs::chown(to, Some(directory.uid()), Some(directory.gid()));
    fs::set_permissions(to, directory.permissions())
}

/// Gives the owner all rights of a directory and those in it.
fn make_writable(directory: &Path) -> io::Result<()> {
    let mode = directory.symlink_metadata()?.permissions().mode();
    if mode & 0o700 != 0o700 {
        fs::set_permissions(directory, Permissions::from_mode(mode | 0o700))?;
    }
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            make_writable(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(unsafe_code, reason = "a thread becomes another user")]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn layers_are_merged_without_following_links() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir_all(path("root/a/kept")).unwrap();
        fs::create_dir_all(path("outside")).unwrap();
        fs::write(path("outside/file"), "safe").unwrap();
        fs::write(path("root/a/old"), "old").unwrap();
        fs::write(path("root/a/gone"), "").unwrap();
        symlink(path("outside"), path("root/link")).unwrap();
        fs::create_dir_all(path("layer/a")).unwrap();
        fs::create_dir_all(path("layer/link")).unwrap();
        fs::write(path("layer/a/old"), "new").unwrap();
        fs::write(path("layer/link/file"), "mine").unwrap();

        hide(&path("root"), Path::new("link/file")).unwrap();
        hide(&path("root"), Path::new("a/gone")).unwrap();
        hide(&path("root"), Path::new("a/never/there")).unwrap();
        assert!(hide(&path("root"), Path::new("../outside")).is_err());
        merge(&path("layer"), &path("root")).unwrap();

        let text = |name| fs::read_to_string(path(name)).unwrap();
        assert_eq!(text("root/a/old"), "new");
        assert_eq!(text("root/link/file"), "mine");
        assert_eq!(text("outside/file"), "safe");
        assert!(path("root/a/kept").is_dir() && !path("root/a/gone").exists());
        hide(&path("root"), Path::new("")).unwrap();
        assert_eq!(fs::read_dir(path("root")).unwrap().count(), 0);
    }

    /// As root is asked for no rights, a thread becomes another user.
    #[test]
    fn an_ordinary_user_unpacks_what_is_read_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for inside in ["root/a/b", "layer/a/b/c", "layer/d"] {
            fs::create_dir_all(path(inside)).unwrap();
        }
        fs::write(path("root/a/b/old"), "").unwrap();
        fs::write(path("layer/a/b/c/new"), "").unwrap();
        let all = [".", "root", "root/a", "root/a/b", "root/a/b/old"];
        let layer = ["layer", "layer/a", "layer/a/b", "layer/a/b/c", "layer/d"];
        let root = rustix::process::geteuid().is_root();
        for name in all.into_iter().chain(layer) {
            if root {
                std::os::unix::fs::chown(path(name), Some(1), Some(1)).unwrap();
            }
        }
        for name in layer {
            fs::set_permissions(path(name), Permissions::from_mode(0o555)).unwrap();
        }
        let (layer, root_directory) = (path("layer"), path("root"));
        let merged = std::thread::spawn(move || {
            if root {
                // SAFETY: numbers; of this thread alone, unlike libc's own function.
                unsafe { libc::syscall(libc::SYS_setresuid, 1, 1, 1) };
            }
            make_writable(&layer)?;
            merge(&layer, &root_directory)?;
            // As another layer may want.
            hide(&root_directory, Path::new("a/b/c"))?;
            hide(&root_directory, Path::new(""))
        });
        merged.join().unwrap().unwrap();
        assert_eq!(fs::read_dir(path("root")).unwrap().count(), 0);
    }
}
