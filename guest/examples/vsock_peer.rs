//! The guest's side of the tests of sockets between guest and host
//! (`tests/guests/vsock.rs`).
//!
//! | words                   | what happens                                    |
//! |-------------------------|-------------------------------------------------|
//! | `exchange PORT BYTES`   | sends and receives as much at once              |
//! | `hold OUT IN COUNT`     | has COUNT connections each way open at once     |
//! | `stall LAZY COUNT ECHO` | fills COUNT connections; another one goes on    |
//! | `broken RESET NONE`     | sends to a peer that resets, and to nobody      |

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;

const HOST: u32 = libc::VMADDR_CID_HOST;
const CHUNK: usize = 1 << 18;
/// Without room for this long, a connection has stalled.
const STALLED_MS: i32 = 1000;

fn check(result: i32) -> io::Result<i32> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(result),
    }
}

fn socket() -> io::Result<File> {
    // SAFETY: has no preconditions.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) })?;
    // SAFETY: a new descriptor, that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: a structure of numbers.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn connect(port: u32) -> io::Result<File> {
    let (socket, address) = (socket()?, address(HOST, port));
    let len = mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: an address that lives until the call returns.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(socket)
}

fn listen(port: u32) -> io::Result<File> {
    let (socket, address) = (socket()?, address(libc::VMADDR_CID_ANY, port));
    let len = mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: an address that lives until the call returns.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    // SAFETY: has no preconditions.
    check(unsafe { libc::listen(socket.as_raw_fd(), 4096) })?;
    Ok(socket)
}

fn accept(listener: &File) -> io::Result<File> {
    let null = std::ptr::null_mut();
    // SAFETY: the address is not asked for.
    let fd = check(unsafe { libc::accept(listener.as_raw_fd(), null, null.cast()) })?;
    // SAFETY: a new descriptor, that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

fn shut_down_writing(socket: &File) -> io::Result<()> {
    // SAFETY: has no preconditions.
    check(unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_WR) }).map(drop)
}

/// What is sent: no power of two divides its period, so that bytes that are out
/// of place show.
struct Pattern(Vec<u8>);

impl Pattern {
    const PERIOD: u64 = 1_000_003;

    fn new() -> Self {
        let words = (1_u64..).flat_map(|index| {
            let mixed = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed ^ mixed >> 29).to_le_bytes()
        });
        let mut bytes: Vec<u8> = words.take(Self::PERIOD as usize).collect();
        bytes.extend_from_within(..CHUNK);
        Pattern(bytes)
    }

    /// At most [`CHUNK`] bytes, from an offset on.
    fn at(&self, offset: u64, len: usize) -> &[u8] {
        let start = (offset % Self::PERIOD) as usize;
        &self.0[start..start + len]
    }
}

fn send(mut socket: &File, bytes: u64) -> io::Result<()> {
    let pattern = Pattern::new();
    for offset in (0..bytes).step_by(CHUNK) {
        let len = (bytes - offset).min(CHUNK as u64) as usize;
        socket.write_all(pattern.at(offset, len))?;
    }
    Ok(())
}

/// Receives to the end; says how much was as it must be.
fn receive(mut socket: &File) -> io::Result<u64> {
    let (pattern, mut data) = (Pattern::new(), vec![0; CHUNK]);
    let mut offset = 0;
    loop {
        let mut len = 0;
        while len < CHUNK {
            match socket.read(&mut data[len..])? {
                0 => break,
                more => len += more,
            }
        }
        if &data[..len] != pattern.at(offset, len) {
            return Err(ErrorKind::InvalidData.into());
        }
        offset += len as u64;
        if len < CHUNK {
            return Ok(offset);
        }
    }
}

fn exchange(port: u32, bytes: u64) -> io::Result<()> {
    let socket = connect(port)?;
    let other = socket.try_clone()?;
    let sender = thread::spawn(move || {
        send(&other, bytes)?;
        shut_down_writing(&other)
    });
    println!("received: {}", receive(&socket)?);
    sender.join().map_err(|_| ErrorKind::Other)??;
    println!("sent: {bytes}");
    Ok(())
}

