//! What TCP costs, from an instance to its host and back, through the network that its
//! engine gives it.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use mayfly_protocol::peer::{CHUNK, LAST, Meeting, SECRET, Secret, Task, Way};
use mayfly_protocol::steady::Figure;

use super::repeat::{MIB, ROUNDS, nanoseconds, repeated};

/// How long bytes flow in a round: longer than TCP needs to find its speed.
const WHILE: Duration = Duration::from_millis(200);
/// How long the peer may take to answer, also where a helper starts with the first packet.
const PEER_TIMEOUT: Duration = Duration::from_secs(10);
/// The kernel's IPv4 routes; those of loopback are not among them.
const ROUTES: &str = "/proc/net/route";
/// `RTF_UP` of `linux/route.h`
const UP: u32 = 1;

/// Looks for the way to the peer, and takes all figures on it, or none.
pub fn measure(meeting: &Meeting) -> (Vec<Figure>, Way) {
    match find(meeting) {
        Ok((stream, address, way)) => match figures(stream, address, meeting) {
            Ok(figures) => (figures, way),
            Err(error) => (Vec::new(), Way::Lost(error.to_string())),
        },
        Err(_) if !has_routes(&fs::read_to_string(ROUTES).unwrap_or_default()) => {
            (Vec::new(), Way::None)
        }
        Err(error) => (Vec::new(), Way::Lost(error.to_string())),
    }
}

/// A connection to the peer. Loopback comes first: with a network of its own, an instance
/// meets nobody there, and without, it asks nobody else.
fn find(meeting: &Meeting) -> io::Result<(TcpStream, SocketAddr, Way)> {
    let reach = |address: Ipv4Addr| {
        let address = SocketAddr::new(IpAddr::V4(address), meeting.port);
        call(address, meeting, Task::Echo).map(|stream| (stream, address))
    };
    if let Ok((stream, address)) = reach(Ipv4Addr::LOCALHOST) {
        return Ok((stream, address, Way::Loopback));
    }
    let mut last = io::Error::other("the host has no address but loopback");
    for &own in &meeting.addresses {
        match reach(own) {
            Ok((stream, address)) => return Ok((stream, address, Way::Network)),
            Err(error) => last = io::Error::other(format!("{own}: {error}")),
        }
    }
    Err(last)
}

/// Whether there is a route that is up.
fn has_routes(text: &str) -> bool {
    // Interface, destination, gateway, flags, …
    let flags = |line: &str| u32::from_str_radix(line.split_whitespace().nth(3)?, 16).ok();
    let mut lines = text.lines().skip(1);
    lines.any(|line| flags(line).is_some_and(|flags| flags & UP != 0))
}

/// Connects, and checks that the peer knows the second secret.
fn call(address: SocketAddr, meeting: &Meeting, task: Task) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, PEER_TIMEOUT)?;
    stream.set_read_timeout(Some(PEER_TIMEOUT))?;
    stream.set_write_timeout(Some(PEER_TIMEOUT))?;
    stream.set_nodelay(true)?;
    let mut greeting = [0; SECRET + 1];
    let [question @ .., last] = &mut greeting;
    *question = meeting.question;
    *last = task as u8;
    stream.write_all(&greeting)?;
    let mut answer: Secret = [0; SECRET];
    stream.read_exact(&mut answer)?;
    match answer == meeting.answer {
        true => Ok(stream),
        false => Err(io::Error::other("the answer is not our peer's")),
    }
}

fn figures(echo: TcpStream, address: SocketAddr, meeting: &Meeting) -> io::Result<Vec<Figure>> {
    let round_trip = rounds(|| round_trip(&echo))?;
    drop(echo);
    let send = rounds(|| send(call(address, meeting, Task::Sink)?))?;
    let receive = rounds(|| receive(call(address, meeting, Task::Source)?))?;
    let figures = [
        Figure::of("tcp_send", "MiB/s", send),
        Figure::of("tcp_receive", "MiB/s", receive),
        Figure::of("tcp_round_trip", "ns", round_trip),
    ];
    Ok(figures.into_iter().flatten().collect())
}

fn rounds(once: impl FnMut() -> io::Result<f64>) -> io::Result<Vec<f64>> {
    std::iter::repeat_with(once).take(ROUNDS).collect()
}

/// Nanoseconds for a byte, there and back.
fn round_trip(mut stream: &TcpStream) -> io::Result<f64> {
    let mut byte = [0x5a];
    let mut failed = None;
    let (count, time) = repeated(|| {
        let back = stream
            .write_all(&byte)
            .and_then(|()| stream.read_exact(&mut byte));
        failed = failed.take().or(back.err());
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(nanoseconds(count, time)),
    }
}

/// MiB a second to the host: until it has all, not until the last is in a buffer.
fn send(mut stream: TcpStream) -> io::Result<f64> {
    let mut chunk = vec![0; CHUNK];
    let mut sent = 0.0;
    let start = Instant::now();
    loop {
        let last = start.elapsed() >= WHILE;
        if let (true, Some(first)) = (last, chunk.first_mut()) {
            *first = LAST;
        }
        stream.write_all(&chunk)?;
        sent += CHUNK as f64;
        if last {
            break;
        }
    }
    stream.read_exact(&mut [0])?;
    Ok(sent / MIB / start.elapsed().as_secs_f64())
}

/// MiB a second from the host.
fn receive(mut stream: TcpStream) -> io::Result<f64> {
    let mut chunk = vec![0; CHUNK];
    let mut received = 0.0;
    let start = Instant::now();
    while start.elapsed() < WHILE {
        match stream.read(&mut chunk)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            len => received += len as f64,
        }
    }
    Ok(received / MIB / start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    const HEAD: &str =
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT  \n";

    #[test]
    fn a_network_has_routes() {
        assert!(!has_routes(""));
        assert!(!has_routes(HEAD));
        let line =
            |flags| format!("eth0\t00000000\t0202000A\t{flags}\t0\t0\t0\t00000000\t0\t0\t0\n");
        assert!(has_routes(&format!("{HEAD}{}", line("0003"))));
        assert!(has_routes(&format!(
            "{HEAD}{}{}",
            line("0200"),
            line("0001")
        )));
        assert!(!has_routes(&format!("{HEAD}{}", line("0200"))));
        assert!(!has_routes(&format!("{HEAD}eth0\t0000\n{}", line("none"))));
    }

    /// Nothing is taken for the peer that does not know the second secret.
    #[test]
    fn a_stranger_is_no_peer() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let meeting = Meeting {
            port: listener.local_addr().unwrap().port(),
            addresses: Vec::new(),
            question: [1; SECRET],
            answer: [2; SECRET],
        };
        let stranger = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut greeting = [0; SECRET + 1];
            stream.read_exact(&mut greeting).unwrap();
            // It knows what it received, and no more.
            stream.write_all(&greeting).unwrap();
            greeting
        });
        let (figures, way) = measure(&meeting);
        assert!(figures.is_empty());
        assert!(matches!(way, Way::None | Way::Lost(_)), "{way:?}");
        assert_eq!(stranger.join().unwrap()[SECRET], b'e');
    }
}
