//! Whose an address is: what a guest may reach without being allowed to depends on it.
//!
//! An IPv6 address may stand for an IPv4 one, which a translator or a tunnel of the host
//! makes of it: then it is of the kind that is closed to more guests.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::net::host::KnownHost;

/// Kinds of addresses, from those that are open to those that never are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Anybody's on the internet.
    Public,
    /// Of a network that the host is on, whatever its addresses look like.
    Near,
    /// Of a private network: a LAN, a VPN.
    Private,
    /// It has no meaning outside of one link, or none yet.
    Special,
    /// A cloud tells the host there who it is, and gives it credentials.
    Metadata,
    /// The host's own.
    Host,
    /// The host's loopback, or an IPv4 address that is written as an IPv6 one.
    Loopback,
}

impl Kind {
    /// The kind of an address.
    pub fn of(address: IpAddr, host: &KnownHost) -> Self {
        match address {
            IpAddr::V4(address) => of_ipv4(address, host),
            IpAddr::V6(address) => {
                let inner = translated(address);
                let inner = inner.into_iter().flatten().map(|it| of_ipv4(it, host));
                inner.fold(of_ipv6(address, host), Kind::max)
            }
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Public => "a public address",
            Kind::Near => "an address of a network that the host is on",
            Kind::Private => "a private address",
            Kind::Special => "an address of a link, or a reserved one",
            Kind::Metadata => "the address of a cloud's metadata service",
            Kind::Host => "an address of the host's own",
            Kind::Loopback => "the host's loopback",
        })
    }
}

fn of_ipv4(address: Ipv4Addr, host: &KnownHost) -> Kind {
    match address.octets() {
        // "This network" reaches the host, too.
        [0 | 127, ..] => Kind::Loopback,
        _ if host.owns(address.into()) => Kind::Host,
        // Alibaba, Oracle, Azure.
        [100, 100, 100, 200] | [192, 0, 0, 192] | [168, 63, 129, 16] => Kind::Metadata,
        // Of AWS, Google, Azure, Oracle, DigitalOcean, OpenStack and others.
        [169, 254, 169 | 170, _] => Kind::Metadata,
        // A link's; the IETF's; several machines'; reserved, and all of a network's.
        [169, 254, ..] | [192, 0, 0, _] | [224..=255, ..] => Kind::Special,
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => Kind::Private,
        // Shared by a provider's customers (RFC 6598); for benchmarks (RFC 2544).
        [100, 64..=127, ..] | [198, 18..=19, ..] => Kind::Private,
        _ if host.is_near(address.into()) => Kind::Near,
        _ => Kind::Public,
    }
}

fn of_ipv6(address: Ipv6Addr, host: &KnownHost) -> Kind {
    match address.segments() {
        // The unspecified address, loopback; IPv4 as `::127.0.0.1`, `::ffff:127.0.0.1`
        // (RFC 4291, 2.5.5) and `::ffff:0:127.0.0.1` (RFC 2765, 2.1).
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] | [0, 0, 0, 0, 0xffff, 0, ..] => Kind::Loopback,
        _ if host.owns(address.into()) => Kind::Host,
        // AWS, Google, Oracle, Scaleway.
        [0xfd00, 0xec2, ..] | [0xfd20, 0xce, ..] | [0xfd00, 0xc1, ..] | [0xfd00, 0x42, ..] => {
            Kind::Metadata
        }
        [0xfe80..=0xfebf | 0xff00..=0xffff, ..] => Kind::Special,
        // Unique local addresses, and the site-local ones of old.
        [0xfc00..=0xfdff | 0xfec0..=0xfeff, ..] => Kind::Private,
        // IPv4 behind a translator of the site's own (RFC 8215), which knows where in
        // the address that is.
        [0x64, 0xff9b, 1, ..] => Kind::Private,
        _ if host.is_near(address.into()) => Kind::Near,
        _ => Kind::Public,
    }
}

