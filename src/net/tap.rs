//! TAP devices (Linux' `Documentation/networking/tuntap.rst`).

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use mayfly_devices::virtio::net::HEADER;

use crate::failure::Failure;
use crate::machine::refusal;

const DEVICE: &str = "/dev/net/tun";
// Linux' `if_tun.h`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Attaches to an existing TAP device. It is neither made nor configured here:
/// that takes privileges that a VMM should not have.
pub fn open(name: &str) -> Result<File, Failure> {
    let flag = format!("--net tap={name}");
    let c_name = CString::new(name)
        .map_err(|_| Failure::config(format!("{flag}: has a NUL in its name")))?;
    // SAFETY: a string that lives until the call returns.
    if unsafe { libc::if_nametoindex(c_name.as_ptr()) } == 0 {
        return Err(Failure::config(format!(
            "{flag}: no such device; make it with: ip tuntap add dev {name} mode tap user $USER"
        )));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(DEVICE)
        .map_err(|error| refusal(&error, &format!("{flag}: {DEVICE}")))?;
    // SAFETY: plain bytes, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, source) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = source.cast_signed();
    }
    request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
    // SAFETY: reads and writes the live request.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut request) } != 0 {
        return Err(attach_refusal(&io::Error::last_os_error(), &flag, name));
    }
    let header = HEADER as libc::c_int;
    // SAFETY: reads a live number.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &header) } != 0 {
        return Err(Failure::host(format!(
            "{flag}: setting the packet header: {}",
            io::Error::last_os_error()
        )));
    }
    Ok(file)
}

fn attach_refusal(error: &io::Error, flag: &str, name: &str) -> Failure {
    match error.raw_os_error() {
        Some(libc::EBUSY) => Failure::host(format!("{flag}: another VM uses it")),
        Some(libc::EPERM | libc::EACCES) => Failure::host(format!(
            "{flag}: no permission; its owner must be you: ip tuntap add dev {name} mode tap user $USER"
        )),
        Some(libc::EINVAL) => Failure::config(format!(
            "{flag}: is not a TAP device (or one of several queues)"
        )),
        _ => Failure::host(format!("{flag}: {error}")),
    }
}
