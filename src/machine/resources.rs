//! Opens every file of the host that a machine needs, and creates none.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use kvm_ioctls::Kvm;
use mayfly_devices::virtio::block::{Concat, Disk, ID_LEN, Image, Qcow2, SECTOR};

use rustix::fs::{Access, MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, fstatfs, memfd_create};

use super::attach::mac_address;
use super::build::open_kvm;
use super::signals::StartSignals;
use crate::config::{DiskConfig, Format, MachineConfig, Network};
use crate::disk_lock::{self, DiskLocks};
use crate::failure::{Class, Failure, OrFail};
use crate::helper::Ready;
use crate::net::egress::Egress;
use crate::net::host::KnownHost;
use crate::net::{passt, tap};
use crate::sandbox::Cgroup;
use crate::virtiofsd::{self, Served};
use crate::vsock;

/// What the guest sees as the serial number of the layers' disk.
const LAYERS_ID: &[u8] = b"layers";
const RANDOM: &str = "/dev/urandom";
/// Of `linux/magic.h`.
const RAMFS_MAGIC: libc::c_long = 0x8584_58f6;

/// The host's side of a network.
pub enum HostNet {
    /// A TAP device, attached once for each pair of queues.
    Tap(Vec<File>),
    /// A passt, and what its frames must be.
    Passt(UnixStream, Box<Egress>),
}

enum StartingNet {
    Tap(Vec<File>),
    Passt(Box<passt::Starting>),
}

/// What was opened.
pub struct Resources {
    /// KVM, which can run Linux.
    pub kvm: Kvm,
    /// The kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The disk of an image's layers.
    pub layers: Option<Disk>,
    /// The disks, locked.
    pub disks: Vec<Disk>,
    /// The locks of the layers and the disks.
    pub locks: DiskLocks,
    /// The networks.
    pub nets: Vec<HostNet>,
    /// The folders.
    pub folders: Vec<Served>,
    /// Where clients of the guest's sockets will come, without a name yet.
    pub vsock: Option<UnixListener>,
    /// Random bytes for the guest.
    pub random: File,
}

impl Resources {
    /// Opens everything, or fails with nothing touched. Returns the processes beside
    /// the VM, too: those of networks, then those of folders; and the control group that
    /// they are in, which is made by how much memory disks may take.
    pub fn open(
        config: &MachineConfig,
        signals: &StartSignals,
        make_cgroup: impl FnOnce(u64) -> Option<Cgroup>,
    ) -> Result<(Self, Option<Cgroup>, Vec<Ready>), Failure> {
        let kernel = open_regular(&config.kernel, &config.kernel_flag)?;
        let initrd = match &config.initrd {
            Some(path) => Some(open_regular(path, &format!("--initrd {}", path.display()))?),
            None => None,
        };
        if let Some(path) = config.console.end.path() {
            check_creatable(path, &format!("--console {}", config.console.end))?;
        }
        for channel in &config.channels {
            if let Some(path) = channel.end.path() {
                check_creatable(path, &channel.flag())?;
            }
        }
        if let Some(path) = &config.log.file {
            check_creatable(path, &format!("--log file={}", path.display()))?;
        }
        if let Some(path) = &config.pidfile {
            check_creatable(path, &format!("--pidfile {}", path.display()))?;
        }
        let mut locks = DiskLocks::default();
        let layers = match config.layers.as_slice() {
            [] => None,
            files => Some(open_layers(files, &mut locks)?),
        };
        let disks = config
            .disks
            .iter()
            .map(|disk| open_disk(disk, config.cpus, &mut locks))
            .collect::<Result<Vec<_>, _>>()?;
        let vsock = match &config.vsock {
            Some(vsock) => {
                check_creatable(&vsock.path, &vsock.flag())?;
                Some(vsock::open(vsock)?)
            }
            None => None,
        };
        let random = File::open(RANDOM).or_host(RANDOM)?;
        let kvm = open_kvm(config.accept_kvm)?;
        // Last, as these are processes.
        let cgroup = make_cgroup(in_memory(&disks));
        let door = cgroup.as_ref().map(Cgroup::door).unwrap_or_default();
        let folders = config.folders.iter();
        let folders = folders.map(|folder| virtiofsd::start(folder, &door, signals));
        let folders: Vec<_> = folders.collect::<Result<_, _>>()?;
        let nets = config.nets.iter().map(|net| match &net.network {
            Network::Tap { name, queues } => {
                tap::open(name, queues.number(config.cpus)).map(StartingNet::Tap)
            }
            Network::User(user) => {
                let starting = passt::start(user, mac_address(net), &door)?;
                Ok(StartingNet::Passt(Box::new(starting)))
            }
        });
        let nets: Vec<_> = nets.collect::<Result<_, _>>()?;
        // All of them start at the same time.
        let mut helpers = Vec::new();
        let nets = nets.into_iter().map(|net| match net {
            StartingNet::Tap(files) => Ok(HostNet::Tap(files)),
            StartingNet::Passt(starting) => {
                let (socket, filter, helper) = starting.ready(signals)?;
                helpers.push(helper);
                Ok(HostNet::Passt(socket, Box::new(filter)))
            }
        });
        let nets = nets.collect::<Result<_, Failure>>()?;
        let folders = folders.into_iter().map(|starting| {
            let (served, helper) = starting.ready(signals)?;
            helpers.push(helper);
            Ok(served)
        });
        let folders = folders.collect::<Result<_, Failure>>()?;
        let resources = Resources {
            kvm,
            kernel,
            initrd,
            layers,
            disks,
            locks,
            nets,
            folders,
            vsock,
            random,
        };
        Ok((resources, cgroup, helpers))
    }
}