/// Says a number to each peer, and hears it again.
fn echo(sockets: &mut [File]) -> io::Result<()> {
    for (index, socket) in sockets.iter_mut().enumerate() {
        socket.write_all(&index.to_le_bytes())?;
    }
    for (index, socket) in sockets.iter_mut().enumerate() {
        let mut heard = [0; 8];
        socket.read_exact(&mut heard)?;
        if heard != index.to_le_bytes() {
            return Err(ErrorKind::InvalidData.into());
        }
    }
    Ok(())
}

fn hold(out: u32, inward: u32, count: usize) -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: 4096,
        rlim_max: 4096,
    };
    // SAFETY: reads a live structure.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })?;
    let listener = listen(inward)?;
    let mut ours: Vec<File> = (0..count).map(|_| connect(out)).collect::<Result<_, _>>()?;
    println!("connected: {count}");
    let mut theirs: Vec<File> = (0..count)
        .map(|_| accept(&listener))
        .collect::<Result<_, _>>()?;
    println!("accepted: {count}");
    echo(&mut ours)?;
    // These are the host's to begin: what it says is said again.
    for socket in &mut theirs {
        let mut heard = [0; 8];
        socket.read_exact(&mut heard)?;
        socket.write_all(&heard)?;
    }
    println!("echoed: {}", 2 * count);
    // Until the host has closed all connections.
    for socket in ours.iter_mut().chain(&mut theirs) {
        if socket.read(&mut [0])? != 0 {
            return Err(ErrorKind::InvalidData.into());
        }
    }
    println!("ended: {}", 2 * count);
    Ok(())
}

/// Sends until there is no room any more; returns how much that was.
fn fill(mut socket: &File) -> io::Result<u64> {
    // SAFETY: has no preconditions.
    check(unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) })?;
    let (pattern, mut sent) = (Pattern::new(), 0);
    loop {
        match socket.write(pattern.at(sent, 8192)) {
            Ok(len) => sent += len as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let mut entry = libc::pollfd {
                    fd: socket.as_raw_fd(),
                    events: libc::POLLOUT,
                    revents: 0,
                };
                // SAFETY: one live entry.
                if check(unsafe { libc::poll(&mut entry, 1, STALLED_MS) })? == 0 {
                    return Ok(sent);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn stall(lazy: u32, count: usize, other: u32) -> io::Result<()> {
    let fillers: Vec<_> = (0..count)
        .map(|_| {
            thread::spawn(move || {
                let socket = connect(lazy)?;
                fill(&socket).map(|sent| (socket, sent))
            })
        })
        .collect();
    let mut stalled = Vec::new();
    for filler in fillers {
        stalled.push(filler.join().map_err(|_| ErrorKind::Other)??);
    }
    let sent: u64 = stalled.iter().map(|(_, sent)| sent).sum();
    let mut others = [connect(other)?];
    for _ in 0..10 {
        echo(&mut others)?;
    }
    println!("stalled: {sent}");
    // The host measures, and reads at last.
    for (socket, _) in &stalled {
        shut_down_writing(socket)?;
    }
    for (socket, _) in &mut stalled {
        // SAFETY: has no preconditions.
        check(unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFL, 0) })?;
        if socket.read(&mut [0])? != 0 {
            return Err(ErrorKind::InvalidData.into());
        }
    }
    println!("drained: {count}");
    Ok(())
}

fn broken(reset: u32, none: u32) -> io::Result<()> {
    let code = |error: io::Error| error.raw_os_error().unwrap_or(0);
    println!("refused: {}", connect(none).err().map_or(0, code));
    // It resets before all is sent.
    let sent = connect(reset).and_then(|socket| send(&socket, 1 << 30));
    println!("broken: {}", sent.err().map_or(0, code));
    Ok(())
}

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| -> io::Result<u64> {
        let word = words.get(index).and_then(|word| word.parse().ok());
        word.ok_or(ErrorKind::InvalidInput.into())
    };
    let port = |index: usize| number(index).map(|port| port as u32);
    match words.first().map(String::as_str) {
        Some("exchange") => exchange(port(1)?, number(2)?),
        Some("hold") => hold(port(1)?, port(2)?, number(3)? as usize),
        Some("stall") => stall(port(1)?, number(2)? as usize, port(3)?),
        Some("broken") => broken(port(1)?, port(2)?),
        _ => Err(ErrorKind::InvalidInput.into()),
    }
}
