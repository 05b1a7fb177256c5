//! Becoming a program that has nothing of the process that starts it.

#![allow(unsafe_code, reason = "a process becomes a program")]

use std::convert::Infallible;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::close::descriptors;
use super::credentials;

/// A program that runs in a sandbox, with no environment.
pub struct Program<'a> {
    /// Its file.
    pub executable: BorrowedFd<'a>,
    /// Its name, the only argument.
    pub name: &'a CStr,
    /// Its descriptors, from 0 on. Behind them comes its lifeline, for
    /// [`SandboxSetup::resume`](super::SandboxSetup::resume); it inherits no other.
    pub descriptors: &'a [BorrowedFd<'a>],
}

/// Becomes a program, or fails. Capabilities that this process has in its namespaces stay.
pub fn execute(program: &Program, lifeline: File) -> io::Result<Infallible> {
    // Without them layers are missed, which is reported, or refused, when the sandbox closes.
    let _ = credentials::keep_capabilities();
    let mut descriptors: Vec<BorrowedFd> = program.descriptors.to_vec();
    descriptors.push(lifeline.as_fd());
    // Where none is overwritten before it is duplicated itself.
    let above = 1 + libc::c_int::try_from(descriptors.len()).map_err(io::Error::other)?;
    let high = |fd: BorrowedFd| -> io::Result<OwnedFd> {
        // SAFETY: numbers.
        match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, above) } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: it is new, and nothing else owns it.
            fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        }
    };
    let executable = high(program.executable)?;
    let all = descriptors.into_iter().map(high);
    let all: Vec<OwnedFd> = all.collect::<io::Result<_>>()?;
    let mut next = 0;
    for fd in &all {
        // SAFETY: numbers; what owns the second is not used by this process any more.
        if unsafe { libc::dup2(fd.as_raw_fd(), next) } == -1 {
            return Err(io::Error::last_os_error());
        }
        next += 1;
    }
    close_on_exec_from(next)?;
    let error = execute_file(&executable, program.name);
    match error.kind() {
        // The user that this process is in its namespace may not execute the file, such as
        // root another user's; or AppArmor refuses what lies in another mount namespace.
        io::ErrorKind::PermissionDenied => {
            let copy = copy_in_memory(&executable.into())?;
            Err(execute_file(&copy, program.name))
        }
        _ => Err(error),
    }
}

/// Executes a file without environment. Returns only if that fails.
fn execute_file(file: &impl AsRawFd, name: &CStr) -> io::Error {
    let arguments = [name.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null::<libc::c_char>()];
    // SAFETY: strings that end in zero, and lists of them that end in null.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

/// A copy of a program in memory, which is this process's own.
fn copy_in_memory(mut program: &File) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC;
    // SAFETY: a string that ends in zero.
    let copy = match unsafe { libc::memfd_create(c"mayfly".as_ptr(), flags) } {
        -1 => return Err(io::Error::last_os_error()),
        // SAFETY: it is new, and nothing else owns it.
        fd => unsafe { File::from_raw_fd(fd) },
    };
    io::copy(&mut program, &mut &copy)?;
    // It cannot be executed while it may be written to, unless nobody can.
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK;
    // SAFETY: numbers.
    let _ = unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_ADD_SEALS, seals) };
    File::open(format!("/proc/self/fd/{}", copy.as_raw_fd()))
}

/// All descriptors from one on are closed when a program is executed.
fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    let (first_number, last) = (first.cast_unsigned(), libc::c_uint::MAX);
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: numbers.
    if unsafe { libc::syscall(libc::SYS_close_range, first_number, last, flags) } == 0 {
        return Ok(());
    }
    // Before Linux 5.11.
    for fd in descriptors()?.into_iter().filter(|fd| *fd >= first) {
        // SAFETY: numbers.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