/// How much memory disks may take that are written to and lie in memory, or may.
fn in_memory(disks: &[Disk]) -> u64 {
    let disks = disks.iter().filter(|disk| !disk.read_only);
    let sizes = disks.map(|disk| {
        let file = match &disk.image {
            Image::Raw(file) => file,
            Image::Qcow2(image) => image.file(),
            Image::Concat(_) => return 0,
        };
        match lies_in_memory(file) {
            true => disk.sectors.saturating_mul(SECTOR),
            false => 0,
        }
    });
    sizes.fold(0, u64::saturating_add)
}

impl Resources {
    /// How large the disks that may be written to can become.
    pub fn file_size(&self) -> Option<u64> {
        /// Of a qcow2 image beside its disk's bytes: tables, and old clusters.
        const BESIDE: u64 = 64 << 20;
        let sizes = self.disks.iter().filter(|disk| !disk.read_only);
        let sizes = sizes.map(|disk| {
            let size = disk.sectors.saturating_mul(SECTOR);
            match &disk.image {
                Image::Raw(_) | Image::Concat(_) => size,
                Image::Qcow2(image) => {
                    let now = image.file().metadata().map_or(0, |it| it.len());
                    (size + size / 8 + BESIDE).max(now)
                }
            }
        });
        Some(sizes.max().unwrap_or(0))
    }

    /// What networks' filters know of the host's.
    pub fn known_hosts(&self) -> Vec<KnownHost> {
        let nets = self.nets.iter().filter_map(|net| match net {
            HostNet::Tap(_) => None,
            HostNet::Passt(_, filter) => Some(filter.host()),
        });
        nets.collect()
    }
}

/// Of an overlay, nobody tells where its files are.
fn lies_in_memory(file: &File) -> bool {
    fstatfs(file).is_ok_and(|about| {
        matches!(
            about.f_type,
            libc::TMPFS_MAGIC | libc::OVERLAYFS_SUPER_MAGIC | RAMFS_MAGIC
        )
    })
}

