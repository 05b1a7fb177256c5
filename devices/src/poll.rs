//! Waiting for descriptors.

#![allow(unsafe_code, reason = "poll takes a pointer and a number")]

use std::io;
use std::os::fd::RawFd;

/// An entry that asks for these events of a descriptor.
pub fn entry(fd: RawFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

/// Waits until an entry is ready, or the given number of milliseconds has passed; -1 waits for ever.
/// Returns how many are ready. (`rustix` has a call for it that sandboxes lack.)
pub fn poll(entries: &mut [libc::pollfd], timeout_ms: libc::c_int) -> io::Result<usize> {
    // SAFETY: as many live entries as it says.
    let ready = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as _, timeout_ms) };
    usize::try_from(ready).map_err(|_| io::Error::last_os_error())
}

/// The same of one descriptor. True if it is ready, or broken: the operation will tell.
pub fn ready(fd: RawFd, events: libc::c_short, timeout_ms: libc::c_int) -> bool {
    poll(&mut [entry(fd, events)], timeout_ms).is_ok_and(|ready| ready > 0)
}
