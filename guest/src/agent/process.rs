//! Starting a process: its user, its folder, its terminal or its pipes.

#![allow(unsafe_code, reason = "what runs between fork and exec, and terminals")]

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use mayfly_protocol::agent::{Bytes, Failed, Limit, Process, Size};

use super::directory::make_directory;
use super::reaper::{Reaper, Started};
use super::{command, passwd};
use crate::registers;

const STATUS_NOT_STARTED: u8 = 125;
/// How much a process's pipes hold: with less, its threads and ours take turns more often.
const PIPE_SIZE: libc::c_int = 256 << 10;

/// A process that runs, and our ends of its streams.
pub struct Running {
    /// The process.
    pub started: Started,
    /// The pipe or terminal to its standard input.
    pub input: Option<File>,
    /// The pipe or terminal of its standard output.
    pub output: File,
    /// The pipe of its standard error, unless it has a terminal.
    pub errors: Option<File>,
    /// Its terminal.
    pub terminal: Option<File>,
}

/// Starts a process.
pub fn start(process: &Process, reaper: &Reaper, main: bool) -> Result<Running, Failed> {
    let fail = |reason: String| Failed {
        status: STATUS_NOT_STARTED,
        reason,
    };
    let user = passwd::find(&process.user, &process.groups).map_err(fail)?;
    if process.arguments.is_empty() {
        return Err(fail("no command".into()));
    }
    let environment = environment(&process.environment, &user.home);
    let program = command::Command::new(&process.arguments, &environment);
    let program = program.map_err(|error| fail(format!("the command: {error}")))?;
    let program = Arc::new(program);
    let folder = open_folder(&process.folder).map_err(fail)?;
    let terminal = match process.terminal {
        Some(size) => {
            let opened = open_terminal(size, user.uid);
            Some(opened.map_err(|error| fail(format!("a terminal: {error}")))?)
        }
        None => None,
    };
    // What it is called here does not matter: it is executed below.
    let mut command = Command::new("/");
    let slave = terminal.as_ref().map(|(_, slave)| slave);
    streams(&mut command, process.input, slave).map_err(|error| fail(error.to_string()))?;
    let has_terminal = terminal.is_some();
    let (uid, gid, groups) = (user.uid, user.gid, user.groups);
    let (limits, no_new_privileges) = (process.limits.clone(), process.no_new_privileges);
    let executed = program.clone();
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
            // Before it is a user who may not enter it, as in Docker.
            check(libc::fchdir(folder.as_raw_fd()))?;
            check(libc::setgroups(groups.len(), groups.as_ptr()))?;
            check(libc::setgid(gid))?;
            check(libc::setuid(uid))?;
            Err(executed.execute())
        });
    }
    let mut started = reaper
        .spawn(&mut command, main)
        .map_err(|error| program.explain(&error))?;
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
            [&output, &errors, &input]
                .into_iter()
                .flatten()
                .for_each(enlarge_pipe);
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
    streams.map_err(|error: io::Error| fail(error.to_string()))
}

/// All of a process's variables: the last one of a name wins. An empty `HOME` is none,
/// as in Docker.
fn environment(given: &[(Bytes, Bytes)], home: &str) -> Vec<(Bytes, Bytes)> {
    let own = registers::environment();
    let own = own.map(|(name, value)| (name.into(), value.into()));
    let mut all: Vec<(Bytes, Bytes)> = own.into_iter().collect();
    all.push((b"HOME".to_vec(), home.as_bytes().to_vec()));
    let kept = |(name, value): &&(Bytes, Bytes)| name != b"HOME" || !value.is_empty();
    all.extend(given.iter().filter(kept).cloned());
    let mut seen = HashSet::new();
    all.reverse();
    all.retain(|(name, _)| seen.insert(name.clone()));
    all.reverse();
    all
}

/// Opens the folder that a process begins in. One that is missing is made, as in Docker.
fn open_folder(path: &[u8]) -> Result<File, String> {
    let path = Path::new(OsStr::from_bytes(match path {
        [] => b"/",
        path => path,
    }));
    let _ = make_directory(path);
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => format!("no folder {}", path.display()),
            io::ErrorKind::NotADirectory => format!("{} is no folder", path.display()),
            _ => format!("the folder {}: {error}", path.display()),
        })
}

/// Gives a command its streams: its terminal, or pipes.
fn streams(command: &mut Command, input: bool, terminal: Option<&File>) -> io::Result<()> {
    if let Some(terminal) = terminal {
        let stdio = || terminal.try_clone().map(Stdio::from);
        command.stdin(stdio()?).stdout(stdio()?).stderr(stdio()?);
        return Ok(());
    }
    let stdin = match input {
        true => Stdio::piped(),
        false => Stdio::null(),
    };
    command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Ok(())
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

/// Lets a pipe hold more. Without it, it only is slower.
fn enlarge_pipe(pipe: &File) {
    // SAFETY: an open descriptor, and a number.
    unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_SIZE) };
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