/// Opens a regular file to read it.
fn open_regular(path: &Path, flag: &str) -> Result<File, Failure> {
    // Without blocking, as a pipe would.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| refusal(&error, flag))?;
    let metadata = file.metadata().map_err(|error| refusal(&error, flag))?;
    if metadata.is_dir() {
        return Err(Failure::config(format!(
            "{flag}: is a directory, not a file"
        )));
    }
    if !metadata.is_file() {
        return Err(Failure::config(format!("{flag}: is not a regular file")));
    }
    Ok(file)
}

/// Opens the layers of an image, whose files nobody writes to.
fn open_layers(files: &[PathBuf], locks: &mut DiskLocks) -> Result<Disk, Failure> {
    let mut parts = Concat::default();
    for path in files {
        let flag = format!("layer {}", path.display());
        let (file, len) = open_image(path, true, &flag, locks)?;
        parts.push(file, len).or_config(flag)?;
    }
    let mut id = [0; ID_LEN];
    id[..LAYERS_ID.len()].copy_from_slice(LAYERS_ID);
    Ok(Disk {
        sectors: parts.size() / SECTOR,
        image: Image::Concat(parts),
        read_only: true,
        id,
        queues: 1,
        limits: Default::default(),
    })
}

/// Opens a disk.
fn open_disk(config: &DiskConfig, cpus: u8, locks: &mut DiskLocks) -> Result<Disk, Failure> {
    let flag = config.flag();
    let (file, len) = open_image(&config.path, config.read_only, &flag, locks)?;
    let backing = match &config.backing {
        None => None,
        Some(backing) => {
            let flag = format!("{flag}: backing={}", backing.path.display());
            let (file, _) = open_image(&backing.path, true, &flag, locks)?;
            Some(match backing.format {
                Format::Raw => Image::Raw(file),
                Format::Qcow2 => {
                    let image = Qcow2::open(file, false, None).or_config(&flag)?;
                    Image::Qcow2(Box::new(image))
                }
            })
        }
    };
    let (image, size) = match config.format {
        Format::Raw if config.read_only && len > SECTOR && !len.is_multiple_of(SECTOR) => {
            let image = padded(file, len).or_host(&flag)?;
            let size = image.size();
            (Image::Concat(image), size)
        }
        Format::Raw => (Image::Raw(file), len),
        Format::Qcow2 => {
            let image = Qcow2::open(file, !config.read_only, backing).or_config(&flag)?;
            let size = image.size();
            (Image::Qcow2(Box::new(image)), size)
        }
    };
    if size < SECTOR {
        return Err(Failure::config(format!(
            "{flag}: is smaller than a sector of {SECTOR} bytes; make it larger with {}",
            match config.format {
                Format::Raw => "truncate -s",
                Format::Qcow2 => "qemu-img resize",
            }
        )));
    }
    if let rest @ 1.. = size % SECTOR {
        return Err(Failure::config(format!(
            "{flag}: has {rest} bytes behind its last whole sector of {SECTOR}, which a guest \
             cannot have; {}",
            match config.format {
                Format::Raw => "make it longer with truncate -s %512, or have it read-only",
                Format::Qcow2 => "make it longer with qemu-img resize",
            }
        )));
    }
    let mut id = [0; ID_LEN];
    for (target, source) in id
        .iter_mut()
        .zip(config.id.iter().flat_map(|id| id.bytes()))
    {
        *target = source;
    }
    Ok(Disk {
        image,
        sectors: size / SECTOR,
        read_only: config.read_only,
        id,
        queues: config.queues.number(cpus).into(),
        limits: config.limits,
    })
}

/// A file that is only read and ends within a sector: the rest of that reads as zeroes.
fn padded(file: File, len: u64) -> io::Result<Concat> {
    let whole = len - len % SECTOR;
    let size = |len: u64| usize::try_from(len).map_err(io::Error::other);
    let mut last = vec![0; size(len - whole)?];
    file.read_exact_at(&mut last, whole)?;
    last.resize(size(SECTOR)?, 0);
    let memory: File = memfd_create("end of a disk", MemfdFlags::CLOEXEC)?.into();
    memory.write_all_at(&last, 0)?;
    let mut image = Concat::default();
    image.push(file, whole)?;
    image.push(memory, SECTOR)?;
    Ok(image)
}

