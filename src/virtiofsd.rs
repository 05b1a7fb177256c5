//! virtiofsd: a process beside the VM that serves a folder of the host to the
//! guest, over vhost-user.
//!
//! It sees nothing but that folder, from namespaces of its own. For an ordinary
//! user these begin with one of users, in which the user is root: so the guest's
//! root owns what the user owns, and nothing else. A folder that is only to be read
//! is mounted so in there, whatever the guest or virtiofsd wish.

#![allow(unsafe_code, reason = "what runs between fork and exec")]

use std::ffi::{CString, OsString};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mayfly_devices::virtio::fs::{BackendError, Frontend};

use crate::config::FolderConfig;
use crate::failure::{Failure, OrFail};
use crate::helper::{self, Chatter, Helper, Ready, find_program, inherit};
use crate::machine::StartSignals;
use crate::unix_socket;

const PROGRAM: &str = "virtiofsd";
/// Where else it is: Debian's, others', cargo's, and that of Debian 12's QEMU.
const PLACES: [&str; 4] = [
    "/usr/libexec/virtiofsd",
    "/usr/lib/virtiofsd",
    "~/.cargo/bin/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
];
const MISSING: &str = "needs virtiofsd, which is not installed: apt install virtiofsd \
                       (Debian 12: apt install qemu-system-common)";
const NO_NAMESPACES: &str = "virtiofsd's sandbox needs namespaces, which this host does not let you \
                             make; see the sysctls kernel.unprivileged_userns_clone and \
                             kernel.apparmor_restrict_unprivileged_userns";
/// It starts in this time, or not at all.
const PATIENCE: Duration = Duration::from_secs(10);
/// What it says when all is well, and when the VM ends.
const CHATTER: Chatter = &["virtio_loop: Unexpected poll revents"];

/// A virtiofsd that starts.
pub struct Starting {
    flag: String,
    tag: String,
    socket: UnixStream,
    helper: Helper,
}

/// A folder that is served.
pub struct Served {
    /// What asked for it.
    pub flag: String,
    /// What the guest knows it by.
    pub tag: String,
    /// The device's way to who serves it.
    pub frontend: Frontend,
}

/// Its makes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Make {
    /// The one in Rust.
    Rust,
    /// Its predecessor, of QEMU.
    Qemu,
}

/// Starts one for a folder; [`Starting::ready`] waits for it.
pub fn start(config: &FolderConfig, signals: &StartSignals) -> Result<Starting, Failure> {
    let flag = config.flag.clone();
    let program = find().ok_or_else(|| Failure::host(format!("{flag}: {MISSING}")))?;
    let what = format!("{flag}: {}", program.display());
    let make = make(&program, &what, signals)?;
    let (socket, listener) = connected().or_host(&what)?;
    // SAFETY: have no preconditions.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    let plain = user != 0;
    let sandbox = Sandbox {
        listener,
        maps: plain.then(|| (format!("0 {user} 1"), format!("0 {group} 1"))),
        keeps_groups: plain && make == Make::Qemu,
        read_only: match config.read_only {
            true => Some(CString::new(config.path.as_os_str().as_bytes()).or_config(&what)?),
            false => None,
        },
        // SAFETY: has no preconditions.
        parent: unsafe { libc::getpid() },
    };
    let mut command = Command::new(&program);
    command
        .args(arguments(make, config, sandbox.listener.as_raw_fd()))
        .current_dir("/");
    if plain {
        // It may not have more than the user has.
        command.arg("--rlimit-nofile=0");
    }
    // SAFETY: what runs between fork and exec are system calls, and allocates
    // nothing.
    unsafe { command.pre_exec(move || sandbox.enter()) };
    let helper = Helper::spawn(PROGRAM, CHATTER, command).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => Failure::host(format!("{flag}: {NO_NAMESPACES}")),
        _ => Failure::host(format!("{what}: starting it: {error}")),
    })?;
    Ok(Starting {
        flag,
        tag: config.tag.clone(),
        socket,
        helper,
    })
}

