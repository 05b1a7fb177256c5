//! Starting a process: its user, its folder, its terminal or its pipes.

#![allow(unsafe_code, reason = "what runs between fork and exec, and terminals")]

use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use mayfly_guest::protocol::{Failed, Limit, Process, Size};

use super::passwd;
use super::reaper::{Reaper, Started};

const STATUS_NOT_STARTED: u8 = 125;
const STATUS_NOT_EXECUTABLE: u8 = 126;
const STATUS_NOT_FOUND: u8 = 127;

/// A process that runs, and our ends of its streams.
pub struct Running {
    /// The process.
    pub started: Started,
    /// What it reads.
    pub input: Option<File>,
    /// What it writes.
    pub output: File,
    /// What it complains.
    pub errors: Option<File>,
    /// Its terminal.
    pub terminal: Option<File>,
}

/// Starts a process.
pub fn start(process: &Process, reaper: &Reaper, main: bool) -> Result<Running, Failed> {
    let fail = |status, reason: String| Failed { status, reason };
    let user = passwd::find(&process.user, &process.groups)
        .map_err(|why| fail(STATUS_NOT_STARTED, why))?;
    let Some((program, arguments)) = process.arguments.split_first() else {
        return Err(fail(STATUS_NOT_STARTED, "no command".into()));
    };
    let folder = Path::new(OsStr::from_bytes(match process.folder.as_slice() {
        [] => b"/",
        folder => folder,
    }));
    // Docker makes it, too.
    let _ = DirBuilder::new().recursive(true).mode(0o755).create(folder);
    let mut command = Command::new(OsStr::from_bytes(program));
    command
        .args(arguments.iter().map(|it| OsStr::from_bytes(it)))
        .env_clear()
        .env("HOME", &user.home)
        .envs(
            process
                .environment
                .iter()
                .map(|(name, value)| (OsStr::from_bytes(name), OsStr::from_bytes(value))),
        )
        .current_dir(folder);
    let terminal = match process.terminal {
        Some(size) => {
            let opened = open_terminal(size, user.uid);
            Some(opened.map_err(|error| fail(STATUS_NOT_STARTED, format!("a terminal: {error}")))?)
        }
        None => None,
    };
    let streams = match &terminal {
        Some((_, slave)) => (|| {
            let stdio = || slave.try_clone().map(Stdio::from);
            command.stdin(stdio()?).stdout(stdio()?).stderr(stdio()?);
            Ok(())
        })(),
        None => {
            command
                .stdin(if process.input {
                    Stdio::piped()
                } else {
                    Stdio::null()
                })
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            Ok(())
        }
    };
    streams.map_err(|error: io::Error| fail(STATUS_NOT_STARTED, error.to_string()))?;
    let has_terminal = terminal.is_some();
    let (uid, gid, groups) = (user.uid, user.gid, user.groups);
    let (limits, no_new_privileges) = (process.limits.clone(), process.no_new_privileges);
    // SAFETY: only system calls between fork and exec, and no allocation.
    unsafe {
        command.pre_exec(move || {
            libc::setsid();
            if has_terminal {
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            for stream in 0..=2 {
                give_pipe(stream, uid);
            }
            for limit in &limits {
                set_limit(limit)?;
            }
            if no_new_privileges {
                check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            }
            check(libc::setgroups(groups.len(), groups.as_ptr()))?;
            check(libc::setgid(gid))?;
            check(libc::setuid(uid))
        });
    }
    let mut started = reaper.spawn(&mut command, main).map_err(|error| {
        let name = String::from_utf8_lossy(program);
        match error.kind() {
            io::ErrorKind::NotFound if !folder.is_dir() => fail(
                STATUS_NOT_STARTED,
                format!("no folder {}", folder.display()),
            ),
            io::ErrorKind::NotFound => fail(STATUS_NOT_FOUND, format!("{name}: not found")),
            _ => fail(STATUS_NOT_EXECUTABLE, format!("{name}: {error}")),
        }
    })?;
    let streams = match terminal {
        Some((master, _)) => (|| {
            Ok(Running {
                input: Some(master.try_clone()?),
                output: master.try_clone()?,
                errors: None,
                terminal: Some(master),
                started,
            })
        })(),
        None => {
            let child = &mut started.child;
            let output = child.stdout.take().map(OwnedFd::from).map(File::from);
            let errors = child.stderr.take().map(OwnedFd::from).map(File::from);
            let input = child.stdin.take().map(OwnedFd::from).map(File::from);
            match output {
                Some(output) => Ok(Running {
                    input,
                    output,
                    errors,
                    terminal: None,
                    started,
                }),
                None => Err(io::Error::other("no pipe")),
            }
        }
    };
    streams.map_err(|error| fail(STATUS_NOT_STARTED, error.to_string()))
}

/// Tells a terminal its size, and so those that use it.
pub fn resize(terminal: &File, size: Size) {
    let size = libc::winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: reads a live structure.
    unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) };
}

