//! Asks addresses, in the guests of tests, and prints which ones answer, and else the error
//! that the kernel has of it.
//!
//!     reach udp|ping ADDRESS…

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType, ipproto, socket};

/// The UDP port that datagrams are sent to.
const PORT: u16 = 8001;
/// For an answer; a refusal comes at once.
const TIMEOUT: Duration = Duration::from_secs(10);
/// An echo request (RFC 792, RFC 4443); the kernel fills in the checksum and the identifier.
const PING: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 1];
const PING_6: [u8; 8] = [128, 0, 0, 0, 0, 0, 0, 1];

/// An address; one of a link is followed by `%eth0`.
fn parse(text: &str) -> io::Result<SocketAddr> {
    let (address, device) = text.split_once('%').unwrap_or((text, ""));
    let address = address.parse().map_err(io::Error::other)?;
    Ok(match address {
        IpAddr::V6(address) if !device.is_empty() => {
            let index = std::fs::read_to_string(format!("/sys/class/net/{device}/ifindex"))?;
            let index = index.trim().parse().map_err(io::Error::other)?;
            SocketAddrV6::new(address, PORT, 0, index).into()
        }
        address => (address, PORT).into(),
    })
}

fn ask(protocol: &str, address: &str) -> io::Result<()> {
    let to = parse(address)?;
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let (protocol, message) = match (protocol, to) {
        ("ping", SocketAddr::V4(_)) => (ipproto::ICMP, &PING),
        ("ping", SocketAddr::V6(_)) => (ipproto::ICMPV6, &PING_6),
        _ => (ipproto::UDP, b"question"),
    };
    let client = socket(family, SocketType::DGRAM, Some(protocol))?;
    let client = UdpSocket::from(client);
    client.set_read_timeout(Some(TIMEOUT))?;
    client.connect(to)?;
    client.send(message)?;
    client.recv(&mut [0; 100])?;
    Ok(())
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let Some((protocol, addresses)) = words.split_first() else {
        return;
    };
    for address in addresses {
        match ask(protocol, address) {
            Ok(()) => println!("{protocol} {address}: answered"),
            Err(error) => println!("{protocol} {address}: {error}"),
        }
    }
}
