//! Opens every file of the host that a machine needs, and creates none.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use kvm_ioctls::Kvm;
use mayfly_devices::virtio::block::{SECTOR, qcow2_size};
use mayfly_sandbox::{Cgroup, Door};
use rustix::fs::{Access, MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, fstatfs, memfd_create};

use crate::config::{DiskConfig, Format, Host, HostNet, LAYERS, MachineConfig, Network};
use crate::disk_lock::{self, DiskLocks};
use crate::failure::{Failure, OrFail, file_refusal};
use crate::helper::Ready;
use crate::kvm;
use crate::link::{DeviceBackend, ImageLayout};
use crate::net::{passt, tap};
use crate::signals::StartSignals;
use crate::spec::DeviceKind;
use crate::virtiofsd;
use crate::vsock;

const RANDOM: &str = "/dev/urandom";
/// Of `linux/magic.h`.
const RAMFS_MAGIC: libc::c_long = 0x8584_58f6;

/// The host's backend of a device, for the VMM process.
pub struct OpenedBackend {
    /// The device's name.
    pub device: String,
    /// What it is.
    pub backend: DeviceBackend,
    /// Its descriptors.
    pub files: Vec<OwnedFd>,
}

/// What was opened.
pub struct Resources {
    /// KVM, which can run Linux.
    pub kvm: Kvm,
    /// The kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The host's backends of devices.
    pub backends: Vec<OpenedBackend>,
    /// The locks of the layers and the disks.
    pub locks: DiskLocks,
    /// Where clients of the guest's sockets will come, without a name yet.
    pub vsock: Option<UnixListener>,
    /// How large in bytes the disks that may be written to can become.
    pub file_size: u64,
    /// The processes beside the VM, by the names of the devices that they serve.
    pub helpers: Vec<(String, Ready)>,
    /// The control group that these are in.
    pub cgroup: Option<Cgroup>,
}

impl Resources {
    /// Opens everything, or fails with nothing touched. The control group is made by how much
    /// memory disks may take, in bytes.
    pub fn open(
        config: &MachineConfig,
        signals: &StartSignals,
        make_cgroup: impl FnOnce(u64) -> Option<Cgroup>,
    ) -> Result<Self, Failure> {
        let guest = &config.guest;
        let kernel = open_regular(&guest.kernel, &guest.kernel_flag)?;
        let initrd = match &guest.initrd {
            Some(path) => Some(open_regular(path, &initrd_flag(path))?),
            None => None,
        };
        check_outputs(config)?;
        let mut disks = Disks::default();
        disks.open_layers(&config.layers)?;
        for disk in &config.disks {
            disks.open(disk)?;
        }
        let Disks {
            mut backends,
            locks,
            in_memory,
            file_size,
        } = disks;
        let vsock = match &config.vsock {
            Some(vsock) => {
                check_creatable(&vsock.path, &vsock.flag())?;
                let listener = vsock::open(vsock)?;
                let file = listener.try_clone().or_host("duplicating a descriptor")?;
                backends.push(OpenedBackend::new(
                    "vsock",
                    DeviceBackend::Vsock,
                    vec![file.into()],
                ));
                Some(listener)
            }
            None => None,
        };
        let random = File::open(RANDOM).or_host(RANDOM)?;
        backends.push(OpenedBackend::new(
            "rng",
            DeviceBackend::Rng,
            vec![random.into()],
        ));
        let kvm = kvm::open(config.accept_kvm)?;
        // Last, as these are processes.
        let cgroup = make_cgroup(in_memory);
        let door = cgroup.as_ref().map(Cgroup::door).unwrap_or_default();
        let helpers = start_helpers(config, &door, signals, &mut backends)?;
        Ok(Resources {
            kvm,
            kernel,
            initrd,
            backends,
            locks,
            vsock,
            file_size,
            helpers,
            cgroup,
        })
    }
}

impl OpenedBackend {
    fn new(device: impl Into<String>, backend: DeviceBackend, files: Vec<OwnedFd>) -> Self {
        OpenedBackend {
            device: device.into(),
            backend,
            files,
        }
    }
}

/// The flag of an initial RAM disk, for messages.
pub fn initrd_flag(path: &Path) -> String {
    format!("--initrd {}", path.display())
}

/// Checks that all files and sockets that are made later may be made.
fn check_outputs(config: &MachineConfig) -> Result<(), Failure> {
    for (end, _, flag) in config.ends() {
        if let Some(path) = end.path() {
            check_creatable(path, &flag)?;
        }
    }
    if let Some(path) = &config.log.file {
        check_creatable(path, &format!("--log file={}", path.display()))?;
    }
    if let Some(path) = &config.pidfile {
        check_creatable(path, &format!("--pidfile {}", path.display()))?;
    }
    Ok(())
}

