//! Sockets to the host (Linux' `vsock(7)`).

#![allow(unsafe_code, reason = "sockets that the standard library lacks")]

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `SOCKADDR_VM` has no constructor in libc.
fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: plain bytes, for which zeroes are a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    owned(fd)
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    match fd {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: a new descriptor, that nothing else owns.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    crate::system::check(result.into())
}

/// Connects to a port of the host.
pub fn connect_to_host(port: u32) -> io::Result<File> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_HOST, port);
    // SAFETY: reads a live address of that length.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) })?;
    Ok(socket.into())
}

/// Ends a connection, and waits until the host has acknowledged that, if it does so soon:
/// then nothing of it is on its way any more.
pub fn end(connection: File) {
    const SECONDS: libc::c_int = 5;
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: SECONDS,
    };
    let len = size_of::<libc::linger>() as libc::socklen_t;
    let (level, name) = (libc::SOL_SOCKET, libc::SO_LINGER);
    let value = (&raw const linger).cast();
    // SAFETY: reads a live structure of that length.
    let set = unsafe { libc::setsockopt(connection.as_raw_fd(), level, name, value, len) };
    // Without it, the connection ends a moment later.
    let _ = check(set);
    drop(connection);
}

/// Listens for the host.
pub struct Listener(OwnedFd);

/// Listens on a port.
pub fn listen(port: u32) -> io::Result<Listener> {
    const BACKLOG: libc::c_int = 64;
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: reads a live address of that length.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) })?;
    // SAFETY: passes no memory.
    check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
    Ok(Listener(socket))
}

impl Listener {
    /// The host's next connection. Others of the guest have no business here.
    pub fn accept(&self) -> io::Result<File> {
        loop {
            let mut peer = address(0, 0);
            let mut len = ADDRESS_LEN;
            let address = (&raw mut peer).cast();
            // SAFETY: writes at most `len` bytes to a live address, and the length.
            let fd =
                unsafe { libc::accept4(self.0.as_raw_fd(), address, &mut len, libc::SOCK_CLOEXEC) };
            let connection = owned(fd)?;
            if peer.svm_cid == libc::VMADDR_CID_HOST {
                return Ok(connection.into());
            }
        }
    }
}
