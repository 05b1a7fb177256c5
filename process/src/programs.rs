//! Programs that this one starts: where they are, and what they get of it.

#![allow(unsafe_code, reason = "what runs between fork and exec")]

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Where a program is, if it is installed.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let mut all = std::env::split_paths(&paths).map(|folder| folder.join(name));
    all.find(|path| path.is_file())
}

/// Unblocks all signals, for a program that is started by a thread that blocks some. To be
/// called between fork and exec.
pub fn unblock_signals() -> io::Result<()> {
    // SAFETY: all zeroes are the empty set of signals.
    let none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: reads a live set, and keeps no old one.
    match unsafe { libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has the kernel kill a program when the thread that starts it ends.
pub fn end_with_us(command: &mut Command) {
    let prepare = || {
        // SAFETY: numbers.
        match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: what runs between fork and exec is a system call.
    unsafe { command.pre_exec(prepare) };
}

/// Leaves a descriptor open for the program that follows; to be called between fork
/// and exec.
pub fn inherit(fd: RawFd) -> io::Result<()> {
    // SAFETY: numbers; a descriptor that is none is refused.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
