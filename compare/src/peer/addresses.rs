//! By which addresses the host can be met.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use mayfly_protocol::peer::ADDRESSES_MAX;

/// The kernel's IPv4 routes, those to itself among them.
const TRIE: &str = "/proc/net/fib_trie";
/// For documentation (RFC 5737): it is nobody's.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// The host's own addresses but loopback's: first the one that the rest of the world sees.
pub fn own() -> Vec<Ipv4Addr> {
    let mut addresses = local(&fs::read_to_string(TRIE).unwrap_or_default());
    let first = towards(ELSEWHERE);
    addresses.sort_by_key(|&address| Some(address) != first);
    addresses.truncate(ADDRESSES_MAX);
    addresses
}

/// The address that a connection to there would have. Nothing is sent.
fn towards(there: Ipv4Addr) -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((there, 9)).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

/// The addresses in a trie: each stands above what is known of it.
fn local(trie: &str) -> Vec<Ipv4Addr> {
    let mut found: Vec<Ipv4Addr> = Vec::new();
    let mut above = None;
    for line in trie.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            above = address.parse::<Ipv4Addr>().ok();
        } else if line == "/32 host LOCAL" {
            let useful = |it: &Ipv4Addr| !it.is_loopback() && !it.is_link_local();
            found.extend(above.filter(|it| useful(it) && !found.contains(it)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_once() {
        let table = "
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.88.0.0/31 1 0 0
        |-- 10.88.0.0
           /16 link UNICAST
        |-- 10.88.0.1
           /32 host LOCAL
     |-- 10.88.255.255
        /32 link BROADCAST
     |-- 127.0.0.0
        /8 host LOCAL
     |-- 127.0.0.1
        /32 host LOCAL
     |-- 169.254.7.7
        /32 host LOCAL
     |-- 192.0.2.2
        /24 link UNICAST
        /32 host LOCAL
";
        let both = format!("Main:{table}Local:{table}");
        let expected = [Ipv4Addr::new(10, 88, 0, 1), Ipv4Addr::new(192, 0, 2, 2)];
        assert_eq!(local(&both), expected);
        assert!(local("|-- nobody\n/32 host LOCAL\n/32 host LOCAL").is_empty());
    }

    #[test]
    fn this_host_s_own_can_be_bound_to() {
        for address in own() {
            UdpSocket::bind((address, 0)).unwrap();
        }
    }
}
