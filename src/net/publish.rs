//! Ports of the guest that clients of the host's reach.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::str::FromStr;

use rustix::io::Errno;
use rustix::net::sockopt::{set_ipv6_v6only, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

const SYNTAX: &str = "write [[IP:]HOST-PORT:]GUEST-PORT[/udp], or ranges of ports, as 8000-8009";
/// How many ports of one VM may be published: each is a socket of passt's.
pub const PORTS_MAX: usize = 1024;

/// What a port is a port of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the guest that one of the host leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    /// Where the host listens.
    pub ip: IpAddr,
    /// At which port.
    pub host: HostPort,
    /// Where the guest does.
    pub guest: u16,
    /// At ports of what.
    pub protocol: Protocol,
}

/// A port of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPort {
    /// This one.
    Exact(u16),
    /// The first of these that is free.
    Within(RangeInclusive<u16>),
    /// Any that is free.
    Any,
}

impl Publish {
    /// Where the host listens, once its port is chosen.
    pub fn address(&self) -> Option<SocketAddr> {
        match self.host {
            HostPort::Exact(port) => Some(SocketAddr::new(self.ip, port)),
            HostPort::Within(_) | HostPort::Any => None,
        }
    }

    /// Reads what the user writes: a port, or ranges of them, each port by itself.
    pub fn parse(text: &str) -> Result<Vec<Self>, String> {
        parse(text).map_err(|reason| format!("{text}: {reason}; {SYNTAX}"))
    }
}

fn parse(text: &str) -> Result<Vec<Publish>, String> {
    let (ports, protocol) = match text.rsplit_once('/') {
        None => (text, Protocol::Tcp),
        Some((ports, protocol)) => match protocol.to_ascii_lowercase().as_str() {
            "tcp" => (ports, Protocol::Tcp),
            "udp" => (ports, Protocol::Udp),
            _ => return Err("is neither of TCP nor of UDP".into()),
        },
    };
    let (host, guest) = match ports.rsplit_once(':') {
        None => ("", ports),
        Some(parts) => parts,
    };
    let (ip, host) = match host.rsplit_once(':') {
        None => (Ipv4Addr::LOCALHOST.into(), host),
        Some((address, host)) => (parse_address(address)?, host),
    };
    let guests = parse_range(guest)?;
    let hosts = match host {
        "" | "0" => None,
        host => Some(parse_range(host)?),
    };
    let one = |host, guest| Publish {
        ip,
        host,
        guest,
        protocol,
    };
    let Some(hosts) = hosts else {
        return Ok(guests.map(|guest| one(HostPort::Any, guest)).collect());
    };
    let (of_host, of_guest) = (hosts.clone().count(), guests.clone().count());
    match (of_host, of_guest) {
        (1, 1) => Ok(vec![one(HostPort::Exact(*hosts.start()), *guests.start())]),
        (_, 1) => Ok(vec![one(HostPort::Within(hosts), *guests.start())]),
        _ if of_host == of_guest => {
            let pairs = hosts.zip(guests);
            Ok(pairs
                .map(|(host, guest)| one(HostPort::Exact(host), guest))
                .collect())
        }
        _ => Err(format!(
            "has {of_host} of the host's ports for {of_guest} of the guest's"
        )),
    }
}

fn parse_address(text: &str) -> Result<IpAddr, String> {
    let plain = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let plain = plain.unwrap_or(text);
    plain
        .parse()
        .map_err(|_| format!("{text:?} is not an address"))
}

fn parse_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let port = |text: &str| match text.parse() {
        Ok(port @ 1..) if !text.starts_with('+') => Ok(port),
        _ => Err(format!("{text:?} is not a port")),
    };
    let range = match text.split_once('-') {
        None => port(text).map(|port| port..=port),
        Some((first, last)) => Ok(port(first)?..=port(last)?),
    }?;
    match range.clone().count() {
        0 => Err(format!("{text} ends before it begins")),
        1..=PORTS_MAX => Ok(range),
        _ => Err(format!("{text} has more than {PORTS_MAX} ports")),
    }
}

impl FromStr for Publish {
    type Err = String;

    /// Reads one port.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut all = Publish::parse(text)?;
        match (all.pop(), all.is_empty()) {
            (Some(one), true) => Ok(one),
            _ => Err(format!("{text}: is more than one port; {SYNTAX}")),
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostPort::Exact(port) => write!(f, "{port}"),
            HostPort::Within(ports) => write!(f, "{}-{}", ports.start(), ports.end()),
            HostPort::Any => f.write_str("0"),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            IpAddr::V4(ip) => write!(f, "{ip}:")?,
            IpAddr::V6(ip) => write!(f, "[{ip}]:")?,
        }
        write!(f, "{}:{}", self.host, self.guest)?;
        match self.protocol {
            Protocol::Tcp => Ok(()),
            Protocol::Udp => f.write_str("/udp"),
        }
    }
}

