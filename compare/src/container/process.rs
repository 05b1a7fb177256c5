//! What a container's process is: its place, its rights, its program.

#![allow(unsafe_code, reason = "namespaces, signals, exec")]

use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use mayfly_sandbox::credentials::{self, Ids};
use mayfly_sandbox::seccomp;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::setsid;

use super::spec::Spec;
use crate::capabilities;
use crate::error::{Context, Error};

/// The command cannot be run, as Docker and shells say it …
const CANNOT_RUN: u8 = 126;
/// … or it is not there.
const NOT_FOUND: u8 = 127;

/// `IFF_UP`, as wide as the flags of a device.
const IFF_UP: libc::c_short = 1;

/// Where programs are looked for without a `PATH`: `execvp(3)`'s default.
const PATH: &str = "/bin:/usr/bin";

/// The number of interpreters of interpreters that the kernel follows (`exec_binprm`), …
const INTERPRETERS: usize = 6;
/// … and the bytes that it reads of each (`BINPRM_BUF_SIZE`).
const INTERPRETER_MAX: u64 = 256;

/// Those of Docker's default.
const CAPABILITIES: [&str; 14] = [
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "net_bind_service",
    "net_raw",
    "sys_chroot",
    "mknod",
    "audit_write",
    "setfcap",
];

/// The system calls of Docker's default …
const FILTER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/docker.bpf"));
/// … and the one that it says does not exist.
const CLONE3: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/docker-clone3.bpf"));

pub(super) fn check(result: libc::c_long) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Moves this process to new namespaces.
pub fn unshare(namespaces: libc::c_int) -> io::Result<()> {
    // SAFETY: a number.
    check(unsafe { libc::unshare(namespaces) }.into())
}

/// Moves this process, which has one thread, to a user namespace.
pub fn enter_user_namespace(namespace: BorrowedFd) -> io::Result<()> {
    // SAFETY: numbers.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWUSER) }.into())
}

/// What needs no user yet: a session, a name and a network of its own.
pub fn isolate(spec: &Spec) -> Result<(), Error> {
    setsid().or_internal("a session")?;
    let (name, len) = (spec.hostname.as_ptr(), spec.hostname.len());
    // SAFETY: the buffer has that number of bytes.
    check(unsafe { libc::sethostname(name.cast(), len) }.into()).or_invalid("hostname")?;
    loopback().or_host("the loopback device")
}

/// Turns the loopback device on, which gives it its addresses.
fn loopback() -> io::Result<()> {
    // SAFETY: numbers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd.into())?;
    // SAFETY: it is new, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zeroes are a value of it.
    let mut device: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in device.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    device.ifr_ifru.ifru_flags = IFF_UP;
    let number = socket.as_raw_fd();
    // SAFETY: reads a live structure.
    check(unsafe { libc::ioctl(number, libc::SIOCSIFFLAGS, &raw const device) }.into())
}

/// Takes from this process what Docker's default does. It gets what is left of root's
/// capabilities, if any, by executing a program. It may gain privileges by programs that
/// give some, as with Docker.
pub fn confine(spec: &Spec, launcher: &impl AsFd) -> Result<(), Error> {
    credentials::bound_capabilities(capabilities::set(&CAPABILITIES))
        .or_internal("capabilities")?;
    // These want a capability that goes with the user.
    seccomp::install(CLONE3).or_host("seccomp")?;
    seccomp::install(FILTER).or_host("seccomp")?;
    let (uid, gid) = (spec.uid, spec.gid);
    credentials::set_user(Ids { uid, gid }).or_host(format_args!(
        "user {uid} and group {gid}, which may not exist inside"
    ))?;
    // Another user's has been forgotten.
    credentials::die_with_parent().or_internal("its life")?;
    alive(launcher).or_host("the launcher ended")?;
    default_signals().or_internal("signals")
}

