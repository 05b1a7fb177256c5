//! What fuzz targets do. Each function takes what the fuzzer made up, and panics when
//! something is not as it must be.

#![deny(unsafe_code)]

pub mod agent;
pub mod boot;
pub mod bus;
pub mod config;
pub mod control;
pub mod devices;
pub mod egress;
pub mod folders;
pub mod guest;
pub mod image;
pub mod snapshot;
pub mod tarball;

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::FromRawFd;

/// A file in memory with this content.
#[allow(unsafe_code, reason = "memfd")]
fn file(content: &[u8]) -> File {
    // SAFETY: a name, and no flags that matter.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: a new descriptor, that nothing else owns.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}