/// The IPv4 addresses that an IPv6 one may lead to.
fn translated(address: Ipv6Addr) -> [Option<Ipv4Addr>; 2] {
    let ipv4 = |high: u16, low: u16| Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low));
    match address.segments() {
        // NAT64 (RFC 6052).
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => [Some(ipv4(high, low)), None],
        // 6to4 (RFC 3056).
        [0x2002, high, low, ..] => [Some(ipv4(high, low)), None],
        // Teredo (RFC 4380, 4): its server, and its client.
        [0x2001, 0, server, of_server, _, _, high, low] => {
            [Some(ipv4(server, of_server)), Some(ipv4(!high, !low))]
        }
        // ISATAP (RFC 5214, 6.1).
        [_, _, _, _, 0 | 0x200, 0x5efe, high, low] => [Some(ipv4(high, low)), None],
        _ => [None, None],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::host::HostNetworks;

    #[test]
    fn every_spelling_is_known() {
        let networks = |all: &[&str]| all.iter().map(|text| text.parse().unwrap()).collect();
        let host = KnownHost::new(&HostNetworks {
            own: networks(&["203.0.113.7", "192.168.1.5", "2001:db8:1::7", "127.0.0.0/8"]),
            near: networks(&["203.0.113.0/24", "192.168.1.0/24", "2001:db8:1::/64"]),
        });
        for (kind, all) in [
            (
                Kind::Public,
                "1.1.1.1 100.63.255.255 100.128.0.0 169.253.255.255 172.15.0.1 172.32.0.1 \
                 192.0.1.1 198.20.0.1 223.255.255.255 2001:db8::1 64:ff9b::1.1.1.1 \
                 2002:101:101::1 2001:0:101:101::fefe:fefe 2001:db8::5efe:1.1.1.1",
            ),
            (Kind::Near, "203.0.113.8 2001:db8:1::8 64:ff9b::203.0.113.8"),
            (
                Kind::Private,
                "10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.6 100.64.0.1 100.127.255.255 \
                 198.18.0.1 fc00::1 fdff::1 fec0::1 64:ff9b::10.0.0.1 64:ff9b:1::1 \
                 2002:a00:1::1 2001:0:a00:1::fefe:fefe 2001:0:101:101::f5ff:fffe \
                 2001:db8::5efe:10.0.0.1 2001:db8::200:5efe:192.168.0.1",
            ),
            (
                Kind::Special,
                "169.254.0.1 192.0.0.1 224.0.0.1 239.1.2.3 240.0.0.1 255.255.255.255 fe80::1 \
                 febf::1 ff02::1 64:ff9b::169.254.1.1 2002:a9fe:101::",
            ),
            (
                Kind::Metadata,
                "169.254.169.254 169.254.170.2 100.100.100.200 192.0.0.192 168.63.129.16 \
                 fd00:ec2::254 fd20:ce::254 fd00:c1::a9fe:a9fe fd00:42::42 \
                 64:ff9b::169.254.169.254 2002:a9fe:a9fe::1 2001:0:a9fe:a9fe:: \
                 2001:0:101:101::5601:5601 2001:db8::5efe:169.254.169.254",
            ),
            (
                Kind::Host,
                "203.0.113.7 192.168.1.5 2001:db8:1::7 64:ff9b::192.168.1.5 2002:c0a8:105::",
            ),
            (
                Kind::Loopback,
                "127.0.0.1 127.9.9.9 0.0.0.0 0.1.2.3 ::1 :: ::127.0.0.1 ::1.1.1.1 \
                 ::ffff:127.0.0.1 ::ffff:1.1.1.1 ::ffff:0:1.1.1.1 64:ff9b::127.0.0.1 \
                 2002:7f00:1:: 2001:0:7f00:1:: 2001:0:101:101::80ff:fffe 2001:db8::5efe:0.0.0.0",
            ),
        ] {
            for text in all.split_whitespace() {
                assert_eq!(Kind::of(text.parse().unwrap(), &host), kind, "{text}");
            }
        }
    }
}
