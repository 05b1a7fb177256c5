//! Sockets between guest and host, with real kernels' drivers
//! (`guest/examples/vsock_peer.rs` is the other side).

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Instant;

use mayfly_testing::guest::{Guest, Running};

const GIB: u64 = 1 << 30;
const CHUNK: usize = 1 << 18;
const COUNT: usize = 1000;
const LAZY: usize = 64;

fn guest(kernel: &str, words: &str) -> Guest {
    let script = format!("vsock-peer {words}; echo status: $?");
    let guest = Guest::with_archives(kernel, "vmlinux", &script, &["vsock-peer.cpio"]);
    let flag = format!("cid=42,unix={}", guest.path("v").display());
    guest.args(["--vsock", &flag])
}

fn listen(guest: &Guest, port: u32) -> UnixListener {
    UnixListener::bind(guest.path(&format!("v_{port}"))).unwrap()
}

/// What is sent, as the guest has it: no power of two divides its period, so that bytes that are out
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

/// Reads to the end; all must be as the guest made it.
fn verify(mut stream: UnixStream) -> u64 {
    let (pattern, mut data) = (Pattern::new(), vec![0; CHUNK]);
    let mut offset = 0;
    loop {
        let mut len = 0;
        while len < CHUNK {
            match stream.read(&mut data[len..]).unwrap() {
                0 => break,
                more => len += more,
            }
        }
        assert!(&data[..len] == pattern.at(offset, len), "at {offset}");
        offset += len as u64;
        if len < CHUNK {
            return offset;
        }
    }
}

fn echo(mut stream: UnixStream) {
    let mut data = [0; 8];
    while let Ok(len @ 1..) = stream.read(&mut data) {
        stream.write_all(&data[..len]).unwrap();
    }
}

fn ended_well(running: Running) -> String {
    let ended = running.wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    assert!(ended.stdout.contains("status: 0"), "{ended:?}");
    ended.stdout
}

fn exchange(kernel: &str, bytes: u64) {
    let guest = guest(kernel, &format!("exchange 1 {bytes}"));
    // Left by a VM that was killed.
    drop(UnixListener::bind(guest.path("v")).unwrap());
    let listener = listen(&guest, 1);
    let socket = guest.path("v");
    let running = guest.start();
    let (stream, _) = listener.accept().unwrap();
    let started = Instant::now();
    let mut output = stream.try_clone().unwrap();
    let sender = thread::spawn(move || {
        let pattern = Pattern::new();
        for offset in (0..bytes).step_by(CHUNK) {
            output.write_all(pattern.at(offset, CHUNK)).unwrap();
        }
        output.shutdown(std::net::Shutdown::Write).unwrap();
    });
    assert_eq!(verify(stream), bytes);
    sender.join().unwrap();
    let console = ended_well(running);
    println!("{bytes} bytes both ways in {:?}", started.elapsed());
    assert!(console.contains(&format!("received: {bytes}")), "{console}");
    assert!(console.contains(&format!("sent: {bytes}")), "{console}");
    assert!(!socket.exists());
}

#[test]
fn a_gibibyte_goes_both_ways_at_once_unchanged() {
    exchange("cloud-6.12", GIB);
}

#[test]
fn an_older_kernel_has_other_buffers() {
    exchange("cloud-6.1", 16 << 20);
}

/// This process holds the other ends.
fn raise_file_limit() {
    let limit = libc::rlimit {
        rlim_cur: 4096,
        rlim_max: 4096,
    };
    // SAFETY: reads a live structure.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
}

