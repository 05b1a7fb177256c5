//! Leaving the initramfs for a distribution on a disk, as the kernel itself
//! would (Linux' `Documentation/admin-guide/kernel-parameters.txt`):
//!
//! | word            | meaning                                              |
//! |-----------------|------------------------------------------------------|
//! | `root=`         | `/dev/…`, `UUID=…` or `LABEL=…`                      |
//! | `rootfstype=`   | file systems to try; else all that the kernel knows  |
//! | `rootflags=`    | options for the file system                          |
//! | `ro`, `rw`      | else writable, if the disk is                        |
//! | `init=`         | else `/sbin/init`                                    |

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::statfs;
use rustix::mount::UnmountFlags;

use crate::BUSYBOX;
use crate::system::{self, mount};

/// Where the root file system is mounted before it becomes `/`.
pub const NEW_ROOT: &str = "/mnt";
const DEFAULT_INIT: &str = "/sbin/init";
/// Drivers may still be looking at their devices.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(5);
const DEVICE_PAUSE: Duration = Duration::from_millis(10);

/// A root file system, and who runs on it.
#[derive(Debug, PartialEq, Eq)]
pub struct Root {
    source: String,
    types: Vec<String>,
    flags: String,
    read_only: bool,
    init: String,
}

/// Finds the root file system on a kernel command line.
pub fn from_cmdline(cmdline: &str) -> Option<Root> {
    let mut source = None;
    let mut root = Root {
        source: String::new(),
        types: Vec::new(),
        flags: String::new(),
        read_only: false,
        init: DEFAULT_INIT.to_owned(),
    };
    for word in cmdline.split_whitespace().take_while(|&word| word != "--") {
        match word.split_once('=') {
            None if word == "ro" => root.read_only = true,
            None if word == "rw" => root.read_only = false,
            Some(("root", value)) => source = Some(value.to_owned()),
            Some(("rootfstype", value)) => {
                root.types = value.split(',').map(str::to_owned).collect();
            }
            Some(("rootflags", value)) => root.flags = value.to_owned(),
            Some(("init", value)) => root.init = value.to_owned(),
            _ => {}
        }
    }
    root.source = source?;
    Some(root)
}

/// True in an initramfs: elsewhere, the root that is asked for is there already.
pub fn in_initramfs() -> bool {
    statfs("/").is_ok_and(|info| [RAMFS_MAGIC, libc::TMPFS_MAGIC].contains(&info.f_type))
}
/// `RAMFS_MAGIC` of `linux/magic.h`, which libc lacks.
const RAMFS_MAGIC: libc::__fsword_t = 0x8584_58f6;

/// Goes over to the root file system; returns only if that fails.
pub fn switch(root: &Root, words: &[OsString]) -> Result<i32, String> {
    let failed = |why| format!("root={}: {why}", root.source);
    let device = device(&root.source)?;
    mount_root(root, &device).map_err(failed)?;
    enter(&["/dev", "/proc", "/sys", "/run"]).map_err(failed)?;
    let error = Command::new(&root.init).args(words).exec();
    Err(failed(format!("starting {}: {error}", root.init)))
}

/// Makes [`NEW_ROOT`] the root. What is mounted at these folders goes with it.
pub fn enter(moved: &[&str]) -> Result<(), String> {
    for (_, target, ..) in system::MOUNTS {
        if moved.iter().any(|folder| target.starts_with(folder)) {
            continue;
        }
        unmount(target).map_err(|error| format!("unmounting {target}: {error}"))?;
    }
    for folder in moved {
        let target = format!("{NEW_ROOT}{folder}");
        // A layer may lack it; a root that can't be written to, too.
        let _ = fs::create_dir_all(&target);
        if mount(folder, &target, "", libc::MS_MOVE, "").is_err() {
            // A root without such a folder: its init does as it likes.
            unmount(folder).map_err(|error| format!("unmounting {folder}: {error}"))?;
        }
    }
    // The initramfs can't be unmounted: what is in it would use memory for ever.
    let device = fs::symlink_metadata("/").map(|root| root.dev());
    device
        .map(|device| remove_contents(Path::new("/"), device))
        .and_then(|()| std::env::set_current_dir(NEW_ROOT))
        .and_then(|()| mount(".", "/", "", libc::MS_MOVE, ""))
        .and_then(|()| std::os::unix::fs::chroot("."))
        .and_then(|()| std::env::set_current_dir("/"))
        .map_err(|error| format!("switching: {error}"))
}

/// Waits for the device, which its driver may not have found yet.
fn device(source: &str) -> Result<PathBuf, String> {
    let tagged = source.starts_with("UUID=") || source.starts_with("LABEL=");
    if !tagged && !source.starts_with("/dev/") {
        return Err(format!(
            "root={source}: write root=/dev/NAME, root=UUID=… or root=LABEL=…"
        ));
    }
    let deadline = Instant::now() + DEVICE_TIMEOUT;
    loop {
        let path = match tagged {
            true => find(source),
            false => PathBuf::from(source),
        };
        if fs::metadata(&path).is_ok_and(|file| file.file_type().is_block_device()) {
            return Ok(path);
        }
        if Instant::now() > deadline {
            let there = match system::names("/sys/class/block").join(" ") {
                none if none.is_empty() => "none; --disk adds one".to_owned(),
                names => names,
            };
            return Err(format!("root={source}: no such disk; there are: {there}"));
        }
        std::thread::sleep(DEVICE_PAUSE);
    }
}

