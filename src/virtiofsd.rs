//! virtiofsd: a process beside the VM that serves a folder of the host to the
//! guest, over vhost-user.
//!
//! It sees nothing but that folder, from namespaces of its own. For an ordinary
//! user these begin with one of users, in which the user is root: so the guest's
//! root owns what the user owns, and nothing else. A folder that is only to be read
//! is mounted so in there, whatever the guest or virtiofsd wish.
//!
//! What the guest's root makes in a folder belongs to root on the host where root runs the
//! VM. So nothing can be made there that gives others its owner's rights: no file gets a
//! set-user-ID or set-group-ID bit, one that has it loses it when the guest writes to it,
//! and there are no new device nodes and no file capabilities. Filters of system calls and
//! fewer capabilities see to that, as they work alike with both makes, whose options differ.

#![allow(unsafe_code, reason = "what runs between fork and exec")]

use std::ffi::{CStr, CString, OsString};
use std::fs;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mayfly_devices::virtio::fs::{BackendError, Frontend};
use mayfly_process::programs::{find_program, inherit};
use mayfly_sandbox::Door;
use mayfly_sandbox::seccomp::Filter;

use crate::config::FolderConfig;
use crate::failure::{Failure, OrFail};
use crate::helper::{self, Chatter, Helper, Ready};
use crate::signals::StartSignals;
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
const TIMEOUT: Duration = Duration::from_secs(10);
/// What it says when all is well, and when the VM ends.
const CHATTER: Chatter = &["virtio_loop: Unexpected poll revents"];

/// Of QEMU's, behind its folder.
const QEMU_OPTIONS: &str = ",sandbox=namespace,log_level=err";
/// Capabilities that it does not need: to make device nodes, to keep the set-user-ID bit of
/// a file that is written to, and to give files capabilities.
const LEFT_OUT: &str = "modcaps=-mknod:-fsetid:-setfcap";
/// What no file may become, whatever the guest asks for …
const FILES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/virtiofsd-files.bpf"));
/// … and ways to that which that filter does not see.
const UNSEEN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/virtiofsd-unseen.bpf"));
/// `setgroups` does nothing, and says that it did.
const GROUPS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/virtiofsd-groups.bpf"));

/// A virtiofsd that starts.
pub struct Starting {
    flag: String,
    socket: UnixStream,
    helper: Helper,
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
pub fn start(
    config: &FolderConfig,
    door: &Door,
    signals: &StartSignals,
) -> Result<Starting, Failure> {
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
        filters: {
            let keeps_groups = plain && make == Make::Qemu;
            let groups = keeps_groups.then_some(GROUPS);
            let all = [FILES, UNSEEN].into_iter().chain(groups);
            all.map(Filter::compiled).collect()
        },
        read_only: match config.read_only {
            true => Some(CString::new(config.path.as_os_str().as_bytes()).or_config(&what)?),
            false => None,
        },
        // SAFETY: has no preconditions.
        parent: unsafe { libc::getpid() },
    };
    let mut command = helper::command(&program).or_host(&what)?;
    command
        .args(arguments(make, config, sandbox.listener.as_raw_fd()))
        .current_dir("/");
    if plain {
        // It may not have more than the user has.
        command.arg("--rlimit-nofile=0");
    }
    door.lead(&mut command).or_host(&what)?;
    // SAFETY: what runs between fork and exec are system calls, and allocates
    // nothing.
    unsafe { command.pre_exec(move || sandbox.enter()) };
    let helper = Helper::spawn(PROGRAM, CHATTER, command).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => Failure::host(format!("{flag}: {NO_NAMESPACES}")),
        _ => Failure::host(format!("{what}: starting it: {error}")),
    })?;
    Ok(Starting {
        flag,
        socket,
        helper,
    })
}

impl Starting {
    /// Waits until it answers.
    pub fn ready(mut self, signals: &StartSignals) -> Result<(Frontend, Ready), Failure> {
        let what = format!("{}: {PROGRAM}", self.flag);
        let own = self.socket.try_clone().or_host(&what)?;
        let interrupt = Some(signals.as_fd());
        let frontend = match Frontend::greet(self.socket, TIMEOUT, interrupt) {
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
        Ok((frontend, Ready::new(self.helper, own, needed_by)))
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
    let mut command = helper::command(program).or_host(what)?;
    command.arg("--version");
    let said = helper::output(command, what, TIMEOUT, signals)?;
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
            format!("--{LEFT_OUT}").into(),
        ],
        Make::Qemu => {
            // Of a list.
            let mut escaped = Vec::new();
            for &byte in path {
                escaped.extend(b"\\,".contains(&byte).then_some(b'\\'));
                escaped.push(byte);
            }
            let options = with("source=", &escaped, &format!("{QEMU_OPTIONS},{LEFT_OUT}"));
            vec![fd, "-f".into(), "-o".into(), options]
        }
    }
}