/// Ports, as the user would write them: without loopback's address, and ranges where
/// there are some.
pub fn summary(all: &[Publish]) -> Vec<String> {
    let mut ranges: Vec<(&Publish, u16)> = Vec::new();
    for publish in all {
        let follows = |(first, more): &(&Publish, u16)| {
            let next = |port: u16| port.checked_add(*more)?.checked_add(1);
            let (HostPort::Exact(known), HostPort::Exact(host)) = (&first.host, &publish.host)
            else {
                return false;
            };
            (first.ip, first.protocol) == (publish.ip, publish.protocol)
                && next(*known) == Some(*host)
                && next(first.guest) == Some(publish.guest)
        };
        match ranges.last_mut().filter(|last| follows(last)) {
            Some((_, more)) => *more += 1,
            None => ranges.push((publish, 0)),
        }
    }
    let write = |(first, more): (&Publish, u16)| {
        let text = match (&first.host, more) {
            (HostPort::Exact(host), 1..) => {
                let (last, guest) = (host.saturating_add(more), first.guest);
                let ports = format!("{host}-{last}:{guest}-{}", guest.saturating_add(more));
                let one = first.to_string();
                one.replacen(&format!("{host}:{guest}"), &ports, 1)
            }
            _ => first.to_string(),
        };
        let short = text.strip_prefix("127.0.0.1:").map(str::to_owned);
        short.unwrap_or(text)
    };
    ranges.into_iter().map(write).collect()
}

/// Holds chosen ports, so that nobody else takes them before passt does.
#[derive(Debug, Default)]
pub struct Reserved {
    _sockets: Vec<OwnedFd>,
}

impl Reserved {
    /// Chooses the host's ports that are to be chosen, and sees whether the others can
    /// be had. What is held is to be let go when passt has them: it would take some of
    /// their datagrams.
    pub fn choose(all: &mut [Publish]) -> Result<Self, Failure> {
        let mut sockets = Vec::new();
        // Those that can only be had as they are come first.
        let exact = |publish: &&mut Publish| matches!(publish.host, HostPort::Exact(_));
        let (exact, chosen): (Vec<_>, Vec<_>) = all.iter_mut().partition(exact);
        for publish in exact.into_iter().chain(chosen) {
            let (socket, port) = reserve(publish).map_err(|error| refusal(publish, &error))?;
            publish.host = HostPort::Exact(port);
            sockets.push(socket);
        }
        Ok(Reserved { _sockets: sockets })
    }
}

fn reserve(publish: &Publish) -> io::Result<(OwnedFd, u16)> {
    match &publish.host {
        HostPort::Exact(port) => hold(publish, *port),
        HostPort::Any => hold(publish, 0),
        HostPort::Within(ports) => ports
            .clone()
            .map(|port| hold(publish, port))
            .find(|held| !matches!(held, Err(error) if error.kind() == io::ErrorKind::AddrInUse))
            .unwrap_or_else(|| Err(Errno::ADDRINUSE.into())),
    }
}

