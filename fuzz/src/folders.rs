//! Folders: a device whose backend, another process, answers what it likes.

#![allow(unsafe_code, reason = "takes descriptors out of messages")]

use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use arbitrary::Arbitrary;
use mayfly_devices::virtio::fs::{Frontend, Fs};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::devices::Nothing;
use crate::guest::{Action, Guest};

/// What a backend answers.
#[derive(Arbitrary, Clone, Debug)]
pub enum Answer {
    /// What it should.
    Good,
    /// The same with this number.
    Number(u64),
    /// So many bytes, which are these.
    Bytes([u8; 20]),
    /// Good, and more behind it.
    More([u8; 20]),
    /// Less than an answer, and nothing else.
    Cut(u8),
}

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
/// The next message after this, and its kind.
fn hear(socket: &mut UnixStream) -> Option<(u32, u32, u32)> {
    let mut header = [0u8; 12];
    let mut fds = [-1; 8];
    let mut buffers = [libc::iovec {
        iov_base: header.as_mut_ptr().cast(),
        iov_len: header.len(),
    }];
    // SAFETY: a live buffer of that length.
    let got = unsafe { socket.recv_with_fds(&mut buffers, &mut fds) };
    let (12, count) = got.ok()? else { return None };
    for fd in &fds[..count] {
        // SAFETY: just received, so nobody else has it.
        drop(unsafe { OwnedFd::from_raw_fd(*fd) });
    }
    let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let mut data = vec![0; number(8) as usize];
    socket.read_exact(&mut data).ok()?;
    let low = data.first_chunk().copied().map_or(0, u32::from_le_bytes);
    Some((number(0), number(4), low))
}

/// Answers as it is told to, and well from then on.
fn backend(mut socket: UnixStream, answers: Vec<Answer>) {
    let mut answers = answers.into_iter();
    while let Some((request, flags, low)) = hear(&mut socket) {
        let number = match request {
            GET_FEATURES => 1 << 32 | 1 << 30 | 0x3400_0000,
            GET_PROTOCOL_FEATURES => 1 << 3,
            GET_VRING_BASE => low.into(),
            _ if flags & NEED_REPLY != 0 => 0,
            _ => continue,
        };
        let reply = |number: u64| {
            let mut reply = Vec::new();
            for word in [request, VERSION | REPLY, 8] {
                reply.extend(u32::to_le_bytes(word));
            }
            reply.extend(number.to_le_bytes());
            reply
        };
        let mut good = reply(number);
        let bytes = match answers.next().unwrap_or(Answer::Good) {
            Answer::Good => good,
            Answer::Number(number) => reply(number),
            Answer::Bytes(bytes) => bytes.to_vec(),
            Answer::More(bytes) => [good, bytes.to_vec()].concat(),
            Answer::Cut(len) => {
                good.truncate(usize::from(len) % good.len());
                let _ = socket.write_all(&good);
                return;
            }
        };
        if socket.write_all(&bytes).is_err() {
            return;
        }
    }
}

/// A folder, with a backend that answers what it likes. It is ended once at most.
pub fn vhost_user((answers, program): (Vec<Answer>, Vec<Action<Nothing>>)) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = thread::spawn(move || backend(theirs, answers));
    if let Ok(frontend) = Frontend::greet(ours, Duration::from_secs(3), None) {
        let ends = Arc::new(AtomicU64::new(0));
        let counted = ends.clone();
        let end = move || {
            counted.fetch_add(1, Ordering::Relaxed);
        };
        let device = Fs::new(frontend, "share", Box::new(end)).unwrap();
        let mut guest = Guest::shared(Box::new(device));
        guest.run(program, |_, _| ());
        drop(guest);
        assert!(ends.load(Ordering::Relaxed) <= 1);
    }
    thread.join().unwrap();
}
