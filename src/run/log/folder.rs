//! Where logs are: in the user's data folder, as the folder of what is known of VMs is
//! memory on most hosts, and what VMs wrote is too much for that. A log's folder and its
//! VM's have links to each other; one whose VM has forgotten it is removed.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::NAME;
use crate::failure::{Failure, OrFail};
use crate::image::data_folder;

const FOLDER: &str = "logs";
/// In a log's folder, where its VM's is.
const OWNER: &str = "vm";
/// In a VM's folder, where its log's is.
const LINK: &str = "log";
/// How folders that are being made are called at first …
const NEW: &str = ".new-";
/// … which takes no longer than this.
const MAKING_MAX: Duration = Duration::from_secs(3600);

/// Makes the folder of a log for a VM that has a folder; returns the log's path.
pub fn make_folder(vm: &Path) -> Result<PathBuf, Failure> {
    make_in(&data_folder()?.join(FOLDER), vm).or_host("the log")
}

fn make_in(all: &Path, vm: &Path) -> io::Result<PathBuf> {
    DirBuilder::new().recursive(true).mode(0o700).create(all)?;
    let (all, vm) = (all.canonicalize()?, vm.canonicalize()?);
    sweep(&all);
    let fresh = tempfile::Builder::new().prefix(NEW).tempdir_in(&all)?;
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
    Ok(folder.join(NAME))
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
        if waste {
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
            let log = make_in(&all, &vm).unwrap();
            fs::write(&log, name).unwrap();
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
}
