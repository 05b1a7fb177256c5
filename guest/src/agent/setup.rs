//! Makes the guest what its image says: layers, network, name, mounts.

#![allow(unsafe_code, reason = "a partition, and disks at the end")]

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use mayfly_protocol::agent::{Mount, Setup, Source};
use mayfly_protocol::copy::{Files, Place, Walk, copy, xattrs};

use super::directory::make_directory;
use super::{copies, names, settings};
use crate::interface;
use crate::root;
use crate::system::{check, mount};

/// The disk with the layers.
const LAYERS_DISK: &str = "/dev/vda";
/// Where they are mounted, by their numbers: short, as all of them are named in
/// one page of options.
const LAYERS: &str = "/l";
/// The mount point of what the machine writes: overlayfs' upper directory.
const WRITTEN: &str = "/w";
/// What every machine has beside what the initramfs mounted.
const MOUNTS: [(&str, &str, &str); 3] = [
    ("tmpfs", "/dev/shm", "mode=1777"),
    ("mqueue", "/dev/mqueue", ""),
    ("cgroup2", "/sys/fs/cgroup", ""),
];

/// Does all of it, and leaves the initramfs.
pub fn prepare(setup: &Setup) -> Result<(), String> {
    mount_root(setup)?;
    root::enter(&["/dev", "/proc", "/sys"])?;
    for (kind, target, options) in MOUNTS {
        let _ = make_directory(Path::new(target));
        // A kernel may lack one, and few miss it.
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        let _ = mount(kind, target, kind, flags, options);
    }
    settings::apply_defaults();
    names::give(setup)?;
    // Without a loopback device nobody talks to itself.
    interface::turn_on("lo").map_err(|error| format!("the loopback device: {error}"))?;
    if let Some(net) = &setup.net {
        interface::configure(interface::FIRST, &net.addresses, &net.gateways)?;
        names::give_resolvers(net)?;
    }
    // Some are of the network's devices.
    settings::apply(&setup.sysctls)?;
    for mount in &setup.mounts {
        let target = Path::new(OsStr::from_bytes(&mount.target));
        let failed = |error| format!("mounting {}: {error}", target.display());
        mount_one(mount, target, setup.read_only).map_err(failed)?;
    }
    if !setup.folder.is_empty() {
        // If that fails, so does the process's start, which tells why.
        let _ = make_directory(Path::new(OsStr::from_bytes(&setup.folder)));
    }
    if setup.read_only {
        let flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY;
        let remounted = mount("", "/", "", flags, "");
        remounted.map_err(|error| format!("making the root read-only: {error}"))?;
    }
    Ok(())
}

fn mount_root(setup: &Setup) -> Result<(), String> {
    let failed = |what: &str, error: io::Error| format!("{what}: {error}");
    if setup.layers.is_empty() {
        return Err("the image has no layers".into());
    }
    let disk = File::open(LAYERS_DISK).map_err(|error| failed(LAYERS_DISK, error))?;
    let mut start = 0;
    // The topmost comes first.
    let mut folders = String::new();
    for (number, &len) in (1..).zip(&setup.layers) {
        let folder = format!("{LAYERS}/{number}");
        let part = format!("{LAYERS_DISK}{number}");
        add_partition(&disk, number, start, len)
            .and_then(|()| make_directory(Path::new(&folder)))
            .and_then(|()| mount(&part, &folder, "squashfs", libc::MS_RDONLY, ""))
            .map_err(|error| failed(&format!("layer {number}"), error))?;
        start += len;
        let rest = if folders.is_empty() { "" } else { ":" };
        folders = format!("{folder}/{}{rest}{folders}", setup.layer_root);
    }
    let written = make_directory(Path::new(WRITTEN)).and_then(|()| match &setup.scratch {
        Some(disk) => mount(disk, WRITTEN, "ext4", 0, ""),
        None => mount("tmpfs", WRITTEN, "tmpfs", 0, "mode=755"),
    });
    let (upper, work) = (format!("{WRITTEN}/upper"), format!("{WRITTEN}/work"));
    let options = format!("lowerdir={folders},upperdir={upper},workdir={work}");
    // The root's mode and owner are those of the uppermost folder.
    let topmost = folders.split(':').next().unwrap_or_default().to_owned();
    written
        .and_then(|()| make_directory(Path::new(&upper)))
        .and_then(|()| take_after(&topmost, &upper))
        .and_then(|()| make_directory(Path::new(&work)))
        .map_err(|error| failed("what is written", error))?;
    mount("overlay", root::NEW_ROOT, "overlay", 0, &options)
        .map_err(|error| failed("putting the layers together", error))
}

/// Makes a part of a disk a device of its own, as its table of partitions would
/// if it had one (Linux' `linux/blkpg.h`).
fn add_partition(disk: &File, number: i32, start: u64, len: u64) -> io::Result<()> {
    const BLKPG: libc::c_ulong = 0x1269;
    const ADD: libc::c_int = 1;
    #[repr(C)]
    struct Partition {
        start: i64,
        len: i64,
        number: libc::c_int,
        names: [u8; 128],
    }
    #[repr(C)]
    struct Argument {
        operation: libc::c_int,
        flags: libc::c_int,
        len: libc::c_int,
        data: *mut Partition,
    }
    let mut partition = Partition {
        start: start.cast_signed(),
        len: len.cast_signed(),
        number,
        names: [0; 128],
    };
    let argument = Argument {
        operation: ADD,
        flags: 0,
        len: size_of::<Partition>() as libc::c_int,
        data: &mut partition,
    };
    // SAFETY: reads two live structures.
    check(unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &argument) }.into())
}

