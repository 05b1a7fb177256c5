//! What a container sees of files: the image's under a layer of its own, the kernel's file
//! systems as Docker mounts them, volumes, and nothing of the host besides.
//!
//! Paths inside are the image's, and so hostile: each is looked up when the host's files
//! are gone, no directory of them is open, and links lead nowhere but inside. What comes
//! from the host is held as detached mounts until then; so are `/proc` and `/sys`, which
//! the kernel gives only to whom sees the host's.

#![allow(unsafe_code, reason = "mount_setattr")]

use std::ffi::{CStr, CString};
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, StatFs, statfs};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsmount, fsopen, mount, mount_bind,
    mount_bind_recursive, mount_change, move_mount, open_tree, unmount,
};
use rustix::process::pivot_root;

use super::ids::Mapping;
use super::process::check;
use super::spec::Spec;
use crate::error::{Context, Error};
use crate::overlay;

/// The paths that Docker masks.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// The paths that Docker makes read-only.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];
/// The devices that a container has: the host's, as a user namespace makes none.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const LINKS: [(&str, &str); 6] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("/proc/kcore", "/dev/core"),
    ("pts/ptmx", "/dev/ptmx"),
];

const NOSUID: MountFlags = MountFlags::NOSUID;
/// The flags of mounts that only hold data.
const DATA: MountFlags = NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Mounts of this namespace are no other's.
pub fn make_private() -> Result<(), Error> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).or_host("private mounts")
}

/// Replaces this mount namespace's files by the container's. `note` gets what is missing.
pub fn build(spec: &Spec, mapping: Mapping, note: &mut dyn FnMut(&str)) -> Result<(), Error> {
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let proc = file_system("proc", attributes)
        .or_host("/proc, which the host has to show whole for that")?;
    let sys = match file_system("sysfs", attributes | MountAttrFlags::MOUNT_ATTR_RDONLY) {
        Ok(sys) => sys,
        Err(error) => {
            note(&format!("/sys: the host's is bound, read-only: {error}"));
            copy(Path::new("/sys"), true).or_host("/sys")?
        }
    };
    let devices = DEVICES.map(|name| (name, copy(&Path::new("/dev").join(name), false)));
    let mut volumes = Vec::new();
    for (host, inside, read_only) in &spec.volumes {
        let is_directory = fs::metadata(host).or_invalid(host.display())?.is_dir();
        let copied = copy(host, *read_only).or_host(host.display())?;
        volumes.push((inside, is_directory, copied));
    }
    let unified = is_of("/sys/fs/cgroup", libc::CGROUP2_SUPER_MAGIC);

    root(spec, note)?;
    enter(&spec.root).or_host("the root")?;

    attach(&proc, Path::new("/proc"), true).or_invalid("/proc")?;
    attach(&sys, Path::new("/sys"), true).or_invalid("/sys")?;
    drop((proc, sys));
    if unified {
        let flags = DATA | MountFlags::RDONLY;
        kernel("/sys/fs/cgroup", "cgroup2", flags, c"").or_host("/sys/fs/cgroup")?;
    } else {
        note("/sys/fs/cgroup: empty, as the host's control groups are of version 1");
    }
    let dev = |path, kind, flags, options| kernel(path, kind, flags, options).or_host(path);
    let flags = NOSUID | MountFlags::STRICTATIME;
    dev("/dev", "tmpfs", flags, c"mode=755,size=65536k")?;
    for (name, device) in devices {
        let place = Path::new("/dev").join(name);
        device
            .and_then(|device| attach(&device, &place, false))
            .or_host(place.display())?;
    }
    for (target, link) in LINKS {
        symlink(target, link).or_host(link)?;
    }
    let tty = match mapping {
        Mapping::Many => c"newinstance,ptmxmode=0666,mode=0620,gid=5",
        Mapping::One => c"newinstance,ptmxmode=0666,mode=0620",
    };
    dev("/dev/pts", "devpts", NOSUID | MountFlags::NOEXEC, tty)?;
    dev("/dev/shm", "tmpfs", DATA, c"mode=1777,size=65536k")?;
    match kernel("/dev/mqueue", "mqueue", DATA, c"") {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
            note("/dev/mqueue: the host's kernel has none");
        }
        mounted => mounted.or_host("/dev/mqueue")?,
    }
    names(&spec.hostname);
    for (inside, is_directory, copied) in &volumes {
        attach(copied, inside, *is_directory).or_invalid(inside.display())?;
    }
    drop(volumes);
    guard().or_host("masking /proc and /sys")?;
    if let Some(cwd) = &spec.cwd {
        let entered = match std::env::set_current_dir(cwd) {
            // As Docker.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                fs::create_dir_all(cwd).and_then(|()| std::env::set_current_dir(cwd))
            }
            entered => entered,
        };
        entered.or_invalid(cwd.display())?;
    }
    Ok(())
}

/// Mounts the image's files over themselves: with a layer for changes, or read-only.
fn root(spec: &Spec, note: &mut dyn FnMut(&str)) -> Result<(), Error> {
    let stacked = is_of(&spec.writable, libc::OVERLAYFS_SUPER_MAGIC);
    let mut refused = match stacked {
        // That would be refused, after some work.
        true => io::Error::from_raw_os_error(libc::EINVAL),
        false => match overlay(spec) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        },
    };
    if refused.raw_os_error() == Some(libc::EINVAL) {
        match memory(spec).and_then(|()| overlay(spec)) {
            Ok(()) => {
                let directory = spec.writable.display();
                note(&format!(
                    "/: what is written lies in memory, as {directory} can be no overlay's"
                ));
                return Ok(());
            }
            Err(error) => refused = error,
        }
    }
    match refused.raw_os_error() {
        Some(libc::EPERM | libc::EACCES | libc::EINVAL | libc::ENODEV) => {}
        _ => return Err(refused).or_host("overlayfs"),
    }
    note(&format!(
        "/: read-only, as there is no overlayfs: {refused}"
    ));
    let bound = copy(&spec.root, false).and_then(|root| {
        // An image's devices would be the host's.
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
        restrict(root.as_raw_fd(), c"", attributes)?;
        attach_at(&root, &spec.root)
    });
    bound.or_host(spec.root.display())
}