#[test]
fn a_thousand_connections_each_way_are_open_at_once() {
    raise_file_limit();
    let guest = guest("cloud-6.12", &format!("hold 1 2 {COUNT}"));
    let listener = listen(&guest, 1);
    let socket = guest.path("v");
    let mut running = guest.start();
    let mut theirs: Vec<UnixStream> = (0..COUNT).map(|_| listener.accept().unwrap().0).collect();
    running.expect(&format!("connected: {COUNT}"));

    // Another VM is refused; this one goes on.
    let flag = format!("cid=3,unix={}", socket.display());
    let refused = Guest::bare("cloud-6.12")
        .args(["--vsock", &flag])
        .start()
        .wait();
    assert_eq!(refused.code(), Some(2), "{refused:?}");
    assert!(
        refused.stderr.contains("choose another name"),
        "{refused:?}"
    );

    let mut ours: Vec<UnixStream> = (0..COUNT)
        .map(|_| {
            let mut client = UnixStream::connect(&socket).unwrap();
            client.write_all(b"CONNECT 2\n").unwrap();
            client
        })
        .collect();
    let mut ports = std::collections::HashSet::new();
    for client in &mut ours {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        let line = String::from_utf8(line).unwrap();
        ports.insert(line.strip_prefix("OK ").unwrap().to_owned());
    }
    assert_eq!(ports.len(), COUNT);
    running.expect(&format!("accepted: {COUNT}"));
    // The guest speaks first on its own, and hears first on ours.
    for stream in &mut theirs {
        let mut heard = [0; 8];
        stream.read_exact(&mut heard).unwrap();
        stream.write_all(&heard).unwrap();
    }
    for (index, client) in ours.iter_mut().enumerate() {
        client.write_all(&index.to_le_bytes()).unwrap();
    }
    for (index, client) in ours.iter_mut().enumerate() {
        let mut heard = [0; 8];
        client.read_exact(&mut heard).unwrap();
        assert_eq!(heard, index.to_le_bytes());
    }
    running.expect(&format!("echoed: {}", 2 * COUNT));
    drop((theirs, ours));
    let console = ended_well(running);
    assert!(
        console.contains(&format!("ended: {}", 2 * COUNT)),
        "{console}"
    );
    assert!(!socket.exists());
}

/// The process's own memory in KiB: the guest's is shared, and not of these.
fn own_memory(process: u32) -> u64 {
    let status = fs::read_to_string(Path::new("/proc").join(process.to_string()).join("status"));
    let status = status.unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let number = line.unwrap().split_whitespace().nth(1).unwrap();
    number.parse().unwrap()
}

#[test]
fn peers_that_never_read_or_reset_harm_no_others() {
    let guest = guest(
        "cloud-6.12",
        &format!("broken 3 4 && vsock-peer stall 1 {LAZY} 2"),
    )
    .args(["--memory", "256M,shared"]);
    let (lazy, other, reset) = (listen(&guest, 1), listen(&guest, 2), listen(&guest, 3));
    let socket = guest.path("v");
    let mut running = guest.start();

    let (mut stream, _) = reset.accept().unwrap();
    let mut some = vec![0; 1 << 20];
    stream.read_exact(&mut some).unwrap();
    // What it did not read makes it a reset.
    drop(stream);
    running.expect("broken: ");

    let before = own_memory(running.child.id());
    let streams: Vec<UnixStream> = (0..LAZY).map(|_| lazy.accept().unwrap().0).collect();
    thread::spawn(move || echo(other.accept().unwrap().0));
    running.expect("stalled: ");
    let after = own_memory(running.child.id());
    // A client that the guest refuses is disconnected.
    let mut client = UnixStream::connect(&socket).unwrap();
    client.write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    let received: u64 = streams.into_iter().map(verify).sum();
    let console = ended_well(running);
    assert!(
        console.contains(&format!("stalled: {received}\n")),
        "{received}: {console}"
    );
    assert!(console.contains(&format!("drained: {LAZY}")), "{console}");
    // ECONNRESET, and that or EPIPE.
    assert!(console.contains("refused: 104"), "{console}");
    let broken = ["broken: 104", "broken: 32"];
    assert!(
        broken.iter().any(|text| console.contains(text)),
        "{console}"
    );
    let held = LAZY as u64 * 128;
    println!("own memory: {before} KiB, {after} KiB with {held} KiB held");
    assert!(after < before + held + 4096, "{before} {after}");
}
