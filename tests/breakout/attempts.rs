//! The ways out.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr;

use io_uring::{opcode, types};

use crate::loot::{DISK_MAX, Held, MEMORY_MAX};

/// Who can do it where there is no sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alone {
    Everyone,
    Root,
    /// Not to be tried there: the host would not like it, or may not have it.
    Untried,
}
use Alone::{Everyone, Root, Untried};

/// One way out.
pub struct Attempt {
    pub name: &'static str,
    pub alone: Alone,
    /// It fails even without the filter of system calls.
    pub outer: bool,
    /// The system calls that it is about.
    pub calls: &'static [&'static str],
    pub run: fn(&Held) -> io::Result<()>,
}

/// Without the filter, it fails as well …
const WALLED: bool = true;
/// … or does not, and leads nowhere.
const FILTERED: bool = false;

fn check(result: impl Into<i64>) -> io::Result<i64> {
    match result.into() {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// A system call, whose arguments are numbers or pointers that live until it returns. All
/// have the width of a register: that is not widened for the seventh.
macro_rules! call {
    ($number:ident $(, $argument:expr)* $(,)?) => {
        // SAFETY: see above; what it does to this process is what is tried.
        check(unsafe { libc::syscall(libc::$number $(, Wide::wide($argument))*) })
    };
}

/// A register's worth.
trait Wide {
    fn wide(self) -> usize;
}

impl<T> Wide for *const T {
    fn wide(self) -> usize {
        self as usize
    }
}

impl<T> Wide for *mut T {
    fn wide(self) -> usize {
        self as usize
    }
}

macro_rules! wide {
    ($($number:ident)*) => {
        $(impl Wide for $number {
            fn wide(self) -> usize {
                self as usize
            }
        })*
    };
}

wide! { i32 u32 i64 u64 usize }

fn done<T>(result: io::Result<T>) -> io::Result<()> {
    result.map(drop)
}

fn open(path: &CStr, flags: libc::c_int) -> io::Result<i64> {
    call!(SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0)
}

fn connect(fd: libc::c_int, address: &[u8]) -> io::Result<()> {
    done(call!(SYS_connect, fd, address.as_ptr(), address.len()))
}

/// `sockaddr_un`, whose name is a path that ends in zero, or begins with it.
fn unix_address(name: &[u8]) -> Vec<u8> {
    let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    address.extend_from_slice(name);
    address
}

/// `sockaddr_in` on the loopback.
fn loopback(port: u16) -> Vec<u8> {
    let mut address = (libc::AF_INET as u16).to_ne_bytes().to_vec();
    address.extend(port.to_be_bytes());
    address.extend([127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    address
}

/// A process that has come to be is one out; it ends at once.
fn born(result: io::Result<i64>) -> io::Result<()> {
    match result? {
        0 => {
            // SAFETY: ends the new process.
            unsafe { libc::_exit(0) }
        }
        _ => Ok(()),
    }
}

const PAGE: usize = 4096;

fn page(protection: libc::c_int) -> io::Result<i64> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    call!(SYS_mmap, 0usize, PAGE, protection, flags, -1, 0)
}

/// Of the sockets that it has.
const TCP: usize = 0;
const STREAM: usize = 1;
const DATAGRAM: usize = 2;

const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// A system call of the 32-bit kind.
fn int80(number: u32) -> io::Result<()> {
    let result: i64;
    // SAFETY: `getpid` and the like touch no memory; the registers that change are named.
    unsafe {
        std::arch::asm!(
            "int 0x80",
            inlateout("rax") u64::from(number) => result,
            lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _,
        );
    }
    match result {
        0.. => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error as i32)),
    }
}

const GETPID_32: u32 = 20;
const KVM_CREATE_VM: u64 = 0xae01;
const KEYRING_OF_USER: i32 = -4;
const KEYCTL_GET_KEYRING_ID: i32 = 0;

macro_rules! attempts {
    ($($name:literal, $alone:ident, $outer:ident, [$($call:literal),*], |$held:pat_param| $run:expr;)*) => {
        /// All.
        pub const ATTEMPTS: &[Attempt] = &[$(Attempt {
            name: $name,
            alone: $alone,
            outer: $outer,
            calls: &[$($call),*],
            run: |$held| done($run),
        }),*];
    };
}

attempts! {
    // Files.
    "open /etc/passwd", Everyone, WALLED, ["openat"], |_| open(c"/etc/passwd", libc::O_RDONLY);
    "open another VM's state", Everyone, WALLED, ["openat"],
        |held| open(&held.path("secret"), libc::O_RDWR);
    "open by a symbolic link", Everyone, WALLED, ["openat"],
        |held| open(&held.path("link"), libc::O_RDONLY);
    "open by ..", Everyone, WALLED, ["openat"], |_| open(c"../../../../etc/passwd", 0);
    "open below a stray directory", Everyone, WALLED, ["openat"], |held| {
        let (at, path) = (held.directory.as_raw_fd(), c"etc/passwd");
        call!(SYS_openat, at, path.as_ptr(), libc::O_RDONLY, 0)
    };
    "openat2 /etc/passwd", Everyone, WALLED, ["openat2"], |_| {
        let how = [0u64; 3];
        call!(SYS_openat2, libc::AT_FDCWD, c"/etc/passwd".as_ptr(), how.as_ptr(), 24)
    };
    "open /proc/self/mem", Everyone, WALLED, ["openat"], |_| open(c"/proc/self/mem", libc::O_RDWR);
    "open /dev/mem or /dev/null", Everyone, WALLED, ["openat"],
        |_| open(c"/dev/mem", libc::O_RDWR).or_else(|_| open(c"/dev/null", libc::O_RDWR));
    "create a file", Everyone, WALLED, ["openat"], |held| {
        let flags = libc::O_CREAT | libc::O_WRONLY;
        let there = open(&held.path("new"), flags);
        there.or_else(|_| open(c"/new", flags))
    };
    "make a directory", Everyone, WALLED, ["mkdirat"], |held| {
        let there = call!(SYS_mkdirat, libc::AT_FDCWD, held.path("dir").as_ptr(), 0o700);
        there.or_else(|_| call!(SYS_mkdirat, libc::AT_FDCWD, c"/dir".as_ptr(), 0o700))
    };
    "make a symbolic link", Everyone, WALLED, ["symlinkat"], |held| {
        let (at, name) = (libc::AT_FDCWD, held.path("made"));
        call!(SYS_symlinkat, c"/etc".as_ptr(), at, name.as_ptr())
    };
    "make a device node", Root, WALLED, ["mknodat"], |held| {
        let (kind, null) = (libc::S_IFCHR | 0o666, libc::makedev(1, 3));
        let there = call!(SYS_mknodat, libc::AT_FDCWD, held.path("null").as_ptr(), kind, null);
        there.or_else(|_| call!(SYS_mknodat, libc::AT_FDCWD, c"/null".as_ptr(), kind, null))
    };
    "remove another VM's state", Everyone, WALLED, ["unlinkat"], |held| {
        let name = held.path("spare");
        call!(SYS_unlinkat, libc::AT_FDCWD, name.as_ptr(), 0)
    };
    "chdir to /etc", Everyone, WALLED, ["chdir"], |_| call!(SYS_chdir, c"/etc".as_ptr());
    "fchdir to a stray directory", Everyone, WALLED, ["fchdir"],
        |held| call!(SYS_fchdir, held.directory.as_raw_fd());
    "stat /etc/passwd", Everyone, WALLED, ["newfstatat"], |_| {
        let mut about = MaybeUninit::<libc::stat>::uninit();
        let path = c"/etc/passwd".as_ptr();
        call!(SYS_newfstatat, libc::AT_FDCWD, path, about.as_mut_ptr(), 0)
    };
    "open by a file handle", Untried, WALLED, ["name_to_handle_at"], |held| {
        let mut handle = [128u32; 40];
        let (mut mount, path) = (0, held.path("secret"));
        call!(
            SYS_name_to_handle_at, libc::AT_FDCWD, path.as_ptr(), handle.as_mut_ptr(),
            &raw mut mount, 0
        )
    };
    "watch files by inotify", Everyone, WALLED, ["inotify_init1"], |_| {
        let fd = call!(SYS_inotify_init1, 0)?;
        call!(SYS_inotify_add_watch, fd, c"/etc/passwd".as_ptr(), libc::IN_OPEN)
    };
    "watch files by fanotify", Root, WALLED, ["fanotify_init"],
        |_| call!(SYS_fanotify_init, libc::FAN_CLASS_CONTENT, libc::O_RDONLY);
    "fill the disk", Everyone, WALLED, ["lseek"], |held| {
        call!(SYS_lseek, held.disk.as_raw_fd(), 64 * DISK_MAX, libc::SEEK_SET)?;
        call!(SYS_write, held.disk.as_raw_fd(), b"x".as_ptr(), 1)
    };
    "fill the disk at a position", Everyone, WALLED, ["pwrite64"], |held| {
        call!(SYS_pwrite64, held.disk.as_raw_fd(), b"x".as_ptr(), 1, 64 * DISK_MAX)
    };
    "fill the disk by allocation", Everyone, WALLED, ["fallocate"], |held| allocate(held, 0);
    // No limit of size holds these, so it is the filter alone that does.
    "fill the disk beyond its end", Everyone, FILTERED, ["fallocate"],
        |held| allocate(held, libc::FALLOC_FL_KEEP_SIZE);
    "fill the disk by zeroes", Everyone, WALLED, ["fallocate"],
        |held| allocate(held, libc::FALLOC_FL_ZERO_RANGE);
    "fill the disk by zeroes beyond its end", Everyone, FILTERED, ["fallocate"],
        |held| allocate(held, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE);
    "fill the disk by a hole inserted", Untried, WALLED, ["fallocate"],
        |held| allocate(held, libc::FALLOC_FL_INSERT_RANGE);
    "fill the disk by extents unshared", Untried, WALLED, ["fallocate"],
        |held| allocate(held, libc::FALLOC_FL_UNSHARE_RANGE);
    "fill the disk by extents unshared beyond its end", Untried, FILTERED, ["fallocate"],
        |held| allocate(held, libc::FALLOC_FL_UNSHARE_RANGE | libc::FALLOC_FL_KEEP_SIZE);
    "fill the disk by truncation", Everyone, WALLED, ["ftruncate"],
        |held| call!(SYS_ftruncate, held.disk.as_raw_fd(), 128 * DISK_MAX);
    "fill the disk by its ring", Everyone, WALLED, ["io_uring_enter"],
        |held| allocate_by_ring(held, 0);
    "fill the disk beyond its end by its ring", Everyone, WALLED, ["io_uring_enter"],
        |held| allocate_by_ring(held, libc::FALLOC_FL_KEEP_SIZE);
    "fill the disk by zeroes by its ring", Everyone, WALLED, ["io_uring_enter"],
        |held| allocate_by_ring(held, libc::FALLOC_FL_ZERO_RANGE);
    "fill the disk by zeroes beyond its end by its ring", Everyone, WALLED, ["io_uring_enter"],
        |held| allocate_by_ring(held, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE);
    "write beyond the disk's end by its ring", Everyone, WALLED, ["io_uring_enter"], |held| {
        let write = opcode::Write::new(types::Fixed(0), b"x".as_ptr(), 1);
        ring(held, &write.offset(64 * DISK_MAX).build())
    };
    "lock another's disk", Everyone, FILTERED, ["flock"],
        |held| call!(SYS_flock, held.disk.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB);
    "ask for disk quotas", Untried, WALLED, ["quotactl"],
        |_| call!(SYS_quotactl, 0x800007 << 8, c"/dev/root".as_ptr(), 0, ptr::null::<u8>());
    "swap to a file", Untried, WALLED, ["swapon"],
        |held| call!(SYS_swapon, held.path("secret").as_ptr(), 0);

    // Sockets.
    "make a TCP socket", Everyone, FILTERED, ["socket"],
        |_| call!(SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0);
    "make a netlink socket", Everyone, FILTERED, ["socket"],
        |_| call!(SYS_socket, libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
    "make a raw socket", Root, WALLED, ["socket"],
        |_| call!(SYS_socket, libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP);
    "make a packet socket", Root, WALLED, ["socket"],
        |_| call!(SYS_socket, libc::AF_PACKET, libc::SOCK_RAW, 0);
    "make a vsock socket and connect", Untried, WALLED, ["socket"], |_| {
        let fd = call!(SYS_socket, libc::AF_VSOCK, libc::SOCK_STREAM, 0)?;
        let address = [libc::AF_VSOCK as u32, 1024, libc::VMADDR_CID_HOST, 0];
        call!(SYS_connect, fd, address.as_ptr(), 16)
    };
    "make a pair of sockets", Everyone, FILTERED, ["socketpair"], |_| {
        let mut pair = [0; 2];
        call!(SYS_socketpair, libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr())
    };
    "connect to the host's TCP port", Everyone, WALLED, ["connect"],
        |held| connect(held.own[TCP].as_raw_fd(), &loopback(held.port));
    // These two are Landlock's alone, from its fourth version on.
    "connect by a socket of the host", Everyone, FILTERED, ["connect"],
        |held| connect(held.tcp.as_raw_fd(), &loopback(held.port));
    "bind a TCP port of the host", Everyone, FILTERED, ["bind"], |held| {
        let address = loopback(0);
        call!(SYS_bind, held.tcp.as_raw_fd(), address.as_ptr(), address.len())
    };
    "connect to a control socket", Everyone, WALLED, ["connect"], |held| {
        let path = held.path("control.sock");
        connect(held.own[STREAM].as_raw_fd(), &unix_address(path.as_bytes_with_nul()))
    };
    "connect to an abstract socket", Everyone, WALLED, ["connect"], |held| {
        let name = format!("\0{}", held.abstract_names[0]);
        connect(held.own[STREAM].as_raw_fd(), &unix_address(name.as_bytes()))
    };
    "send to an abstract socket", Everyone, WALLED, ["sendto"], |held| {
        let address = unix_address(format!("\0{}", held.abstract_names[1]).as_bytes());
        let fd = held.own[DATAGRAM].as_raw_fd();
        call!(SYS_sendto, fd, b"x".as_ptr(), 1, 0, address.as_ptr(), address.len())
    };
    "send a message to an abstract socket", Everyone, WALLED, ["sendmsg"], |held| {
        let mut address = unix_address(format!("\0{}", held.abstract_names[1]).as_bytes());
        // SAFETY: all zeroes are a value of it.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_name = address.as_mut_ptr().cast();
        message.msg_namelen = address.len() as u32;
        call!(SYS_sendmsg, held.own[DATAGRAM].as_raw_fd(), &raw const message, 0)
    };
    "listen at a path", Everyone, WALLED, ["bind"], |held| {
        let address = unix_address(held.path("mine").as_bytes_with_nul());
        call!(SYS_bind, held.own[STREAM].as_raw_fd(), address.as_ptr(), address.len())
    };
    "bring loopback up", Root, WALLED, ["ioctl"], |held| {
        // SAFETY: all zeroes are a value of it.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        call!(SYS_ioctl, held.tcp.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)
    };

    // Processes.
    "run a program", Everyone, WALLED, ["execve"], |_| {
        let (none, path) = (ptr::null::<u8>(), c"/bin/true".as_ptr());
        let arguments = [path.cast(), none];
        call!(SYS_execve, path, arguments.as_ptr(), [none].as_ptr())
    };
    "run a program that is held", Everyone, WALLED, ["execveat"], |held| {
        let (none, empty) = (ptr::null::<u8>(), c"".as_ptr());
        let (arguments, environment) = ([empty.cast(), none], [none]);
        let (argv, envp) = (arguments.as_ptr(), environment.as_ptr());
        let fd = held.program.as_raw_fd();
        call!(SYS_execveat, fd, empty, argv, envp, libc::AT_EMPTY_PATH)
    };
    "fork", Everyone, FILTERED, ["fork"], |_| born(call!(SYS_fork));
    "clone a process", Everyone, FILTERED, ["clone"],
        |_| born(call!(SYS_clone, libc::SIGCHLD, 0usize, 0usize, 0usize, 0usize));
    "clone3 a process", Everyone, FILTERED, ["clone3"], |_| {
        let mut arguments = [0u64; 8];
        arguments[4] = libc::SIGCHLD as u64;
        born(call!(SYS_clone3, arguments.as_ptr(), 64))
    };
    "vfork", Untried, FILTERED, ["vfork"], |_| born(call!(SYS_vfork));
    "fork bomb", Everyone, FILTERED, ["fork"], |_| {
        (0..64).try_for_each(|_| born(call!(SYS_fork)))
    };
    "clone into namespaces", Everyone, WALLED, ["clone"], |_| {
        let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::SIGCHLD;
        born(call!(SYS_clone, flags, 0usize, 0usize, 0usize, 0usize))
    };
    "unshare namespaces", Everyone, WALLED, ["unshare"],
        |_| call!(SYS_unshare, libc::CLONE_NEWUSER);
    "enter the host's namespace", Root, WALLED, ["openat"], |_| {
        let fd = open(c"/proc/self/ns/net", libc::O_RDONLY)?;
        call!(SYS_setns, fd, libc::CLONE_NEWNET)
    };
    "setns to a process", Untried, WALLED, ["pidfd_open"], |held| {
        let fd = call!(SYS_pidfd_open, held.supervisor, 0)?;
        call!(SYS_setns, fd, libc::CLONE_NEWNET)
    };
    "signal the supervisor", Everyone, WALLED, ["kill"], |held| call!(SYS_kill, held.supervisor, 0);
    "signal the supervisor by its thread", Everyone, WALLED, ["tgkill"],
        |held| call!(SYS_tgkill, held.supervisor, held.supervisor, 0);
    "signal everybody", Everyone, WALLED, ["kill"], |_| call!(SYS_kill, -1, 0);
    "trace the supervisor", Untried, WALLED, ["ptrace"],
        |held| call!(SYS_ptrace, libc::PTRACE_SEIZE, held.supervisor, 0, 0);
    "let the supervisor be traced by this", Everyone, FILTERED, ["ptrace"],
        |_| call!(SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0);
    "read the supervisor's memory", Root, WALLED, ["process_vm_readv"], |held| {
        let mut bytes = [0u8; 8];
        let local = [bytes.as_mut_ptr() as usize, 8];
        // The supervisor is this process's twin: what is here is there, too.
        let remote = [PLACE.as_ptr() as usize, 8];
        call!(SYS_process_vm_readv, held.supervisor, local.as_ptr(), 1, remote.as_ptr(), 1, 0)
    };
    "take the supervisor's descriptors", Root, WALLED, ["pidfd_open"], |held| {
        let fd = call!(SYS_pidfd_open, held.supervisor, 0)?;
        call!(SYS_pidfd_getfd, fd, 0, 0)
    };
    "look for the supervisor", Everyone, WALLED, ["getpgid"], |held| call!(SYS_getpgid, held.supervisor);
    "choose the supervisor's CPUs", Everyone, WALLED, ["sched_setaffinity"], |held| {
        let all = [u64::MAX; 16];
        call!(SYS_sched_setaffinity, held.supervisor, 128, all.as_ptr())
    };
    "become a real-time process", Root, WALLED, ["sched_setscheduler"],
        |_| call!(SYS_sched_setscheduler, 0, libc::SCHED_FIFO, &raw const ONE);
    "raise its own priority", Root, WALLED, ["setpriority"],
        |_| call!(SYS_setpriority, libc::PRIO_PROCESS, 0, -10);
    "compare with the supervisor", Untried, WALLED, ["kcmp"],
        |held| call!(SYS_kcmp, held.supervisor, 1, 0, 0, 0);

    // Memory.
    "map executable memory", Everyone, FILTERED, ["mmap"],
        |_| page(READ_WRITE | libc::PROT_EXEC);
    "make memory executable", Everyone, FILTERED, ["mprotect"], |_| {
        let place = page(READ_WRITE)?;
        call!(SYS_mprotect, place, PAGE, libc::PROT_READ | libc::PROT_EXEC)
    };
    "make memory executable by a key", Everyone, FILTERED, ["pkey_mprotect"], |_| {
        let place = page(READ_WRITE)?;
        call!(SYS_pkey_mprotect, place, PAGE, libc::PROT_READ | libc::PROT_EXEC, -1)
    };
    "make code writable", Everyone, FILTERED, ["mprotect"], |_| {
        let code = (done::<()> as *const () as usize) & !(PAGE - 1);
        call!(SYS_mprotect, code, PAGE, READ_WRITE | libc::PROT_EXEC)
    };
    "map a file", Everyone, FILTERED, ["mmap"], |held| {
        let fd = held.disk.as_raw_fd();
        call!(SYS_mmap, 0usize, PAGE, READ_WRITE, libc::MAP_SHARED, fd, 0)
    };
    "executable by personality", Everyone, FILTERED, ["personality"],
        |_| call!(SYS_personality, 0x0040_0000); // READ_IMPLIES_EXEC
    "memory bomb", Everyone, WALLED, [], |_| {
        // Some of this is allowed: what there is to have has an end.
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        call!(SYS_mmap, 0usize, 2 * MEMORY_MAX, READ_WRITE, flags, -1, 0)
    };
    "memory bomb in pieces", Everyone, WALLED, [], |_| {
        (0..2 * MEMORY_MAX as usize / PAGE).try_for_each(|_| done(page(READ_WRITE)))
    };
    "memory that outlives a process", Everyone, FILTERED, ["shmget"],
        |_| call!(SYS_shmget, libc::IPC_PRIVATE, PAGE, libc::IPC_CREAT | 0o600);
    "a queue of messages", Everyone, WALLED, ["mq_open"], |_| {
        let flags = libc::O_CREAT | libc::O_RDWR;
        let queue = call!(SYS_mq_open, c"mayfly-breakout".as_ptr(), flags, 0o600, 0usize)?;
        call!(SYS_mq_unlink, c"mayfly-breakout".as_ptr())?;
        Ok(queue)
    };
    "memory that faults to a program", Root, WALLED, ["userfaultfd"],
        |_| call!(SYS_userfaultfd, 0);
    "lock memory", Untried, FILTERED, ["mlockall"], |_| call!(SYS_mlockall, libc::MCL_CURRENT);
    "memory without a file system", Everyone, FILTERED, ["memfd_create"],
        |_| call!(SYS_memfd_create, c"x".as_ptr(), 0);

    // The kernel's larger doors.
    "make another VM", Everyone, FILTERED, ["ioctl"], |held| {
        let fd = held.kvm.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        call!(SYS_ioctl, fd, KVM_CREATE_VM, 0)
    };
    "type into the terminal", Root, WALLED, ["ioctl"], |held| {
        let fd = held.terminal.as_raw_fd();
        call!(SYS_ioctl, fd, libc::TIOCSTI, c"x".as_ptr())
    };
    "set up io_uring", Everyone, FILTERED, ["io_uring_setup"], |_| {
        let mut parameters = [0u32; 30];
        call!(SYS_io_uring_setup, 4, parameters.as_mut_ptr())
    };
    "open a file by a disk's ring", Everyone, WALLED, ["io_uring_enter"], |held| {
        let nowhere = types::Fd(libc::AT_FDCWD);
        ring(held, &opcode::OpenAt::new(nowhere, c"/etc/passwd".as_ptr()).build())
    };
    "make a socket by a disk's ring", Everyone, WALLED, ["io_uring_enter"],
        |held| ring(held, &opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build());
    "use a descriptor by a disk's ring", Everyone, WALLED, ["io_uring_enter"], |held| {
        let control = types::Fd(held.control.0.as_raw_fd());
        ring(held, &opcode::Write::new(control, b"x".as_ptr(), 1).build())
    };
    "load a program into the kernel", Root, WALLED, ["bpf"], |_| {
        // BPF_MAP_CREATE of an array.
        let attributes = [2u32, 4, 8, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        call!(SYS_bpf, 0, attributes.as_ptr(), 72)
    };
    "measure the host", Root, WALLED, ["perf_event_open"], |_| {
        // PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK, of a CPU.
        let mut attributes = [0u64; 16];
        attributes[0] = 1 | 128 << 32;
        call!(SYS_perf_event_open, attributes.as_ptr(), -1, 0, -1, 0)
    };
    "add a key", Everyone, FILTERED, ["add_key"], |_| {
        let (kind, name) = (c"user".as_ptr(), c"mayfly-breakout".as_ptr());
        call!(SYS_add_key, kind, name, b"x".as_ptr(), 1, libc::KEY_SPEC_PROCESS_KEYRING)
    };
    "look for keys", Everyone, FILTERED, ["keyctl"],
        |_| call!(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEYRING_OF_USER, 1);
    "load a module", Untried, WALLED, ["init_module"],
        |_| call!(SYS_init_module, b"x".as_ptr(), 1, c"".as_ptr());
    "load another kernel", Untried, WALLED, ["kexec_load"],
        |_| call!(SYS_kexec_load, 0, 0, 0usize, 0);
    "restart the host", Untried, WALLED, ["reboot"], |_| {
        let (one, two) = (libc::LINUX_REBOOT_MAGIC1, libc::LINUX_REBOOT_MAGIC2);
        // Ctrl-Alt-Del: the least of what it can do.
        call!(SYS_reboot, one, two, libc::LINUX_REBOOT_CMD_CAD_OFF, 0)
    };
    "read the kernel's log", Root, WALLED, ["syslog"], |_| {
        const SYSLOG_ACTION_READ_ALL: i32 = 3;
        let mut log = [0u8; 256];
        call!(SYS_syslog, SYSLOG_ACTION_READ_ALL, log.as_mut_ptr(), log.len())
    };
    "set the clock", Root, WALLED, ["clock_adjtime"], |_| {
        // SAFETY: all zeroes are a value of it.
        let mut how: libc::timex = unsafe { std::mem::zeroed() };
        call!(SYS_clock_adjtime, libc::CLOCK_REALTIME, &raw mut how)?;
        how.modes = libc::ADJ_TICK;
        call!(SYS_clock_adjtime, libc::CLOCK_REALTIME, &raw mut how)
    };
    "set the time of day", Untried, WALLED, ["settimeofday"],
        |_| call!(SYS_settimeofday, [0u64; 2].as_ptr(), 0usize);
    "set the host's name", Root, WALLED, ["sethostname"], |held| {
        let name = held.host_name.trim();
        call!(SYS_sethostname, name.as_ptr(), name.len())
    };
    "use ports", Untried, WALLED, ["iopl"], |_| call!(SYS_iopl, 3);
    "use a port", Untried, WALLED, ["ioperm"], |_| call!(SYS_ioperm, 0x80, 1, 1);
    "change its segments", Everyone, FILTERED, ["modify_ldt"], |_| {
        let entry = [0u32, 0, 0xfffff, 0b101_0001];
        call!(SYS_modify_ldt, 1, entry.as_ptr(), 16)
    };
    "the 32-bit system calls", Everyone, FILTERED, [], |_| int80(GETPID_32);
    "the x32 system calls", Untried, FILTERED, ["unknown"], |_| {
        const X32: i64 = 0x4000_0000;
        // SAFETY: touches no memory.
        check(unsafe { libc::syscall(X32 + libc::SYS_getpid) })
    };
    "mount", Root, WALLED, ["mount"], |held| {
        let (kind, place) = (c"tmpfs".as_ptr(), held.folder_path());
        call!(SYS_mount, kind, place.as_ptr(), kind, 0, 0usize)?;
        call!(SYS_umount2, place.as_ptr(), libc::MNT_DETACH)
    };
    "mount on its root", Untried, WALLED, ["mount"], |_| {
        let kind = c"tmpfs".as_ptr();
        call!(SYS_mount, kind, c"/".as_ptr(), kind, 0, 0usize)
    };
    "mount by the newer calls", Root, WALLED, ["fsopen"],
        |_| call!(SYS_fsopen, c"tmpfs".as_ptr(), 0);
    "make its root writable", Untried, WALLED, ["mount"], |_| {
        let (none, flags) = (ptr::null::<u8>(), libc::MS_REMOUNT | libc::MS_BIND);
        call!(SYS_mount, none, c"/".as_ptr(), none, flags, 0usize)
    };
    "unmount its root", Untried, WALLED, ["umount2"],
        |_| call!(SYS_umount2, c"/".as_ptr(), libc::MNT_DETACH);
    "pivot its root", Untried, WALLED, ["pivot_root"],
        |_| call!(SYS_pivot_root, c".".as_ptr(), c".".as_ptr());
    "change its root", Root, WALLED, ["chroot"], |held| {
        let there = call!(SYS_chroot, held.folder_path().as_ptr());
        there.or_else(|_| call!(SYS_chroot, c"/".as_ptr()))
    };

    // What it is.
    "become another user", Root, WALLED, ["setuid"], |_| call!(SYS_setuid, 12345);
    "become another group", Root, WALLED, ["setgid"], |_| call!(SYS_setgid, 12345);
    "join a group", Root, WALLED, ["setgroups"],
        |_| call!(SYS_setgroups, 1usize, [12345u32].as_ptr());
    "take capabilities", Root, WALLED, ["capset"], |_| {
        let header = [0x2008_0522u32, 0];
        let sets = [1u32 << 21, 1 << 21, 0, 0, 0, 0]; // CAP_SYS_ADMIN
        call!(SYS_capset, header.as_ptr(), sets.as_ptr())
    };
    "be dumped", Everyone, FILTERED, ["prctl"], |_| call!(SYS_prctl, libc::PR_SET_DUMPABLE, 1);
    "outlive the supervisor", Everyone, FILTERED, ["prctl"],
        |_| call!(SYS_prctl, libc::PR_SET_PDEATHSIG, 0, 0, 0, 0);
    "allow new privileges", Untried, WALLED, ["prctl"],
        |_| call!(SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0);
    "keep capabilities", Everyone, WALLED, ["prctl"],
        |_| call!(SYS_prctl, libc::PR_SET_KEEPCAPS, 1, 0, 0, 0);
    "change its filter", Everyone, FILTERED, ["seccomp"], |_| {
        let allow = [0x7fff_0000_0000_0006u64]; // return SECCOMP_RET_ALLOW
        let program = [1usize, allow.as_ptr() as usize];
        let set = || call!(SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, program.as_ptr());
        // Ordinary users must have given this up before.
        set().or_else(|_| {
            call!(SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)?;
            set()
        })
    };
    "handle violations itself", Everyone, FILTERED, ["rt_sigaction"], |_| {
        let ignore = [libc::SIG_IGN, 0, 0, 0];
        call!(SYS_rt_sigaction, libc::SIGSYS, ignore.as_ptr(), 0usize, 8)
    };
    "raise its limits", Everyone, WALLED, ["prlimit64"], |_| {
        let all = [libc::RLIM_INFINITY; 2];
        call!(SYS_prlimit64, 0, libc::RLIMIT_FSIZE, all.as_ptr(), 0usize)
    };
    "look at the supervisor's limits", Everyone, WALLED, ["prlimit64"], |held| {
        let mut limit = [0u64; 2];
        let supervisor = held.supervisor;
        call!(SYS_prlimit64, supervisor, libc::RLIMIT_NOFILE, 0usize, limit.as_mut_ptr())
    };
    "read the supervisor's memory by /proc", Everyone, WALLED, ["openat"], |held| {
        let path = format!("/proc/{}/maps\0", held.supervisor);
        let path = CStr::from_bytes_with_nul(path.as_bytes()).map_err(io::Error::other)?;
        open(path, libc::O_RDONLY)
    };
    "see its own descriptors", Everyone, WALLED, ["openat"],
        |_| open(c"/proc/self/fd", libc::O_DIRECTORY);
}

/// Allocates more than the disk may have, in one of the modes of `fallocate`.
fn allocate(held: &Held, mode: libc::c_int) -> io::Result<i64> {
    call!(
        SYS_fallocate,
        held.disk.as_raw_fd(),
        mode,
        0,
        128 * DISK_MAX
    )
}

/// The same by the disk's ring.
fn allocate_by_ring(held: &Held, mode: libc::c_int) -> io::Result<()> {
    let allocate = opcode::Fallocate::new(types::Fixed(0), 128 * DISK_MAX);
    ring(held, &allocate.mode(mode).build())
}

/// Something that the supervisor has at the same place.
static PLACE: [u8; 8] = [1; 8];
/// A priority.
static ONE: i32 = 1;

/// Has a disk's ring do something.
fn ring(held: &Held, entry: &io_uring::squeue::Entry) -> io::Result<()> {
    let ring = held.ring.as_ref().ok_or(io::ErrorKind::NotFound)?;
    // SAFETY: nobody else uses the ring, and what the entry points to is constant.
    unsafe { ring.submission_shared().push(entry) }.map_err(io::Error::other)?;
    let fd = ring.as_raw_fd();
    const GETEVENTS: u32 = 1;
    call!(SYS_io_uring_enter, fd, 1, 1, GETEVENTS, 0usize, 0usize)?;
    // SAFETY: as above.
    let completion = unsafe { ring.completion_shared() }.next();
    match completion.map_or(-libc::EIO, |it| it.result()) {
        0.. => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}