impl Starting {
    /// Waits until it answers.
    pub fn ready(mut self, signals: &StartSignals) -> Result<(Served, Ready), Failure> {
        let what = format!("{}: {PROGRAM}", self.flag);
        let own = self.socket.try_clone().or_host(&what)?;
        let interrupt = Some(signals.as_fd());
        let frontend = match Frontend::greet(self.socket, PATIENCE, interrupt) {
            Ok(frontend) => frontend,
            Err(error @ BackendError::Interrupted) => {
                signals.check()?;
                return Err(error).or_host(&what);
            }
            Err(BackendError::Ended) => {
                return Err(Failure::host(format!(
                    "{what}: {}",
                    self.helper.complaint()
                )));
            }
            Err(error) => return Err(error).or_host(&what),
        };
        let needed_by = self.flag.clone();
        let served = Served {
            flag: self.flag,
            tag: self.tag,
            frontend,
        };
        Ok((served, Ready::new(self.helper, own, needed_by)))
    }
}

/// Where one is, if it is installed.
pub fn find() -> Option<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let place = |place: &str| match (place.strip_prefix("~/"), &home) {
        (None, _) => Some(PathBuf::from(place)),
        (Some(rest), Some(home)) => Some(home.join(rest)),
        (Some(_), None) => None,
    };
    find_program(PROGRAM).or_else(|| {
        let mut all = PLACES.into_iter().filter_map(place);
        all.find(|path| path.is_file())
    })
}

/// Both have the same name, and may be anywhere.
fn make(program: &Path, what: &str, signals: &StartSignals) -> Result<Make, Failure> {
    let mut command = Command::new(program);
    command.arg("--version");
    let said = helper::output(command, what, PATIENCE, signals)?;
    let said = String::from_utf8_lossy(&said);
    // QEMU's says nothing to an ordinary user, as it cannot give up its groups.
    Ok(
        match said.starts_with("virtiofsd ") && !said.contains("FUSE kernel interface") {
            true => Make::Rust,
            false => Make::Qemu,
        },
    )
}

/// A connection that waits at a listener without a name: both makes want to accept
/// one, and nobody else can come.
fn connected() -> io::Result<(UnixStream, OwnedFd)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("s");
    let listener = unix_socket::bind(&path)?;
    let socket = unix_socket::connect_blocking(&path)?;
    fs::remove_file(&path)?;
    Ok((socket, listener.into()))
}

fn arguments(make: Make, config: &FolderConfig, listener: RawFd) -> Vec<OsString> {
    let path = config.path.as_os_str().as_bytes();
    let with = |before: &str, path: &[u8], behind: &str| {
        OsString::from_vec([before.as_bytes(), path, behind.as_bytes()].concat())
    };
    let fd = format!("--fd={listener}").into();
    match make {
        Make::Rust => vec![
            fd,
            with("--shared-dir=", path, ""),
            "--sandbox=namespace".into(),
            "--log-level=error".into(),
        ],
        Make::Qemu => {
            // Of a list.
            let mut escaped = Vec::new();
            for &byte in path {
                escaped.extend(b"\\,".contains(&byte).then_some(b'\\'));
                escaped.push(byte);
            }
            let options = with("source=", &escaped, ",sandbox=namespace,log_level=err");
            vec![fd, "-f".into(), "-o".into(), options]
        }
    }
}

/// What surrounds it before it makes its own sandbox.
struct Sandbox {
    listener: OwnedFd,
    /// Who is root in there: the user, and the user's group.
    maps: Option<(String, String)>,
    /// QEMU's gives up all groups, which a user may not: then it keeps them.
    keeps_groups: bool,
    /// The folder, if it is not to be written to.
    read_only: Option<CString>,
    parent: libc::pid_t,
}