/// Attaches TAPs, and starts the processes beside the VM: all of them at the same time.
fn start_helpers(
    config: &MachineConfig,
    door: &Door,
    signals: &StartSignals,
    backends: &mut Vec<OpenedBackend>,
) -> Result<Vec<(String, Ready)>, Failure> {
    let folders = config.folders.iter();
    let folders = folders.map(|folder| {
        let starting = virtiofsd::start(&folder.config, door, signals)?;
        Ok((&folder.device, starting))
    });
    let folders: Vec<_> = folders.collect::<Result<_, Failure>>()?;
    let mut passts = Vec::new();
    for net in &config.nets {
        let HostNet { config: to, user } = &net.config;
        match (&to.network, user) {
            (Network::Tap { name, queues }, _) => {
                let taps = tap::open(name, queues.number(config.spec.cpus))?;
                let files = taps.into_iter().map(OwnedFd::from).collect();
                backends.push(OpenedBackend::new(&net.device, DeviceBackend::Tap, files));
            }
            (Network::User(to), Some(user)) => {
                let mac = guest_mac(config, &net.device);
                passts.push((&net.device, passt::start(to, user, mac, door)?));
            }
            // Validation gives each of these its network.
            (Network::User(_), None) => {}
        }
    }
    let mut helpers = Vec::new();
    for (device, starting) in passts {
        let (socket, policy, helper) = starting.ready(signals)?;
        backends.push(OpenedBackend::new(
            device,
            DeviceBackend::Stream(policy),
            vec![socket.into()],
        ));
        helpers.push((device.clone(), helper));
    }
    for (device, starting) in folders {
        let (frontend, helper) = starting.ready(signals)?;
        let (socket, features) = frontend.into_parts();
        backends.push(OpenedBackend::new(
            device,
            DeviceBackend::Fs(features),
            vec![socket.into()],
        ));
        helpers.push((device.clone(), helper));
    }
    Ok(helpers)
}

/// The MAC address of a network device's guest.
fn guest_mac(config: &MachineConfig, device: &str) -> [u8; 6] {
    match config.spec.device(device).map(|device| &device.kind) {
        Some(DeviceKind::Net(net)) => net.mac,
        _ => [0; 6],
    }
}

/// Disks as they are opened.
#[derive(Default)]
struct Disks {
    backends: Vec<OpenedBackend>,
    locks: DiskLocks,
    /// How much memory in bytes those may take that are written to and lie in memory, or may.
    in_memory: u64,
    /// How large in bytes those that are written to can become.
    file_size: u64,
}

impl Disks {
    /// Opens the layers of an image, whose files nobody writes to.
    fn open_layers(&mut self, paths: &[PathBuf]) -> Result<(), Failure> {
        if paths.is_empty() {
            return Ok(());
        }
        let (mut files, mut lens) = (Vec::new(), Vec::new());
        for path in paths {
            let flag = format!("layer {}", path.display());
            let (file, len) = open_image(path, true, &flag, &mut self.locks)?;
            if len == 0 || !len.is_multiple_of(SECTOR) {
                return Err(Failure::config(format!(
                    "{flag}: its length is not one of whole sectors"
                )));
            }
            files.push(file.into());
            lens.push(len);
        }
        let layout = ImageLayout::Concat(lens);
        self.backends.push(OpenedBackend::new(
            LAYERS,
            DeviceBackend::Disk(layout),
            files,
        ));
        Ok(())
    }

    /// Opens a disk.
    fn open(&mut self, disk: &Host<DiskConfig>) -> Result<(), Failure> {
        let config = &disk.config;
        let flag = config.flag();
        let (file, len) = open_image(&config.path, config.read_only, &flag, &mut self.locks)?;
        let size = match config.format {
            Format::Raw => len,
            Format::Qcow2 => qcow2_size(&file, !config.read_only).or_config(&flag)?,
        };
        if !config.read_only {
            if lies_in_memory(&file) {
                self.in_memory = self.in_memory.saturating_add(size);
            }
            let most = match config.format {
                Format::Raw => size,
                Format::Qcow2 => largest_qcow2(size, len),
            };
            self.file_size = self.file_size.max(most);
        }
        let mut files = Vec::new();
        let layout = match config.format {
            Format::Raw => {
                check_sectors(len, config.read_only, &flag)?;
                let odd = len % SECTOR != 0;
                match odd {
                    true => padded(file, len, &mut files).or_host(&flag)?,
                    false => {
                        files.push(file.into());
                        ImageLayout::Raw(len)
                    }
                }
            }
            Format::Qcow2 => {
                files.push(file.into());
                let backing = config.backing.as_ref().map(|backing| {
                    let flag = config.backing_flag();
                    let (file, len) = open_image(&backing.path, true, &flag, &mut self.locks)?;
                    files.push(file.into());
                    Ok::<_, Failure>(Box::new(match backing.format {
                        Format::Raw => ImageLayout::Raw(len),
                        Format::Qcow2 => ImageLayout::Qcow2(None),
                    }))
                });
                ImageLayout::Qcow2(backing.transpose()?)
            }
        };
        let backend = DeviceBackend::Disk(layout);
        self.backends
            .push(OpenedBackend::new(&disk.device, backend, files));
        Ok(())
    }
}