/// Opens an image's file, and locks it: shared if it is only read. Returns its
/// length, too.
fn open_image(
    path: &Path,
    read_only: bool,
    flag: &str,
    locks: &mut DiskLocks,
) -> Result<(File, u64), Failure> {
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| refusal(&error, flag))?;
    let kind = file
        .metadata()
        .map_err(|error| refusal(&error, flag))?
        .file_type();
    if kind.is_dir() {
        return Err(Failure::config(format!(
            "{flag}: is a directory, not a disk"
        )));
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Failure::config(format!(
            "{flag}: is neither a file nor a block device"
        )));
    }
    // It only kept the opening from blocking: in older kernels io_uring refuses
    // to wait on such a file.
    set_blocking(&file).map_err(|error| refusal(&error, flag))?;
    // A block device's metadata has no size; its end has.
    let len = (&file)
        .seek(SeekFrom::End(0))
        .map_err(|error| refusal(&error, flag))?;
    match disk_lock::take(&file, read_only) {
        Ok(()) => {
            locks.add(&file).map_err(|error| refusal(&error, flag))?;
            Ok((file, len))
        }
        Err(TryLockError::WouldBlock) => Err(Failure::host(format!(
            "{flag}: is locked: another VM uses it{}",
            match read_only {
                true => " and may write to it",
                false => "; VMs can share it if all have it read-only",
            }
        ))),
        Err(TryLockError::Error(error)) => Err(refusal(&error, flag)),
    }
}

fn set_blocking(file: &File) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags - OFlags::NONBLOCK)?)
}

/// A missing file is the user's fault, a forbidden one the host's refusal.
pub fn refusal(error: &io::Error, flag: &str) -> Failure {
    let (class, message) = match error.kind() {
        io::ErrorKind::NotFound => (Class::Config, "no such file".to_owned()),
        io::ErrorKind::IsADirectory => (Class::Config, "is a directory, not a file".to_owned()),
        io::ErrorKind::NotADirectory => (Class::Config, "a part of the path is no folder".into()),
        io::ErrorKind::PermissionDenied => (
            Class::Host,
            "no permission; see its owner and mode with ls -l".to_owned(),
        ),
        _ => (Class::Host, error.to_string()),
    };
    Failure::new(class, format!("{flag}: {message}"))
}

/// Checks that a file may be made or overwritten, without doing so.
fn check_creatable(path: &Path, flag: &str) -> Result<(), Failure> {
    let access = |path: &Path| -> Result<(), Failure> {
        rustix::fs::access(path, Access::WRITE_OK).map_err(|error| refusal(&error.into(), flag))
    };
    match path.metadata() {
        Ok(metadata) if metadata.is_dir() => Err(Failure::config(format!(
            "{flag}: is a directory, not a file"
        ))),
        Ok(metadata) if metadata.file_type().is_block_device() => Err(Failure::config(format!(
            "{flag}: is a block device, not a file"
        ))),
        Ok(_) => access(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            if !parent.is_dir() {
                return Err(Failure::config(format!(
                    "{flag}: the folder {} does not exist",
                    parent.display()
                )));
            }
            access(parent)
        }
        Err(error) => Err(refusal(&error, flag)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_an_odd_disk_is_there_or_missed_loudly() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; 1024 + 19]).unwrap();
        let open = |read_only| {
            let path = file.path().to_owned();
            let disk = DiskConfig::of_volume(path, read_only, "-v a".into());
            open_disk(&disk, 1, &mut DiskLocks::default())
        };
        let disk = open(true).unwrap();
        assert_eq!(disk.sectors, 3);
        let refused = open(false).err().unwrap().to_string();
        assert!(
            refused.starts_with("-v a: has 19 bytes behind"),
            "{refused}"
        );
        assert!(refused.contains("truncate -s %512"), "{refused}");
    }
}