/// Fails if nobody has the other end of a pipe any more.
fn alive(pipe: &impl AsFd) -> io::Result<()> {
    let mut entry = [PollFd::new(pipe, PollFlags::empty())];
    match poll(&mut entry, Some(&Timespec::default()))? {
        0 => Ok(()),
        _ => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

/// As a program expects it: nothing ignored, nothing blocked.
fn default_signals() -> io::Result<()> {
    // The caller's choice, and Rust's own of SIGPIPE, would be inherited.
    for signal in 1..=libc::SIGSYS {
        // SAFETY: no handler is installed. Those that cannot change stay.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: fills in the set.
    unsafe { libc::sigemptyset(none.as_mut_ptr()) };
    // SAFETY: the set was filled in.
    let result =
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut()) };
    check(result.into())
}

/// Whether a program, or what interprets it, is this one, by a link like `/proc/self/exe`.
/// With the image's libraries it would be the image's to command, and could hold on to the
/// host's file, to write to it when nobody runs it any more (CVE-2019-5736).
fn leads_to_us(program: &CStr) -> bool {
    let Ok(ours) = fs::metadata("/proc/self/exe") else {
        return false;
    };
    let mut path = PathBuf::from(OsStr::from_bytes(program.to_bytes()));
    for _ in 0..INTERPRETERS {
        let Ok(about) = fs::metadata(&path) else {
            return false;
        };
        if (about.dev(), about.ino()) == (ours.dev(), ours.ino()) {
            return true;
        }
        let mut start = Vec::new();
        // Of a special file, nothing is asked.
        if !about.is_file() {
            return false;
        }
        let read =
            File::open(&path).and_then(|it| it.take(INTERPRETER_MAX).read_to_end(&mut start));
        if read.is_err() {
            return false;
        }
        let Some(line) = start.strip_prefix(b"#!") else {
            return false;
        };
        let line = line.trim_ascii_start();
        let end = line
            .iter()
            .position(|byte| byte.is_ascii_whitespace() || *byte == 0);
        path = OsStr::from_bytes(line.get(..end.unwrap_or(line.len())).unwrap_or(line)).into();
    }
    // More than the kernel follows.
    false
}

/// A command's words, as the kernel takes them.
pub struct Words {
    programs: Vec<CString>,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Words {
    pub fn of(spec: &Spec) -> Result<Self, Error> {
        let all = |words: &[String]| {
            let words = words.iter().map(|word| CString::new(word.as_str()));
            words.collect::<Result<Vec<_>, _>>()
        };
        let path = spec.env.iter().find_map(|it| it.strip_prefix("PATH="));
        let programs = match spec.args.first() {
            Some(name) if !name.contains('/') => {
                let directories = path.unwrap_or(PATH).split(':');
                let directories = directories.map(|it| if it.is_empty() { "." } else { it });
                directories
                    .map(|directory| format!("{directory}/{name}"))
                    .collect()
            }
            name => Vec::from_iter(name.cloned()),
        };
        Ok(Words {
            programs: all(&programs).or_invalid("args")?,
            args: all(&spec.args).or_invalid("args")?,
            env: all(&spec.env).or_invalid("env")?,
        })
    }

    /// Executes it, or returns a status and why not.
    pub fn execute(&self) -> (u8, io::Error) {
        if self.programs.iter().any(|program| leads_to_us(program)) {
            return (CANNOT_RUN, io::ErrorKind::PermissionDenied.into());
        }
        let list = |words: &[CString]| {
            let words = words.iter().map(|word| word.as_ptr());
            words.chain([std::ptr::null()]).collect::<Vec<_>>()
        };
        let (args, env) = (list(&self.args), list(&self.env));
        let mut found = None;
        for program in &self.programs {
            let program: &CStr = program;
            // SAFETY: strings that end in zero, in lists that do.
            unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR) => {}
                // Another directory may have one that can be run.
                Some(libc::EACCES) => found = Some(error),
                _ => return (CANNOT_RUN, error),
            }
        }
        match found {
            Some(error) => (CANNOT_RUN, error),
            None => (NOT_FOUND, io::ErrorKind::NotFound.into()),
        }
    }
}