/// Gives a folder another's owner and mode.
fn take_after(model: &str, folder: &str) -> io::Result<()> {
    let model = fs::metadata(model)?;
    chown(folder, Some(model.uid()), Some(model.gid()))?;
    fs::set_permissions(folder, model.permissions())
}

/// The disks that are mounted beside the layers.
pub struct Disks(Vec<CString>);

impl Disks {
    /// Those of a machine.
    pub fn of(setup: &Setup) -> Self {
        let disks = setup.mounts.iter().filter(|mount| match mount.source {
            Source::Disk(_) | Source::Volume(_) => !mount.read_only,
            Source::Tmpfs { .. } | Source::Folder(_) | Source::AnonymousVolume => false,
        });
        // What was mounted has no NUL in its name.
        let names = disks.filter_map(|mount| CString::new(mount.target.as_slice()).ok());
        Disks(names.collect())
    }

    /// Writes all there is to the disks, and unmounts those that nobody uses.
    pub fn leave(&self) {
        // What is mounted on another came after it.
        for target in self.0.iter().rev() {
            // SAFETY: a string that lives until the call returns.
            if unsafe { libc::umount2(target.as_ptr(), 0) } == 0 {
                continue;
            }
            if let Ok(folder) = File::open(OsStr::from_bytes(target.as_bytes())) {
                // SAFETY: an open descriptor.
                unsafe { libc::syncfs(folder.as_raw_fd()) };
            }
        }
    }
}

fn mount_one(what: &Mount, target: &Path, root_is_read_only: bool) -> io::Result<()> {
    make_directory(target)?;
    // What is there is beneath it then.
    let below = File::open(target)?;
    let path = target;
    let target = target.as_os_str().as_bytes();
    let read_only = match what.read_only {
        true => libc::MS_RDONLY,
        false => 0,
    };
    match &what.source {
        Source::Tmpfs { options, no_exec } => {
            let flags = libc::MS_NOSUID | libc::MS_NODEV | read_only;
            let no_exec = if *no_exec { libc::MS_NOEXEC } else { 0 };
            mount("tmpfs", target, "tmpfs", flags | no_exec, options)
        }
        Source::Folder(tag) => {
            let flags = libc::MS_NOSUID | libc::MS_NODEV | read_only;
            mount(tag, target, "virtiofs", flags, "")
        }
        Source::Disk(device) => mount(device, target, "ext4", read_only, ""),
        Source::Volume(device) => {
            mount(device, target, "ext4", read_only, "")?;
            fill(below, path)
        }
        // Beside the root, it does not become read-only with it.
        Source::AnonymousVolume if root_is_read_only => {
            mount(target, target, "", libc::MS_BIND, "")
        }
        Source::AnonymousVolume => Ok(()),
    }
}

/// In a volume that is being filled: a machine that ended meanwhile left a part.
const FILLING: &str = ".mayfly-filling";

/// Fills a volume that is empty with what a folder has, and makes it the same to those
/// who look at its owner and mode.
fn fill(from: File, volume: &Path) -> io::Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(volume)? {
        names.push(entry?.file_name());
    }
    names.retain(|name| name != "lost+found");
    let marker = volume.join(FILLING);
    if !names.is_empty() {
        if !names.iter().any(|name| name == FILLING) {
            return Ok(());
        }
        for path in names.iter().map(|name| volume.join(name)) {
            if path == marker {
                continue;
            }
            match path.symlink_metadata()?.is_dir() {
                true => fs::remove_dir_all(&path)?,
                false => fs::remove_file(&path)?,
            }
        }
    }
    File::create(&marker)?;
    let folder = File::open(volume)?;
    let model = from.metadata()?;
    let attributes = xattrs::of(&from)?;
    let place = |folder: File| Place {
        folder: folder.into(),
        name: b".".to_vec(),
    };
    let mut files = Files::new(place(folder.try_clone()?), copies::ALL);
    copy(&mut Walk::new(&place(from))?, &mut files)?;
    chown(volume, Some(model.uid()), Some(model.gid()))?;
    fs::set_permissions(volume, model.permissions())?;
    xattrs::set(&folder, &attributes, copies::ALL)?;
    // All of it is there before nothing says that it is not.
    // SAFETY: an open descriptor.
    check(unsafe { libc::syncfs(folder.as_raw_fd()) }.into())?;
    fs::remove_file(&marker)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let names = entries.map(|it| it.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn only_empty_volumes_are_filled() {
        let folder = tempfile::tempdir().unwrap();
        let (from, volume) = (folder.path().join("from"), folder.path().join("volume"));
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::write(from.join("a/file"), "of the image").unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o1750)).unwrap();
        fs::create_dir_all(volume.join("lost+found")).unwrap();
        let fill = || fill(File::open(&from).unwrap(), &volume);
        fill().unwrap();
        assert_eq!(names(&volume), ["a", "lost+found"]);
        assert_eq!(names(&volume.join("a")), ["b", "file"]);
        assert_eq!(volume.metadata().unwrap().mode() & 0o7777, 0o1750);
        // Not again.
        fs::remove_dir_all(volume.join("a/b")).unwrap();
        fill().unwrap();
        assert_eq!(names(&volume.join("a")), ["file"]);
        // But when it was not done.
        fs::write(volume.join(FILLING), "").unwrap();
        fs::write(volume.join("part"), "").unwrap();
        fill().unwrap();
        assert_eq!(names(&volume), ["a", "lost+found"]);
        assert_eq!(names(&volume.join("a")), ["b", "file"]);
    }
}