/// What surrounds it before it makes its own sandbox.
struct Sandbox {
    listener: OwnedFd,
    /// Who is root in there: the user, and the user's group.
    maps: Option<(String, String)>,
    /// Of its system calls. QEMU's gives up all groups, which a user may not: then it keeps
    /// them.
    filters: Vec<Filter>,
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
        self.filters.iter().try_for_each(Filter::install)?;
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

fn write(path: &CStr, text: &str) -> io::Result<()> {
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
fn make_read_only(folder: &CStr) -> io::Result<()> {
    mount(None, c"/", libc::MS_REC | libc::MS_PRIVATE)?;
    mount(Some(folder), folder, libc::MS_BIND | libc::MS_REC)?;
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
    match check(set.try_into().unwrap_or(-1)) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => make_one_read_only(folder),
        done => done,
    }
}

/// The same for kernels before 5.12, which make one mount read-only at a time: so what is
/// mounted in the folder is not shown.
fn make_one_read_only(folder: &CStr) -> io::Result<()> {
    // SAFETY: a string that lives until the call returns.
    check(unsafe { libc::umount2(folder.as_ptr(), libc::MNT_DETACH) })?;
    mount(Some(folder), folder, libc::MS_BIND)?;
    let mut about = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: fills in the structure, or fails.
    check(unsafe { libc::statvfs(folder.as_ptr(), about.as_mut_ptr()) })?;
    // SAFETY: the call succeeded.
    let has = unsafe { about.assume_init() }.f_flag;
    // These may not be taken away in a user namespace.
    let kept = [
        (libc::ST_NOSUID, libc::MS_NOSUID),
        (libc::ST_NODEV, libc::MS_NODEV),
        (libc::ST_NOEXEC, libc::MS_NOEXEC),
        (libc::ST_NOATIME, libc::MS_NOATIME),
        (libc::ST_NODIRATIME, libc::MS_NODIRATIME),
        (libc::ST_RELATIME, libc::MS_RELATIME),
    ];
    let kept = kept.iter().filter(|(flag, _)| has & flag != 0);
    let kept = kept.fold(0, |all, (_, flag)| all | flag);
    let how = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY;
    mount(None, folder, how | kept)
}

fn mount(source: Option<&CStr>, target: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    let source = source.map_or(std::ptr::null(), CStr::as_ptr);
    let none = std::ptr::null();
    // SAFETY: strings that live until the call returns, or none.
    check(unsafe { libc::mount(source, target.as_ptr(), none, flags, none.cast()) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use std::process::Command;

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
            b"source=/a\\,b\\\\c\xfc,sandbox=namespace,log_level=err,modcaps=-mknod:-fsetid:-setfcap",
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

    /// As an old kernel does it, and a new one.
    #[test]
    fn a_folder_is_read_only_with_and_without_recursion() {
        for make in [make_read_only, make_one_read_only_alone] {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("in"), "text").unwrap();
            let path = CString::new(folder.path().as_os_str().as_bytes()).unwrap();
            // SAFETY: have no preconditions.
            let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
            let maps = (format!("0 {user} 1"), format!("0 {group} 1"));
            let enter = move || {
                // SAFETY: numbers; this process has one thread.
                check(unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) })?;
                write(c"/proc/self/setgroups", "deny")?;
                write(c"/proc/self/uid_map", &maps.0)?;
                write(c"/proc/self/gid_map", &maps.1)?;
                make(&path)
            };
            let script = "cat in && ! echo x >in && ! touch out";
            let mut command = Command::new("sh");
            command.args(["-c", &format!("cd \"$1\" && {script} 2>/dev/null"), "sh"]);
            command.arg(folder.path());
            // SAFETY: what runs between fork and exec are system calls.
            unsafe { command.pre_exec(enter) };
            let output = command.output().unwrap();
            assert!(output.status.success(), "{output:?}");
            assert_eq!(output.stdout, b"text");
        }
    }

    fn make_one_read_only_alone(folder: &CStr) -> io::Result<()> {
        mount(None, c"/", libc::MS_REC | libc::MS_PRIVATE)?;
        mount(Some(folder), folder, libc::MS_BIND | libc::MS_REC)?;
        make_one_read_only(folder)
    }
}
