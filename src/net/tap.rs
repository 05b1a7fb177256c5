//! TAP devices (Linux' `Documentation/networking/tuntap.rst`).

#![allow(unsafe_code, reason = "the TAP's ioctls")]

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use mayfly_devices::virtio::net::HEADER;

use crate::failure::file_refusal;
use crate::failure::{Failure, OrFail};

const DEVICE: &str = "/dev/net/tun";
// Linux' `if_tun.h`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Attaches to an existing TAP device, once for each pair of queues. It is
/// neither made nor configured here: that takes privileges that a VMM should
/// not have.
pub fn open(name: &str, queues: u8) -> Result<Vec<File>, Failure> {
    let flag = format!("--net tap={name}");
    // A TAP of several queues lets others attach, too.
    if queues > 1 && is_used(name) {
        return Err(used(&flag));
    }
    (0..queues)
        .map(|_| attach(name, queues > 1, &flag))
        .collect()
}

fn attach(name: &str, several: bool, flag: &str) -> Result<File, Failure> {
    let mode = mode(several);
    let c_name = CString::new(name)
        .map_err(|_| Failure::config(format!("{flag}: has a NUL in its name")))?;
    // SAFETY: a string that lives until the call returns.
    if unsafe { libc::if_nametoindex(c_name.as_ptr()) } == 0 {
        return Err(Failure::config(format!(
            "{flag}: no such device; make it with: ip tuntap add dev {name} mode {mode} user $USER"
        )));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(DEVICE)
        .map_err(|error| file_refusal(&error, &format!("{flag}: {DEVICE}")))?;
    let mut request = request(name);
    let flags = match several {
        true => FLAGS | libc::IFF_MULTI_QUEUE,
        false => FLAGS,
    };
    request.ifr_ifru.ifru_flags = flags.try_into().or_internal(flag)?;
    // SAFETY: reads and writes the live request.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut request) } != 0 {
        let error = io::Error::last_os_error();
        return Err(attach_refusal(&error, flag, name, several));
    }
    let header = libc::c_int::try_from(HEADER).or_internal(flag)?;
    // SAFETY: reads a live number.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &header) } != 0 {
        return Err(Failure::host(format!(
            "{flag}: setting the packet header: {}",
            io::Error::last_os_error()
        )));
    }
    Ok(file)
}

/// Another process has attached to it: its link is up. Nobody is asked where
/// that cannot be told.
fn is_used(name: &str) -> bool {
    // Linux' `ethtool.h`.
    const ETHTOOL_GLINK: u32 = 0xa;
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    let Ok(socket) = UdpSocket::bind("0.0.0.0:0") else {
        return false;
    };
    let mut value = Value {
        command: ETHTOOL_GLINK,
        data: 0,
    };
    let mut request = request(name);
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: reads and writes the live request, and the value it points to.
    let asked = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &mut request) };
    asked == 0 && value.data != 0
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: plain bytes, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, source) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = source.cast_signed();
    }
    request
}

/// What `ip tuntap add` calls it.
fn mode(several: bool) -> &'static str {
    match several {
        true => "tap multi_queue",
        false => "tap",
    }
}

fn used(flag: &str) -> Failure {
    Failure::host(format!("{flag}: another VM uses it"))
}

fn attach_refusal(error: &io::Error, flag: &str, name: &str, several: bool) -> Failure {
    let mode = mode(several);
    match error.raw_os_error() {
        Some(libc::EBUSY) => used(flag),
        Some(libc::EPERM | libc::EACCES) => Failure::host(format!(
            "{flag}: no permission; its owner must be you: ip tuntap add dev {name} mode {mode} user $USER"
        )),
        Some(libc::EINVAL) if several => Failure::config(format!(
            "{flag}: is not a TAP device of several queues; make it with: \
             ip tuntap add dev {name} mode {mode} user $USER"
        )),
        Some(libc::EINVAL) => Failure::config(format!(
            "{flag}: is not a TAP device, or one of several queues, which needs queues=2 or more"
        )),
        Some(libc::E2BIG) => Failure::config(format!(
            "{flag}: does not have that many queues; write a smaller queues="
        )),
        _ => Failure::host(format!("{flag}: {error}")),
    }
}