impl Sandbox {
    /// Runs between fork and exec.
    fn enter(&self) -> io::Result<()> {
        let mut spaces = 0;
        if self.maps.is_some() {
            spaces |= libc::CLONE_NEWUSER;
        }
        if self.read_only.is_some() {
            spaces |= libc::CLONE_NEWNS;
        }
        // SAFETY: numbers; this process has one thread.
        check(unsafe { libc::unshare(spaces) })?;
        if let Some((user, group)) = &self.maps {
            write(c"/proc/self/setgroups", "deny")?;
            write(c"/proc/self/uid_map", user)?;
            write(c"/proc/self/gid_map", group)?;
            raise_file_limit()?;
        }
        if let Some(folder) = &self.read_only {
            make_read_only(folder)?;
        }
        if self.keeps_groups {
            ignore_setgroups()?;
        }
        // It ends with the VM, and should have ended by itself then.
        // SAFETY: numbers.
        check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
        // SAFETY: has no preconditions.
        if unsafe { libc::getppid() } != self.parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        inherit(self.listener.as_raw_fd())
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn write(path: &std::ffi::CStr, text: &str) -> io::Result<()> {
    // SAFETY: a string that lives until the call returns.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    check(fd)?;
    // SAFETY: live bytes, as many as said.
    let written = unsafe { libc::write(fd, text.as_ptr().cast(), text.len()) };
    // The program that follows does not have it.
    match written {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// It keeps a descriptor for each file that the guest knows.
fn raise_file_limit() -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: fills a live structure.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: reads a live structure.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })
}

/// Makes a folder, and all that is mounted in it, read-only here.
fn make_read_only(folder: &CString) -> io::Result<()> {
    let mount = |source: *const libc::c_char, target: *const libc::c_char, flags| {
        // SAFETY: strings that live until the call returns, or none.
        check(unsafe { libc::mount(source, target, std::ptr::null(), flags, std::ptr::null()) })
    };
    mount(
        std::ptr::null(),
        c"/".as_ptr(),
        libc::MS_REC | libc::MS_PRIVATE,
    )?;
    mount(
        folder.as_ptr(),
        folder.as_ptr(),
        libc::MS_BIND | libc::MS_REC,
    )?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: a string and a structure that live until the call returns.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            folder.as_ptr(),
            libc::AT_RECURSIVE,
            &attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    check(set.try_into().unwrap_or(-1))
}

/// Makes `setgroups` do nothing, and say that it did.
fn ignore_setgroups() -> io::Result<()> {
    /// Of `struct seccomp_data`: the call's number …
    const NUMBER: u32 = 0;
    /// … and the machine's kind (`AUDIT_ARCH_X86_64`).
    const KIND: u32 = 4;
    const X86_64: u32 = 0xc000_003e;
    const STEPS: u16 = 6;
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let skip_unless = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let end = libc::BPF_RET | libc::BPF_K;
    let setgroups = u32::try_from(libc::SYS_setgroups).unwrap_or(u32::MAX);
    let step = |code: u32, jf, k| libc::sock_filter {
        // The kernel refuses what is no code.
        code: code.try_into().unwrap_or(u16::MAX),
        jt: 0,
        jf,
        k,
    };
    let mut steps: [_; STEPS as usize] = [
        step(load, 0, KIND),
        step(skip_unless, 3, X86_64),
        step(load, 0, NUMBER),
        step(skip_unless, 1, setgroups),
        step(end, 0, libc::SECCOMP_RET_ERRNO),
        step(end, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: STEPS,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: reads a live program, as long as said.
    check(unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &program,
            0,
            0,
        )
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_path_is_one_word() {
        let config = FolderConfig {
            path: OsString::from_vec(b"/a,b\\c\xfc".to_vec()).into(),
            tag: "v0".into(),
            read_only: false,
            flag: String::new(),
        };
        let has = |make, word: &[u8]| {
            let words = arguments(make, &config, 5);
            assert!(words.iter().any(|it| it.as_bytes() == word), "{words:?}");
        };
        has(
            Make::Qemu,
            b"source=/a\\,b\\\\c\xfc,sandbox=namespace,log_level=err",
        );
        has(Make::Rust, b"--shared-dir=/a,b\\c\xfc");
    }

    #[test]
    fn nobody_else_can_connect() {
        let (_socket, listener) = connected().unwrap();
        let listener = UnixListener::from(listener);
        listener.accept().unwrap();
        let path = listener.local_addr().unwrap();
        assert!(!path.as_pathname().unwrap().exists());
    }
}