/// The device with a file system of that `UUID=` or `LABEL=`; an empty path if there is none.
fn find(tag: &str) -> PathBuf {
    let found = Command::new(BUSYBOX).args(["findfs", tag]).output();
    let found = found.map(|output| output.stdout).unwrap_or_default();
    PathBuf::from(String::from_utf8_lossy(&found).trim_end())
}

fn mount_root(root: &Root, device: &Path) -> Result<(), String> {
    let device = device.to_string_lossy();
    let known;
    let types: Vec<&str> = match root.types.is_empty() {
        true => {
            known = system::read("/proc/filesystems")?;
            disk_file_systems(&known)
        }
        false => root.types.iter().map(String::as_str).collect(),
    };
    for kind in &types {
        let mount = |flags| {
            let flags = flags | libc::MS_SILENT;
            mount(device.as_bytes(), NEW_ROOT, kind, flags, &root.flags)
        };
        let mut result = match root.read_only {
            true => mount(libc::MS_RDONLY),
            false => mount(0),
        };
        let refused = result.as_ref().err().and_then(io::Error::raw_os_error);
        if let Some(libc::EACCES | libc::EROFS) = refused {
            result = mount(libc::MS_RDONLY); // a disk that can't be written to
        }
        match result {
            Ok(()) => return Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINVAL) => {} // another file system
                Some(libc::ENODEV) => {
                    return Err(format!("the kernel knows no file system {kind}"));
                }
                _ => return Err(format!("mounting it as {kind}: {error}")),
            },
        }
    }
    Err(format!(
        "not one of these file systems, or not with rootflags=: {}",
        types.join(" ")
    ))
}

/// What `/proc/filesystems` lists for disks, the usual one first: ext4 also
/// goes by the names of its forebears.
fn disk_file_systems(list: &str) -> Vec<&str> {
    let mut types: Vec<&str> = list
        .lines()
        .filter_map(|line| line.strip_prefix('\t'))
        .collect();
    types.sort_by_key(|&kind| kind != "ext4");
    types
}

fn unmount(path: &str) -> io::Result<()> {
    Ok(rustix::mount::unmount(path, UnmountFlags::DETACH)?)
}

/// Deletes all that is on one file system below a directory.
fn remove_contents(directory: &Path, device: u64) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.metadata() {
            Ok(found) if found.dev() != device => {} // mounted there
            Ok(found) if found.is_dir() => {
                remove_contents(&path, device);
                let _ = fs::remove_dir(&path);
            }
            _ => {
                let _ = fs::remove_file(&path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernel_s_words() {
        assert_eq!(from_cmdline("quiet init=/bin/sh rw"), None);
        assert_eq!(from_cmdline("quiet -- root=/dev/vda"), None);
        assert_eq!(
            from_cmdline("quiet root=/dev/vda").unwrap(),
            Root {
                source: "/dev/vda".into(),
                types: vec![],
                flags: String::new(),
                read_only: false,
                init: "/sbin/init".into(),
            }
        );
        let words = "rw root=/dev/vda root=UUID=a=b ro rootfstype=ext4,xfs rootflags=data=journal,acl \
                     rootwait init=/bin/sh nothing -- ro";
        assert_eq!(
            from_cmdline(words).unwrap(),
            Root {
                source: "UUID=a=b".into(),
                types: vec!["ext4".into(), "xfs".into()],
                flags: "data=journal,acl".into(),
                read_only: true,
                init: "/bin/sh".into(),
            }
        );
    }

    #[test]
    fn tries_ext4_first_and_no_file_system_without_a_disk() {
        let list = "nodev\tproc\n\text3\n\text2\n\text4\nnodev\ttmpfs\n\tfuseblk\n";
        assert_eq!(disk_file_systems(list), ["ext4", "ext3", "ext2", "fuseblk"]);
    }

    #[test]
    fn a_root_is_a_disk() {
        let error = device("vda").unwrap_err();
        assert!(error.contains("root=vda: write root=/dev/NAME"), "{error}");
    }

    #[test]
    fn deletes_links_but_not_what_they_lead_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir_all(path("kept")).unwrap();
        fs::write(path("kept/file"), "").unwrap();
        fs::create_dir_all(path("root/a/b")).unwrap();
        fs::write(path("root/a/b/file"), "").unwrap();
        std::os::unix::fs::symlink(path("kept"), path("root/a/link")).unwrap();
        let device = fs::metadata(folder.path()).unwrap().dev();
        remove_contents(&path("root"), device + 1);
        assert!(path("root/a/b/file").exists());
        remove_contents(&path("root"), device);
        assert_eq!(fs::read_dir(path("root")).unwrap().count(), 0);
        assert!(path("kept/file").exists());
    }
}