fn overlay(spec: &Spec) -> io::Result<()> {
    let options = overlay::options(&spec.root, &spec.writable)?;
    mount(
        "overlay",
        &spec.root,
        "overlay",
        MountFlags::empty(),
        &*options,
    )?;
    Ok(())
}

/// Covers the directory for changes by one in memory.
fn memory(spec: &Spec) -> io::Result<()> {
    let flags = NOSUID | MountFlags::NODEV;
    mount("tmpfs", &spec.writable, "tmpfs", flags, c"mode=755")?;
    let upper = spec.writable.join("upper");
    fs::create_dir(&upper)?;
    fs::create_dir(spec.writable.join("work"))?;
    // It becomes the root directory's own.
    fs::set_permissions(&upper, fs::metadata(&spec.root)?.permissions())
}

/// Makes a directory the root, and forgets the old one.
fn enter(root: &Path) -> io::Result<()> {
    std::env::set_current_dir(root)?;
    // The old root comes to lie over the new one, and is what "." means (pivot_root(2)).
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    std::env::set_current_dir("/")
}

/// Hides what Docker hides.
fn guard() -> io::Result<()> {
    for path in READ_ONLY {
        match mount_bind_recursive(path, path) {
            Err(Errno::NOENT) => continue,
            bound => bound?,
        }
        make_read_only(libc::AT_FDCWD, &CString::new(path)?)?;
    }
    for path in MASKED {
        mask(Path::new(path))?;
    }
    for cpu in 0.. {
        // Where the first has none, no other has.
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/thermal_throttle");
        if !mask(Path::new(&path))? {
            break;
        }
    }
    Ok(())
}

/// Covers a file by the null device, or a directory by an empty one; false if there is none.
fn mask(path: &Path) -> io::Result<bool> {
    let covered = match mount_bind("/dev/null", path) {
        Err(Errno::NOTDIR) => mount("tmpfs", path, "tmpfs", MountFlags::RDONLY, c""),
        covered => covered,
    };
    match covered {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// What names the machine. An image without `/etc`, or with something strange in it,
/// wants none; and one that is read-only has its own.
fn names(hostname: &str) {
    let write = |path, text: String| {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o644);
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let _ = options
            .open(path)
            .and_then(|mut file| file.write_all(text.as_bytes()));
    };
    write("/etc/hostname", format!("{hostname}\n"));
    write(
        "/etc/hosts",
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned(),
    );
}

/// Mounts one of the kernel's file systems, at a directory that is made if it is missing.
fn kernel(path: &str, kind: &str, flags: MountFlags, options: &CStr) -> io::Result<()> {
    match mount(kind, path, kind, flags, options) {
        Err(Errno::NOENT) => {
            fs::create_dir_all(path)?;
            mount(kind, path, kind, flags, options)?;
        }
        mounted => mounted?,
    }
    Ok(())
}

/// Attaches a detached mount, at a directory or file that is made if it is missing.
fn attach(what: &OwnedFd, path: &Path, is_directory: bool) -> io::Result<()> {
    match attach_at(what, path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if is_directory {
                fs::create_dir_all(path)?;
            } else {
                fs::create_dir_all(path.parent().unwrap_or(path))?;
                let mut options = OpenOptions::new();
                options
                    .write(true)
                    .create_new(true)
                    .mode(0o644)
                    .open(path)?;
            }
            attach_at(what, path)
        }
        attached => attached,
    }
}

fn attach_at(what: &OwnedFd, path: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    Ok(move_mount(what, "", CWD, path, flags)?)
}

/// A new file system of a kind, not attached anywhere.
fn file_system(kind: &str, attributes: MountAttrFlags) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    Ok(fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// A copy of the mounts at and below a path of the host, not attached anywhere.
fn copy(path: &Path, read_only: bool) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let copied = open_tree(CWD, path, flags | OpenTreeFlags::AT_RECURSIVE)?;
    if read_only {
        make_read_only(copied.as_raw_fd(), c"")?;
    }
    Ok(copied)
}

/// Nothing at and below a mount can be changed through it.
fn make_read_only(directory: libc::c_int, path: &CStr) -> io::Result<()> {
    restrict(directory, path, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Takes something from a mount and those below it.
fn restrict(directory: libc::c_int, path: &CStr, attributes: MountAttrFlags) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: attributes.bits().into(),
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    let (path, size) = (path.as_ptr(), size_of::<libc::mount_attr>());
    let what = &raw const attributes;
    // SAFETY: a string that ends in zero, and a live structure of that size.
    check(unsafe { libc::syscall(libc::SYS_mount_setattr, directory, path, flags, what, size) })
}

/// Whether a directory is of a kind of file system.
fn is_of(directory: impl rustix::path::Arg, magic: libc::c_long) -> bool {
    statfs(directory).is_ok_and(|StatFs { f_type, .. }| f_type == magic)
}
