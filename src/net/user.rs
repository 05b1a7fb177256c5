//! The network that a guest has through passt: addresses of its own, that mean
//! nothing outside.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::cidr::Cidr;
use super::egress::rule::Rule;
use super::publish::Publish;

/// The guest's address …
pub const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// … its gateway, which is passt …
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// … and how many bits they share.
pub const PREFIX: u8 = 24;
const GUEST_IP6: Ipv6Addr = Ipv6Addr::new(0xfd6d, 0x6179, 0x666c, 0, 0, 0, 0, 0x15);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd6d, 0x6179, 0x666c, 0, 0, 0, 0, 2);
const PREFIX6: u8 = 64;
/// glibc reads no more.
const RESOLVERS_MAX: usize = 3;

const RESOLV_CONF: &str = "/etc/resolv.conf";
const ROUTES6: &str = "/proc/net/ipv6_route";
const ADDRESSES6: &str = "/proc/net/if_inet6";

/// What a guest is to be configured with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNet {
    /// Its address.
    pub guest_ip: Ipv4Addr,
    /// How many bits its network's addresses share.
    pub prefix: u8,
    /// Its default route.
    pub gateway: Ipv4Addr,
    /// The same for IPv6, if the host has that.
    pub ip6: Option<UserNet6>,
    /// Its resolvers.
    pub dns: Vec<IpAddr>,
    /// The host's resolvers, in the same order, loopback ones first. They are for passt, and
    /// not sent to the VMM process.
    #[serde(skip)]
    pub(super) resolvers: Vec<IpAddr>,
}

/// A guest's IPv6.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNet6 {
    /// Its address.
    pub guest_ip: Ipv6Addr,
    /// How many bits its network's addresses share.
    pub prefix: u8,
    /// Its default route.
    pub gateway: Ipv6Addr,
    /// The host's device with its default route, which is for passt alone, too.
    #[serde(skip)]
    pub(super) device: String,
}

impl UserNet6 {
    /// By a device of the host's.
    pub fn new(device: String) -> Self {
        UserNet6 {
            guest_ip: GUEST_IP6,
            prefix: PREFIX6,
            gateway: GATEWAY6,
            device,
        }
    }
}

/// A network of sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserConfig {
    /// The guest's ports that the host has.
    pub publish: Vec<Publish>,
    /// What alone the guest may reach, if there is any.
    pub allow: Vec<Rule>,
    /// The guest's resolvers; else the host's.
    pub dns: Vec<IpAddr>,
    /// The guest reaches no private networks, unless it is allowed to.
    pub isolated: bool,
    /// The gateway's address is the host's loopback.
    pub host_loopback: bool,
}

/// What of the host's network a user network is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostNetwork {
    /// The host's resolvers.
    pub resolvers: Vec<IpAddr>,
    /// The device of its IPv6 default route, if it has one that can be used.
    pub ipv6_device: Option<String>,
}

impl HostNetwork {
    /// Looks it up.
    pub fn look_up() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        HostNetwork {
            resolvers: nameservers(&read(RESOLV_CONF)),
            ipv6_device: device6(&read(ROUTES6), &read(ADDRESSES6)),
        }
    }
}

impl UserNet {
    /// What a guest gets on a host.
    pub fn new(config: &UserConfig, host: &HostNetwork) -> Self {
        let resolvers = match config.dns.is_empty() {
            true => host.resolvers.clone(),
            false => config.dns.clone(),
        };
        UserNet::with(resolvers, host.ipv6_device.clone())
    }

    fn with(mut resolvers: Vec<IpAddr>, device: Option<String>) -> Self {
        let ip6 = device.map(UserNet6::new);
        resolvers.retain(|resolver| resolver.is_ipv4() || ip6.is_some());
        resolvers.sort_by_key(|resolver| !resolver.is_loopback());
        resolvers.truncate(RESOLVERS_MAX);
        let mut dns: Vec<IpAddr> = resolvers
            .iter()
            .map(|resolver| match resolver {
                // The host's own is behind the gateway.
                IpAddr::V4(address) if address.is_loopback() => GATEWAY.into(),
                IpAddr::V6(address) if address.is_loopback() => GATEWAY6.into(),
                address => *address,
            })
            .collect();
        dns.dedup();
        UserNet {
            guest_ip: GUEST_IP,
            prefix: PREFIX,
            gateway: GATEWAY,
            ip6,
            dns,
            resolvers,
        }
    }

