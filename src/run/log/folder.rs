//! Where logs are: in the user's data folder, as the folder of what is known of VMs is
//! memory on most hosts, and what VMs wrote is too much for that. A log's folder and its
//! VM's have links to each other; one whose VM has forgotten it is removed, but not while it
//! is written: another mount namespace may have this folder, and not the one of its VM.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::piece::NAME;
use crate::data_folder::data_folder;
use crate::failure::{Failure, OrFail};

const FOLDER: &str = "logs";
/// In a log's folder, where its VM's is.
const OWNER: &str = "vm";
/// In a log's folder, locked by who writes the log.
const WRITER: &str = "writer";
/// In a VM's folder, where its log's is.
const LINK: &str = "log";
/// How folders that are being made are called at first …
const NEW: &str = ".new-";
/// … which takes no longer than this.
const MAKING_MAX: Duration = Duration::from_secs(3600);

/// Makes the folder of a log for a VM that has a folder; returns the log's path, and a lock
/// that is to be held while the log is written.
pub fn make_folder(vm: &Path) -> Result<(PathBuf, File), Failure> {
    make_in(&data_folder()?.join(FOLDER), vm).or_host("the log")
}

fn make_in(all: &Path, vm: &Path) -> io::Result<(PathBuf, File)> {
    DirBuilder::new().recursive(true).mode(0o700).create(all)?;
    let (all, vm) = (all.canonicalize()?, vm.canonicalize()?);
    sweep(&all);
    let fresh = tempfile::Builder::new().prefix(NEW).tempdir_in(&all)?;
    let lock = File::create(fresh.path().join(WRITER))?;
    // Where a file system has no locks, no log is taken for one that nobody writes.
    let _ = lock.try_lock();
    symlink(&vm, fresh.path().join(OWNER))?;
    let made = fresh.path().file_name().unwrap_or_default();
    let made = made.to_string_lossy();
    let name = vm.file_name().unwrap_or_default().to_string_lossy();
    let suffix = made.strip_prefix(NEW).unwrap_or_default();
    let folder = all.join(format!("{name}-{suffix}"));
    // First, so that it has an owner as soon as it has its name.
    symlink(&folder, vm.join(LINK))?;
    fs::rename(fresh.path(), &folder)?;
    let _ = fresh.keep();
    Ok((folder.join(NAME), lock))
}

/// Where the log of a VM is that has a folder.
pub fn path(vm: &Path) -> PathBuf {
    vm.join(LINK).join(NAME)
}

/// Removes the log of a VM that has a folder.
pub fn remove_folder(vm: &Path) {
    if let Ok(folder) = fs::read_link(vm.join(LINK))
        && is_of(&folder, vm)
    {
        // What is left is removed when the next is made.
        let _ = fs::remove_dir_all(folder);
    }
}

/// Whether a log's folder and a VM's belong together.
fn is_of(folder: &Path, vm: &Path) -> bool {
    let id = |path: &Path| fs::metadata(path).map(|it| (it.dev(), it.ino())).ok();
    let (log, owner) = (id(folder), id(vm));
    log.is_some()
        && owner.is_some()
        && log == id(&vm.join(LINK))
        && owner == id(&folder.join(OWNER))
}

/// Whether a VM that runs may write to a log, or to one that is being made.
fn is_written(folder: &Path) -> bool {
    match File::options().write(true).open(folder.join(WRITER)) {
        Ok(lock) => lock.try_lock().is_err(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Removes the logs that no VM has any more, as after a restart of the host.
fn sweep(all: &Path) {
    for entry in fs::read_dir(all).into_iter().flatten().flatten() {
        let folder = entry.path();
        let waste = match entry.file_name().to_string_lossy().starts_with(NEW) {
            true => {
                let age = entry.metadata().and_then(|it| it.modified());
                age.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > MAKING_MAX))
            }
            false => {
                let owner = fs::read_link(folder.join(OWNER));
                owner.is_ok_and(|owner| !is_of(&folder, &owner))
            }
        };
        if waste && !is_written(&folder) {
            let _ = fs::remove_dir_all(folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_live_as_long_as_their_vms() {
        let home = tempfile::tempdir().unwrap();
        let all = home.path().join("data/logs");
        let vm = |name: &str| {
            let vm = home.path().join(name);
            fs::create_dir(&vm).unwrap();
            let (log, lock) = make_in(&all, &vm).unwrap();
            fs::write(&log, name).unwrap();
            drop(lock);
            (vm, log)
        };
        let ((a, log_a), (b, log_b)) = (vm("a"), vm("b"));
        assert_eq!(fs::read(path(&a)).unwrap(), b"a");
        remove_folder(&a);
        assert!(!log_a.exists() && log_b.exists());
        // One that was removed without its log, and one of the same name.
        fs::remove_dir_all(&b).unwrap();
        fs::create_dir(&b).unwrap();
        let (c, log_c) = vm("c");
        assert!(!log_b.exists() && log_c.exists());
        // A link to what is another's is not followed.
        let (_d, log_d) = vm("d");
        fs::remove_file(c.join(LINK)).unwrap();
        symlink(log_d.parent().unwrap(), c.join(LINK)).unwrap();
        remove_folder(&c);
        assert!(log_d.exists());
        // What is being made stays.
        let making = all.join(".new-x");
        fs::create_dir(&making).unwrap();
        vm("e");
        assert!(making.exists() && !log_c.exists() && log_d.exists());
    }

    #[test]
    fn a_log_that_is_written_stays_though_its_vm_is_not_seen() {
        let home = tempfile::tempdir().unwrap();
        let all = home.path().join("logs");
        let vm = |name: &str| {
            let vm = home.path().join(name);
            fs::create_dir(&vm).unwrap();
            vm
        };
        // As in another mount namespace.
        let hidden = vm("hidden");
        let (log, lock) = make_in(&all, &hidden).unwrap();
        fs::write(&log, "x").unwrap();
        fs::remove_dir_all(&hidden).unwrap();
        make_in(&all, &vm("other")).unwrap();
        assert!(log.exists());
        drop(lock);
        make_in(&all, &vm("another")).unwrap();
        assert!(!log.exists());
    }
}