/// A qcow2 image of a disk's size has tables and old clusters beside its disk's bytes.
fn largest_qcow2(size: u64, now: u64) -> u64 {
    const BESIDE: u64 = 64 << 20;
    let most = size.saturating_add(size / 8).saturating_add(BESIDE);
    most.max(now)
}

/// A raw disk has a sector, and whole ones if it is written to.
fn check_sectors(len: u64, read_only: bool, flag: &str) -> Result<(), Failure> {
    if len < SECTOR {
        return Err(Failure::config(format!(
            "{flag}: is smaller than a sector of {SECTOR} bytes; make it larger with truncate -s"
        )));
    }
    match len % SECTOR {
        rest @ 1.. if !read_only => Err(Failure::config(format!(
            "{flag}: has {rest} bytes behind its last whole sector of {SECTOR}, which a guest \
             cannot have; make it longer with truncate -s %512, or have it read-only"
        ))),
        _ => Ok(()),
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
        .map_err(|error| file_refusal(&error, flag))?;
    let metadata = file
        .metadata()
        .map_err(|error| file_refusal(&error, flag))?;
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

/// A file that is only read and ends within a sector: the rest of that reads as zeroes.
fn padded(file: File, len: u64, files: &mut Vec<OwnedFd>) -> io::Result<ImageLayout> {
    let whole = len - len % SECTOR;
    let size = |len: u64| usize::try_from(len).map_err(io::Error::other);
    let mut last = vec![0; size(len - whole)?];
    file.read_exact_at(&mut last, whole)?;
    last.resize(size(SECTOR)?, 0);
    let memory: File = memfd_create("end of a disk", MemfdFlags::CLOEXEC)?.into();
    memory.write_all_at(&last, 0)?;
    files.extend([file.into(), memory.into()]);
    Ok(ImageLayout::Concat(vec![whole, SECTOR]))
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
        .map_err(|error| file_refusal(&error, flag))?;
    let kind = file
        .metadata()
        .map_err(|error| file_refusal(&error, flag))?
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
    set_blocking(&file).map_err(|error| file_refusal(&error, flag))?;
    // A block device's metadata has no size; its end has.
    let len = (&file)
        .seek(SeekFrom::End(0))
        .map_err(|error| file_refusal(&error, flag))?;
    match disk_lock::take(&file, read_only) {
        Ok(()) => {
            locks
                .add(&file)
                .map_err(|error| file_refusal(&error, flag))?;
            Ok((file, len))
        }
        Err(TryLockError::WouldBlock) => Err(Failure::host(format!(
            "{flag}: is locked: another VM uses it{}",
            match read_only {
                true => " and may write to it",
                false => "; VMs can share it if all have it read-only",
            }
        ))),
        Err(TryLockError::Error(error)) => Err(file_refusal(&error, flag)),
    }
}

fn set_blocking(file: &File) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags - OFlags::NONBLOCK)?)
}

/// Checks that a file may be made or overwritten, without doing so.
fn check_creatable(path: &Path, flag: &str) -> Result<(), Failure> {
    let access = |path: &Path| -> Result<(), Failure> {
        rustix::fs::access(path, Access::WRITE_OK)
            .map_err(|error| file_refusal(&error.into(), flag))
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
        Err(error) => Err(file_refusal(&error, flag)),
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
            let mut disks = Disks::default();
            let config = DiskConfig::of_volume(file.path().into(), read_only, "-v a".into(), "a");
            let device = "disk0".to_owned();
            disks.open(&Host { device, config }).map(|()| disks)
        };
        let disks = open(true).unwrap();
        let expected = DeviceBackend::Disk(ImageLayout::Concat(vec![1024, 512]));
        assert_eq!(disks.backends[0].backend, expected);
        assert_eq!(disks.backends[0].files.len(), 2);
        drop(disks);
        let refused = open(false).err().unwrap().to_string();
        assert!(
            refused.starts_with("-v a: has 19 bytes behind"),
            "{refused}"
        );
        assert!(refused.contains("truncate -s %512"), "{refused}");
    }
}