    /// It may be the guest's.
    pub(super) fn is_guest(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => address == self.guest_ip,
            // It may choose the second half.
            IpAddr::V6(_) => self.ip6.as_ref().is_some_and(|ip6| {
                let own = Cidr::of(ip6.guest_ip.into(), ip6.prefix);
                own.contains(address) && !self.is_gateway(address)
            }),
        }
    }

    /// It is the gateway's.
    pub(super) fn is_gateway(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => address == self.gateway,
            IpAddr::V6(address) => self.ip6.as_ref().is_some_and(|ip6| address == ip6.gateway),
        }
    }

    /// The `ip=` of the kernel's command line for a device of the guest.
    pub fn cmdline(&self, device: &str) -> String {
        let mask = u32::MAX
            .checked_shl(32 - u32::from(self.prefix))
            .unwrap_or(0);
        let resolver = |index: usize| {
            let all = self.dns.iter().filter(|address| address.is_ipv4());
            all.skip(index).map(|address| format!(":{address}")).next()
        };
        format!(
            "ip={}::{}:{}::{device}:off{}{}",
            self.guest_ip,
            self.gateway,
            Ipv4Addr::from(mask),
            resolver(0).unwrap_or_default(),
            resolver(1).unwrap_or_default()
        )
    }
}

/// The addresses of a `resolv.conf`.
fn nameservers(text: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next())?
        })
        .filter_map(|word| word.parse().ok())
        .collect()
}

/// The device of IPv6's default route, if it also has the address on its link
/// that passt needs: without, it has no IPv6, and says nothing.
fn device6(routes: &str, addresses: &str) -> Option<String> {
    /// Linux' `route.h` and `ipv6.h`.
    const UP: u32 = 1;
    const REJECT: u32 = 0x200;
    const SCOPE_LINK: &str = "20";
    let on_link = |device: &str| {
        addresses.lines().any(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.get(3) == Some(&SCOPE_LINK) && words.get(5) == Some(&device)
        })
    };
    routes.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [to, bits, .., flags, device] = words[..] else {
            return None;
        };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let default = bits == "00" && to.bytes().all(|digit| digit == b'0');
        let usable = flags & (UP | REJECT) == UP && device != "lo" && on_link(device);
        (default && usable).then(|| device.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES: &str = "\
        fd000000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n\
        00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n";
    const DEFAULT: &str = "\
        00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd000000000000000000000000000001 00000400 00000002 00000000 00000003     eth0\n";
    const LINK: &str = "fe8000000000000000fc00fffe000001 04 40 20 80     eth0\n";

    #[test]
    fn ipv6_needs_a_route_and_a_link() {
        assert_eq!(device6(ROUTES, LINK), None);
        let routes = format!("{ROUTES}{DEFAULT}");
        assert_eq!(device6(&routes, LINK).as_deref(), Some("eth0"));
        assert_eq!(device6(&routes, &LINK.replace("eth0", "eth1")), None);
        assert_eq!(device6(&routes, ""), None);
        assert_eq!(device6(&routes.replace("00000003", "00000203"), LINK), None);
    }

    #[test]
    fn the_hosts_own_resolver_is_behind_the_gateway() {
        let resolvers = nameservers(
            "# nameserver 9.9.9.9\nnameserver 1.1.1.1\nsearch example.com\n\
             nameserver 127.0.0.53\nnameserver fe80::1%eth0\nnameserver ::1\n nameserver 2001:db8::1 x",
        );
        let addresses = |text: &str| -> Vec<IpAddr> {
            text.split(' ').map(|word| word.parse().unwrap()).collect()
        };
        let net = UserNet::with(resolvers.clone(), None);
        assert_eq!(net.dns, addresses("10.0.2.2 1.1.1.1"));
        assert_eq!(net.resolvers, addresses("127.0.0.53 1.1.1.1"));
        assert_eq!(
            net.cmdline("eth0"),
            "ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off:10.0.2.2:1.1.1.1"
        );
        let net = UserNet::with(resolvers, Some("eth0".into()));
        assert_eq!(net.dns, addresses("10.0.2.2 fd6d:6179:666c::2 1.1.1.1"));
        assert_eq!(
            UserNet::with(Vec::new(), None)
                .cmdline("eth1")
                .matches(':')
                .count(),
            6
        );
    }

    #[test]
    fn the_guest_may_choose_the_end_of_its_address() {
        let net = UserNet::with(Vec::new(), Some("eth0".into()));
        for (address, own) in [
            ("10.0.2.15", true),
            ("10.0.2.16", false),
            ("10.0.2.2", false),
            ("fd6d:6179:666c::15", true),
            ("fd6d:6179:666c::1234", true),
            ("fd6d:6179:666c::2", false),
            ("fd6d:6179:666d::15", false),
            ("fe80::1", false),
        ] {
            assert_eq!(net.is_guest(address.parse().unwrap()), own, "{address}");
        }
    }
}
