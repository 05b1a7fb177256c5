//! System calls on guest memory, which move bytes between a buffer and the host
//! without a copy on the way.

#![allow(unsafe_code, reason = "the kernel gets addresses of guest memory")]

use std::io;
use std::os::fd::AsRawFd;

use super::chain::Buffer;

/// A range of more parts takes several calls.
const PARTS: usize = 32;
/// Parts of buffers for a packet that are read to in a call.
const BUFFERS: usize = 64;
const NO_PART: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// Sends a range of a buffer to a socket, without blocking and without a signal;
/// returns how many bytes it took.
pub fn send(
    socket: &impl AsRawFd,
    buffer: &Buffer,
    offset: usize,
    len: usize,
) -> io::Result<usize> {
    let mut room = [NO_PART; PARTS];
    // SAFETY: the vectors point to guest memory that `buffer` holds.
    unsafe { send_vectors(socket, buffer.vectors(offset, len, &mut room)) }
}

/// Receives into a range of a buffer, without blocking; returns how many bytes came.
pub fn receive(
    socket: &impl AsRawFd,
    buffer: &Buffer,
    offset: usize,
    len: usize,
) -> io::Result<usize> {
    let mut room = [NO_PART; PARTS];
    let mut message = message(buffer.vectors(offset, len, &mut room));
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    retry(|| {
        // SAFETY: the vectors are live, and point to guest memory that `buffer` holds.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) }
    })
}

/// Writes a whole buffer to a file in one call, as a TAP takes a packet.
pub fn write(file: &impl AsRawFd, buffer: &Buffer) -> io::Result<usize> {
    let mut room = [NO_PART; PARTS];
    let vectors = buffer.vectors(0, buffer.len(), &mut room);
    let held: usize = vectors.iter().map(|part| part.iov_len).sum();
    let many;
    let vectors = match held == buffer.len() {
        true => vectors,
        false => {
            many = buffer.iovecs();
            &many
        }
    };
    let count = libc::c_int::try_from(vectors.len()).map_err(io::Error::other)?;
    retry(|| {
        // SAFETY: the vectors point to guest memory that `buffer` holds.
        unsafe { libc::writev(file.as_raw_fd(), vectors.as_ptr(), count) }
    })
}

/// Reads once from a file to the buffers, one after the other, and what does not fit these
/// to `rest`, as a TAP gives a packet. Returns how many bytes came, and how many of them had
/// room in the buffers: those behind are in `rest`, even if the buffers have more parts than
/// a call takes.
pub fn read_packet<'a>(
    file: &impl AsRawFd,
    buffers: impl Iterator<Item = &'a Buffer>,
    rest: &mut [u8],
) -> io::Result<(usize, usize)> {
    let mut vectors = [NO_PART; BUFFERS + 1];
    let (mut count, mut room) = (0, 0);
    for buffer in buffers {
        let free = vectors.get_mut(count..BUFFERS).unwrap_or_default();
        let parts = buffer.vectors(0, buffer.len(), free);
        count += parts.len();
        let held: usize = parts.iter().map(|part| part.iov_len).sum();
        room += held;
        if held < buffer.len() {
            break;
        }
    }
    if let Some(last) = vectors.get_mut(count) {
        *last = libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        };
    }
    let parts = libc::c_int::try_from(count + 1).map_err(io::Error::other)?;
    let read = retry(|| {
        // SAFETY: the vectors point to guest memory that the buffers hold, and to `rest`.
        unsafe { libc::readv(file.as_raw_fd(), vectors.as_ptr(), parts) }
    })?;
    Ok((read, room.min(read)))
}

/// # Safety
///
/// The vectors must point to memory that can be read until the call returns.
unsafe fn send_vectors(socket: &impl AsRawFd, vectors: &[libc::iovec]) -> io::Result<usize> {
    let message = message(vectors);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    retry(|| {
        // SAFETY: the vectors are live, and what they point to is as the caller says.
        unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) }
    })
}

fn message(vectors: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: a structure of numbers and pointers that may be null.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_ptr().cast_mut();
    message.msg_iovlen = vectors.len();
    message
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(moved) => return Ok(moved),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