/// Sets a limit of this process. Safe between fork and exec.
fn set_limit(limit: &Limit) -> io::Result<()> {
    let values = libc::rlimit {
        rlim_cur: limit.soft,
        rlim_max: limit.hard,
    };
    // SAFETY: reads a live structure; a number that Linux does not know is refused.
    check(unsafe { libc::setrlimit(limit.resource.into(), &values) })
}

/// Makes a pipe its user's, who may else not open `/dev/stdout`. Safe between
/// fork and exec.
fn give_pipe(stream: RawFd, uid: u32) {
    // SAFETY: plain bytes, for which zeroes are a value.
    let mut status: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: writes to a live structure.
    let known = unsafe { libc::fstat(stream, &mut status) } == 0;
    if known && status.st_mode & libc::S_IFMT == libc::S_IFIFO {
        const SAME: libc::gid_t = libc::gid_t::MAX;
        // Without it, the process has its streams all the same.
        // SAFETY: passes numbers only.
        unsafe { libc::fchown(stream, uid, SAME) };
    }
}

/// A new terminal, its user's: our end and the process's. No process that is
/// started meanwhile inherits them.
fn open_terminal(size: Size, uid: u32) -> io::Result<(File, File)> {
    const HOW: libc::c_int = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: passes numbers only.
    let master = owned(unsafe { libc::posix_openpt(HOW) })?;
    // SAFETY: an open descriptor.
    check(unsafe { libc::grantpt(master.as_raw_fd()) })?;
    // SAFETY: an open descriptor.
    check(unsafe { libc::unlockpt(master.as_raw_fd()) })?;
    // SAFETY: an open descriptor, and numbers.
    let slave = owned(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, HOW) })?;
    std::os::unix::fs::fchown(&slave, Some(uid), None)?;
    resize(&master, size);
    Ok((master, slave))
}

fn owned(fd: RawFd) -> io::Result<File> {
    check(fd)?;
    // SAFETY: a new descriptor, that nothing else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    /// Changes nothing but the owner of what it may.
    #[test]
    fn only_pipes_are_given_away() {
        // SAFETY: touches no memory.
        let own = unsafe { libc::geteuid() };
        // Root may give to anyone, others to themselves.
        let user = if own == 0 { 1000 } else { own };
        let (pipe, _writer) = io::pipe().unwrap();
        let pipe = File::from(OwnedFd::from(pipe));
        let group = pipe.metadata().unwrap().gid();
        give_pipe(pipe.as_raw_fd(), user);
        let metadata = pipe.metadata().unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (user, group));
        let file = tempfile::tempfile().unwrap();
        give_pipe(file.as_raw_fd(), user);
        assert_eq!(file.metadata().unwrap().uid(), own);
    }

    #[test]
    fn terminals_are_not_inherited() {
        let size = Size {
            rows: 7,
            columns: 9,
        };
        // SAFETY: touches no memory.
        let own = unsafe { libc::geteuid() };
        let (master, slave) = open_terminal(size, own).unwrap();
        for file in [&master, &slave] {
            // SAFETY: an open descriptor.
            let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFD) };
            assert_eq!(flags, libc::FD_CLOEXEC);
        }
        let mut told = libc::winsize {
            ws_row: 0,
            ws_col: 0,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: writes to a live structure.
        unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCGWINSZ, &mut told) };
        assert_eq!((told.ws_row, told.ws_col), (7, 9));
    }
}
