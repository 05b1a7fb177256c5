//! A pipe that shows whether another process lives.

#![allow(unsafe_code, reason = "poll takes a pointer and a number")]

use std::io;
use std::os::fd::AsRawFd;

/// Fails if nobody has the other end any more.
pub fn check(lifeline: &impl AsRawFd) -> io::Result<()> {
    let mut entry = libc::pollfd {
        fd: lifeline.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: one live entry.
    match unsafe { libc::poll(&mut entry, 1, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ if entry.revents & libc::POLLHUP != 0 => Err(io::ErrorKind::BrokenPipe.into()),
        _ => Ok(()),
    }
}
