use std::net::SocketAddr;

use super::*;

const SHORT: Duration = Duration::from_millis(300);

fn short() -> Limits {
    Limits {
        greeting: SHORT,
        ..LIMITS
    }
}

fn connect(peer: &Peer) -> TcpStream {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, peer.meeting.port)).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream
}

fn greeting(peer: &Peer, task: u8) -> Vec<u8> {
    [&peer.meeting.question[..], &[task]].concat()
}

/// One who knows the secrets.
fn call(peer: &Peer, task: Task) -> TcpStream {
    let mut stream = connect(peer);
    stream.write_all(&greeting(peer, task as u8)).unwrap();
    let mut answer = [0; SECRET];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, peer.meeting.answer);
    stream
}

/// The bytes that come until it is disconnected.
fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Err(error) if error.kind() != io::ErrorKind::ConnectionReset => panic!("{error}"),
        _ => all,
    }
}

#[test]
fn it_echoes_takes_and_gives() {
    let peer = Peer::start(Origin::Host).unwrap();
    let mut stream = call(&peer, Task::Echo);
    for text in [&b"a"[..], &[7; 3 * ECHO]] {
        stream.write_all(text).unwrap();
        let mut back = vec![0; text.len()];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(back, text);
    }

    let mut stream = call(&peer, Task::Sink);
    let mut chunk = vec![0; CHUNK];
    stream.write_all(&chunk).unwrap();
    // Nothing is confirmed before all of it is there.
    chunk[0] = LAST;
    stream.write_all(&chunk[..CHUNK - 1]).unwrap();
    stream.set_read_timeout(Some(SHORT)).unwrap();
    assert_eq!(
        stream.read(&mut [0]).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    stream.write_all(&chunk[CHUNK - 1..]).unwrap();
    stream.read_exact(&mut [0]).unwrap();

    let mut stream = call(&peer, Task::Source);
    stream.read_exact(&mut vec![0; 10 * CHUNK]).unwrap();
}

/// The secret, the whole secret, and a task, in time: else no byte comes back.
#[test]
fn strangers_hear_nothing() {
    let peer = Peer::limited(Origin::Anywhere, short()).unwrap();
    let mut wrong = greeting(&peer, b'e');
    wrong[SECRET - 1] ^= 1;
    let no_task = greeting(&peer, b'x');
    for said in [&wrong, &no_task, &wrong[..5], &[]] {
        let mut stream = connect(&peer);
        stream.write_all(said).unwrap();
        let start = Instant::now();
        assert!(rest(&mut stream).is_empty(), "{said:?}");
        // Who is only slow has its time.
        let patient = start.elapsed() >= SHORT - TICK;
        assert_eq!(patient, said.len() <= SECRET, "{said:?}");
    }
    // A byte at a time buys none.
    let mut slow = connect(&peer);
    let start = Instant::now();
    for byte in greeting(&peer, b'e') {
        if slow.write_all(&[byte]).is_err() {
            break;
        }
        thread::sleep(SHORT / 6);
    }
    assert!(rest(&mut slow).is_empty());
    assert!(start.elapsed() > SHORT);
    call(&peer, Task::Echo);
}

/// A connection has its time and its bytes, whatever it is for.
#[test]
fn nobody_gets_more_than_its_share() {
    const BYTES: usize = 4 * CHUNK;
    let limits = Limits {
        life: 3 * SHORT,
        bytes: BYTES as u64,
        ..short()
    };
    let peer = Peer::limited(Origin::Host, limits).unwrap();
    let mut stream = call(&peer, Task::Source);
    assert!(rest(&mut stream).len() < BYTES);
    let mut stream = call(&peer, Task::Sink);
    let chunk = vec![0; CHUNK];
    // It is disconnected while it sends.
    while stream.write_all(&chunk).is_ok() {}
    // One that neither sends nor reads is over, too.
    for task in [Task::Echo, Task::Sink] {
        let mut stream = call(&peer, task);
        let start = Instant::now();
        assert!(rest(&mut stream).is_empty());
        assert!(start.elapsed() >= SHORT);
    }
    let limits = Limits {
        life: SHORT,
        ..LIMITS
    };
    let peer = Peer::limited(Origin::Host, limits).unwrap();
    let mut stream = call(&peer, Task::Source);
    thread::sleep(3 * SHORT);
    // What it had not read was in buffers, and no more comes.
    rest(&mut stream);
}

#[test]
fn a_flood_is_turned_away() {
    let limits = Limits {
        at_once: 3,
        total: 40,
        ..short()
    };
    let peer = Peer::limited(Origin::Host, limits).unwrap();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, peer.meeting.port));
    let mut echo = call(&peer, Task::Echo);
    let idle = [connect(&peer), connect(&peer)];
    // There is no place.
    for _ in 0..5 {
        assert!(rest(&mut connect(&peer)).is_empty());
    }
    // Whose places strangers held is served once their time is over.
    thread::sleep(2 * SHORT);
    drop(idle);
    call(&peer, Task::Source);
    let start = Instant::now();
    let mut calls = 0;
    while TcpStream::connect(address).is_ok() {
        calls += 1;
        assert!(calls < 200, "it still listens");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(start.elapsed() < Duration::from_secs(10));
    // Who was there before still is.
    echo.write_all(b"x").unwrap();
    echo.read_exact(&mut [0]).unwrap();
}

/// For those whose connections come from this host, nobody else is listened to.
#[test]
fn only_the_host_itself_is_welcome() {
    let peer = |origin| Peer::limited(origin, short()).unwrap();
    let from_elsewhere = |peer: &Peer| {
        // As one of another address: both ends are on loopback here.
        let server = Server {
            origin: Origin::Host,
            limits: LIMITS,
            meeting: peer.meeting.clone(),
            over: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
        };
        let stream = connect(peer);
        let welcome = |from: Ipv4Addr| server.welcome(&stream, IpAddr::V4(from));
        (
            welcome(Ipv4Addr::LOCALHOST),
            welcome(Ipv4Addr::new(192, 0, 2, 77)),
        )
    };
    assert_eq!(from_elsewhere(&peer(Origin::Host)), (true, false));
    // By each of the host's addresses it is.
    let host = peer(Origin::Host);
    for &address in &host.meeting.addresses {
        let mut stream = TcpStream::connect((address, host.meeting.port)).unwrap();
        stream.write_all(&greeting(&host, b'e')).unwrap();
        let mut answer = [0; SECRET];
        stream.read_exact(&mut answer).unwrap();
    }
}

/// It is over at once, whatever is going on.
#[test]
fn it_ends_when_it_is_dropped() {
    let peer = Peer::start(Origin::Host).unwrap();
    let mut streams = [Task::Echo, Task::Sink, Task::Source].map(|task| call(&peer, task));
    let silent = connect(&peer);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, peer.meeting.port));
    let start = Instant::now();
    drop(peer);
    assert!(start.elapsed() < Duration::from_secs(3));
    assert!(TcpStream::connect(address).is_err());
    streams.iter_mut().for_each(|stream| drop(rest(stream)));
    drop(silent);
}

#[test]
fn no_two_peers_have_the_same_secrets() {
    let [one, other] = [(), ()].map(|()| Peer::start(Origin::Host).unwrap());
    assert_ne!(one.meeting.question, other.meeting.question);
    assert_ne!(one.meeting.question, one.meeting.answer);
}
