//! What the VMM holds, and what it must not reach.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

use io_uring::IoUring;
use mayfly_devices::virtio::block::restricted_ring;
use tempfile::TempDir;
use vmm_sys_util::eventfd::EventFd;

/// A disk does not grow past this.
pub const DISK_MAX: u64 = 1 << 20;
/// The process does not grow by more than this.
pub const MEMORY_MAX: u64 = 64 << 20;
const KVM: &str = "MAYFLY_TEST_KVM";

/// All of it, as the supervisor has it.
pub struct Loot {
    /// What lies here is another VM's.
    pub folder: TempDir,
    pub supervisor: libc::pid_t,
    /// Somebody listens here …
    pub port: u16,
    /// … and here, for streams and for datagrams.
    pub abstract_names: [String; 2],
    _listeners: [OwnedFd; 4],
    /// What the VMM holds by right …
    pub disk: File,
    pub control: (UnixStream, UnixStream),
    pub kvm: Option<OwnedFd>,
    pub terminal: OwnedFd,
    /// … or, in the worst case, not.
    pub program: File,
    /// What it does not: it is open when the sandbox closes.
    pub directory: File,
    pub host_name: String,
}

/// The same, as the VMM has it.
pub struct Held<'a> {
    loot: &'a Loot,
    /// A disk's.
    pub ring: Option<IoUring>,
    /// A socket of the host's network.
    pub tcp: OwnedFd,
    /// Sockets of its own, made before it was closed in.
    pub own: [OwnedFd; 3],
}

impl Deref for Held<'_> {
    type Target = Loot;

    fn deref(&self) -> &Loot {
        self.loot
    }
}

/// A new socket.
pub fn socket(domain: libc::c_int, kind: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: numbers.
    match unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, 0) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: a new descriptor, which nothing else owns.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

impl Loot {
    pub fn gather() -> io::Result<Self> {
        // On a disk, as what lies in memory has fewer ways to grow.
        let folder = tempfile::tempdir_in("/var/tmp")?;
        let path = |name: &str| folder.path().join(name);
        fs::write(path("secret"), "of another VM")?;
        fs::write(path("spare"), "of another VM")?;
        std::os::unix::fs::symlink("/etc/passwd", path("link"))?;
        let supervisor = std::process::id().cast_signed();
        let abstract_names = ["stream", "datagram"].map(|it| format!("mayfly-{it}-{supervisor}"));
        let address = |index: usize| SocketAddr::from_abstract_name(&abstract_names[index]);
        let tcp = TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))?;
        let port = tcp.local_addr()?.port();
        let listeners = [
            tcp.into(),
            UnixListener::bind(path("control.sock"))?.into(),
            UnixListener::bind_addr(&address(0)?)?.into(),
            UnixDatagram::bind_addr(&address(1)?)?.into(),
        ];
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NOCTTY);
        let kvm = match std::env::var(KVM).map(|fd| fd.parse()) {
            // SAFETY: whoever started this process left it open for it.
            Ok(Ok(fd)) => Some(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => options.open("/dev/kvm").ok().map(OwnedFd::from),
        };
        Ok(Loot {
            supervisor,
            port,
            _listeners: listeners,
            disk: options.clone().create(true).open(path("disk"))?,
            control: UnixStream::pair()?,
            kvm,
            terminal: options.open("/dev/ptmx")?.into(),
            program: File::open("/bin/true")?,
            directory: File::open("/")?,
            host_name: fs::read_to_string("/proc/sys/kernel/hostname")?,
            abstract_names,
            folder,
        })
    }

    pub fn is_root(&self) -> bool {
        // SAFETY: touches no memory.
        unsafe { libc::geteuid() == 0 }
    }

    /// A file of another VM's.
    pub fn path(&self, name: &str) -> std::ffi::CString {
        let path = self.folder.path().join(name).into_os_string();
        let bytes = std::os::unix::ffi::OsStringExt::into_vec(path);
        std::ffi::CString::new(bytes).unwrap_or_default()
    }

    /// Where those are.
    pub fn folder_path(&self) -> std::ffi::CString {
        self.path("")
    }

    /// Adds a ring as disks have it, or an ordinary one.
    pub fn hold(&self, free: bool, tcp: OwnedFd) -> io::Result<Held<'_>> {
        // Another attempt may have made it larger.
        self.disk.set_len(0)?;
        let disk = self.disk.as_raw_fd();
        let ring = match free {
            true => IoUring::new(4).and_then(|ring| {
                ring.submitter().register_files(&[disk])?;
                Ok(ring)
            }),
            false => restricted_ring(4, disk, EventFd::new(0)?.as_raw_fd()),
        };
        Ok(Held {
            loot: self,
            ring: ring.ok(),
            tcp,
            own: [
                socket(libc::AF_INET, libc::SOCK_STREAM)?,
                socket(libc::AF_UNIX, libc::SOCK_STREAM)?,
                socket(libc::AF_UNIX, libc::SOCK_DGRAM)?,
            ],
        })
    }

    /// Leaves to a program what it could not open.
    pub fn inherited(&self, command: &mut Command) {
        let Some(kvm) = self.kvm.as_ref().map(AsRawFd::as_raw_fd) else {
            return;
        };
        command.env(KVM, kvm.to_string());
        // SAFETY: one system call between fork and exec.
        unsafe { command.pre_exec(move || mayfly_process::programs::inherit(kvm)) };
    }
}

impl Held<'_> {
    /// The descriptors that stay open.
    pub fn kept(&self) -> Vec<RawFd> {
        let mut kept = vec![0, 1, 2, self.disk.as_raw_fd()];
        kept.extend([self.control.0.as_raw_fd(), self.terminal.as_raw_fd()]);
        kept.extend([self.tcp.as_raw_fd(), self.program.as_raw_fd()]);
        kept.extend(self.own.each_ref().map(AsRawFd::as_raw_fd));
        kept.extend(self.kvm.as_ref().map(AsRawFd::as_raw_fd));
        kept.extend(self.ring.as_ref().map(AsRawFd::as_raw_fd));
        kept
    }
}