/// Takes a port without listening, so that passt can take it, too (`SO_REUSEADDR`).
fn hold(publish: &Publish, port: u16) -> io::Result<(OwnedFd, u16)> {
    let family = match publish.ip {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let kind = match publish.protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if publish.ip.is_ipv6() {
        set_ipv6_v6only(&socket, true)?;
    }
    // A chosen one is to be nobody else's. A given one may have connections that are
    // about to end.
    let given = matches!(publish.host, HostPort::Exact(_)) && publish.protocol == Protocol::Tcp;
    set_socket_reuseaddr(&socket, given)?;
    bind(&socket, &SocketAddr::new(publish.ip, port))?;
    set_socket_reuseaddr(&socket, true)?;
    let address = SocketAddr::try_from(getsockname(&socket)?)?;
    Ok((socket, address.port()))
}

fn refusal(publish: &Publish, error: &io::Error) -> Failure {
    let why = match error.kind() {
        io::ErrorKind::AddrInUse => match publish.host {
            HostPort::Exact(port) => format!("port {port} of the host is in use"),
            _ => "none of the host's ports is free".to_owned(),
        },
        io::ErrorKind::AddrNotAvailable => format!("{} is no address of this host", publish.ip),
        io::ErrorKind::PermissionDenied => "no permission for a port below \
            net.ipv4.ip_unprivileged_port_start; choose one above 1023"
            .to_owned(),
        _ => error.to_string(),
    };
    Failure::host(format!("--publish {publish}: {why}"))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn ports_are_published_on_loopback_unless_told() {
        for (text, canonical) in [
            ("8080:80", "127.0.0.1:8080:80"),
            ("8080:80/tcp", "127.0.0.1:8080:80"),
            ("8080:80/TCP", "127.0.0.1:8080:80"),
            ("0.0.0.0:53:5353/udp", "0.0.0.0:53:5353/udp"),
            ("[::1]:8080:80", "[::1]:8080:80"),
            ("::1:8080:80", "[::1]:8080:80"),
            ("80", "127.0.0.1:0:80"),
            ("0:80", "127.0.0.1:0:80"),
            (":80", "127.0.0.1:0:80"),
            ("127.0.0.1::80", "127.0.0.1:0:80"),
            ("[::]::80/udp", "[::]:0:80/udp"),
            ("8000-8009:80", "127.0.0.1:8000-8009:80"),
            ("8000-8000:80-80", "127.0.0.1:8000:80"),
        ] {
            let publish: Publish = text.parse().unwrap();
            assert_eq!(publish.to_string(), canonical);
            assert_eq!(canonical.parse(), Ok(publish));
        }
        for bad in [
            "",
            "80:",
            "80:0",
            "0",
            "80:80/sctp",
            "a:80:80",
            "1:65536",
            "65536",
            "+80",
            "8-9-10",
            "9-8",
            "8001-8003:80-81",
            "80:80-81",
            "1-1025:1-1025",
            "-80",
            "80-",
            "0-9:1",
            "::80",
            "1.2.3:80:80",
            "80:80/",
            "80:80:80:80",
        ] {
            let message = Publish::parse(bad).unwrap_err();
            assert!(message.contains("write [[IP:]"), "{bad}: {message}");
        }
    }

    #[test]
    fn ranges_are_ports_and_ports_are_ranges() {
        for (text, number) in [
            ("18081-18083:81-83", 3),
            ("0.0.0.0:18081-18083:81-83/udp", 3),
            ("[::1]:1-1024:1-1024", 1024),
            ("80-82", 3),
            ("8000-8009:80", 1),
            ("8080:80", 1),
        ] {
            let all = Publish::parse(text).unwrap();
            assert_eq!(all.len(), number, "{text}");
            let again: Vec<Publish> = summary(&all)
                .iter()
                .flat_map(|text| Publish::parse(text).unwrap())
                .collect();
            assert_eq!(again, all, "{text}");
        }
        assert!("80-81".parse::<Publish>().is_err());
        let all = [
            "8080:80",
            "8081:81",
            "8083:83",
            "8084:84/udp",
            "[::1]:8085:85",
        ];
        let all: Vec<Publish> = all.iter().map(|text| text.parse().unwrap()).collect();
        let expected = ["8080-8081:80-81", "8083:83", "8084:84/udp", "[::1]:8085:85"];
        assert_eq!(summary(&all), expected);
    }

    fn choose(texts: &[String]) -> Result<(Vec<u16>, Reserved), String> {
        let mut all: Vec<Publish> = texts
            .iter()
            .flat_map(|text| Publish::parse(text).unwrap())
            .collect();
        let reserved = Reserved::choose(&mut all).map_err(|failure| failure.to_string())?;
        let ports = all.iter().map(|it| it.address().unwrap().port());
        Ok((ports.collect(), reserved))
    }

    #[test]
    fn chosen_ports_are_free_and_held() {
        for (protocol, taken) in [("", true), ("/udp", false)] {
            let any = vec![format!("80{protocol}"); 50];
            let (ports, held) = choose(&any).unwrap();
            let (others, _) = choose(&any).unwrap();
            let mut all = [&ports[..], &others].concat();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), 100, "nobody has another's");
            let port = ports[0];
            let address = (Ipv4Addr::LOCALHOST, port);
            let plain = match taken {
                true => TcpListener::bind(address).is_ok(),
                false => UdpSocket::bind(address).is_ok(),
            };
            // The standard library's listeners take it as passt does.
            assert_eq!(plain, taken, "{protocol}");
            drop(held);
            assert!(UdpSocket::bind(address).is_ok());
        }
    }

    #[test]
    fn what_cannot_be_had_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let why = choose(&[format!("{port}:80")]).unwrap_err();
        let expected = format!("--publish 127.0.0.1:{port}:80: port {port} of the host is in use");
        assert_eq!(why, expected);
        let why = choose(&[format!("{port}-{port}:80"), "192.0.2.9:1:80".into()]).unwrap_err();
        assert!(why.contains("is in use"), "{why}");
        let why = choose(&["192.0.2.9:8080:80".into()]).unwrap_err();
        assert!(
            why.ends_with("192.0.2.9 is no address of this host"),
            "{why}"
        );
        // The next of a range, also if another one has it by an earlier word.
        let all_but_first = || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            let (next, end) = (port.checked_add(1)?, port.checked_add(9)?);
            let texts = [format!("{port}-{end}:80"), format!("{next}:81")];
            // Other processes may have the next.
            let (ports, _held) = choose(&texts).ok()?;
            assert_eq!(ports[1], next);
            assert!((next + 1..=end).contains(&ports[0]), "{ports:?}");
            Some(())
        };
        const TRIES: usize = 100;
        assert!((0..TRIES).any(|_| all_but_first().is_some()));
    }
}
