//! Ports of the guest that clients of the host's reach.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

const SYNTAX: &str = "write [IP:]HOST-PORT:GUEST-PORT[/udp]";

/// What a port is a port of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publish {
    /// Where the host listens.
    pub host: SocketAddr,
    /// Where the guest does.
    pub guest: u16,
    /// At ports of what.
    pub protocol: Protocol,
}

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = |reason: &str| format!("{text}: {reason}; {SYNTAX}");
        let port = |port: &str| match port.parse() {
            Ok(port @ 1..) => Ok(port),
            _ => Err(refuse(&format!("{port:?} is not a port"))),
        };
        let (ports, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((ports, "tcp")) => (ports, Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some(_) => return Err(refuse("is neither of TCP nor of UDP")),
        };
        let (host, guest) = ports
            .rsplit_once(':')
            .ok_or_else(|| refuse("has no guest's port"))?;
        let (address, host) = match host.rsplit_once(':') {
            None => (Ipv4Addr::LOCALHOST.into(), host),
            Some((address, host)) => {
                let plain = address
                    .strip_prefix('[')
                    .and_then(|rest| rest.strip_suffix(']'));
                let address: IpAddr = plain
                    .unwrap_or(address)
                    .parse()
                    .map_err(|_| refuse(&format!("{address:?} is not an address")))?;
                (address, host)
            }
        };
        Ok(Publish {
            host: SocketAddr::new(address, port(host)?),
            guest: port(guest)?,
            protocol,
        })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "",
            Protocol::Udp => "/udp",
        };
        write!(f, "{}:{}{protocol}", self.host, self.guest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_published_on_loopback_unless_told() {
        for (text, canonical) in [
            ("8080:80", "127.0.0.1:8080:80"),
            ("8080:80/tcp", "127.0.0.1:8080:80"),
            ("0.0.0.0:53:5353/udp", "0.0.0.0:53:5353/udp"),
            ("[::1]:8080:80", "[::1]:8080:80"),
            ("::1:8080:80", "[::1]:8080:80"),
        ] {
            let publish: Publish = text.parse().unwrap();
            assert_eq!(publish.to_string(), canonical);
            assert_eq!(canonical.parse(), Ok(publish));
        }
        for bad in [
            "",
            "80",
            ":80",
            "80:",
            "0:80",
            "80:0",
            "80:80/sctp",
            "a:80:80",
            "1:65536",
        ] {
            let message = bad.parse::<Publish>().unwrap_err();
            assert!(message.contains("write [IP:]"), "{bad}: {message}");
        }
    }
}
