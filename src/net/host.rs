//! The networks of the host, as the kernel's routes tell them: which addresses are the
//! host's own, and which networks it is on. They change while a VM runs.

use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use mayfly_devices::bus::lock;
use mayfly_devices::poll::{entry, poll, ready};
use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with};
use serde::{Deserialize, Serialize};

use super::cidr::Cidr;

/// What changes routes and addresses (`linux/rtnetlink.h`: RTMGRP_LINK, _IPV4_IFADDR,
/// _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE).
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;
/// `linux/netlink.h`: what was listed changed meanwhile.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// So often a list that changed meanwhile is asked for again.
const TRIES: u32 = 10;
/// The kernel sends a list in pieces of at most 32 KiB.
const PIECE: usize = 64 << 10;
const HEADER: usize = 16;
/// Wider routes of a device are those of a VPN that takes all traffic, rather than
/// networks that the host is on.
const WIDEST: u8 = 8;
const WIDEST_6: u8 = 32;
/// Changes in a row are looked at together, this time after the first.
const SETTLE_MS: i32 = 50;
/// How many networks one message to the VMM process has at most.
const PART: usize = 2000;

/// The networks of the host, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNetworks {
    /// What the host itself answers to: its addresses, and their networks' broadcast ones.
    pub own: Vec<Cidr>,
    /// The networks that it reaches without a router.
    pub near: Vec<Cidr>,
}

impl HostNetworks {
    /// Lists them, in this process's network namespace.
    pub fn list() -> io::Result<Self> {
        let mut all = HostNetworks::default();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            all.add_routes(family)?;
        }
        for networks in [&mut all.own, &mut all.near] {
            networks.sort_unstable();
            networks.dedup();
        }
        Ok(all)
    }

    fn add_routes(&mut self, family: AddressFamily) -> io::Result<()> {
        for _ in 0..TRIES {
            let routes = routes(family)?;
            let Some(routes) = routes else { continue };
            for route in &routes {
                self.add(route);
            }
            return Ok(());
        }
        Err(io::Error::other("routes change all the time"))
    }

    fn add(&mut self, route: &RouteMessage) {
        let prefix = route.header.destination_prefix_length;
        let to = route.attributes.iter().find_map(|attribute| {
            let RouteAttribute::Destination(to) = attribute else {
                return None;
            };
            match to {
                RouteAddress::Inet(to) => Some(IpAddr::V4(*to)),
                RouteAddress::Inet6(to) => Some(IpAddr::V6(*to)),
                _ => None,
            }
        });
        let anything = match route.header.address_family {
            AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => return,
        };
        let network = Cidr::of(to.unwrap_or(anything), prefix);
        match route.header.kind {
            // Whole networks that are taken for local (TPROXY: local 0.0.0.0/0) are no
            // addresses of the host's; its loopback is one.
            RouteType::Local if !is_narrow(network) => {}
            RouteType::Local | RouteType::Broadcast | RouteType::Anycast => self.own.push(network),
            RouteType::Unicast if is_near(route, network) => self.near.push(network),
            _ => {}
        }
    }

    /// The same, in parts that fit into a message.
    pub fn parts(&self) -> Vec<HostNetworks> {
        let part = |own: &[Cidr], near: &[Cidr]| HostNetworks {
            own: own.to_vec(),
            near: near.to_vec(),
        };
        let own = self.own.chunks(PART).map(|own| part(own, &[]));
        let near = self.near.chunks(PART).map(|near| part(&[], near));
        let mut all: Vec<_> = own.chain(near).collect();
        if all.is_empty() {
            all.push(HostNetworks::default());
        }
        all
    }
}

/// It is no wider than a network of one site, or of the loopback.
fn is_narrow(network: Cidr) -> bool {
    let widest = match network.address() {
        IpAddr::V4(_) => WIDEST,
        IpAddr::V6(_) => WIDEST_6,
    };
    network.prefix() >= widest
}

/// It leads to who is on the other end of a device, without a router between.
fn is_near(route: &RouteMessage, network: Cidr) -> bool {
    let routed = route.attributes.iter().any(|attribute| {
        matches!(
            attribute,
            RouteAttribute::Gateway(_)
                | RouteAttribute::Via(_)
                | RouteAttribute::MultiPath(_)
                | RouteAttribute::NhId(_)
        )
    });
    !routed && is_narrow(network)
}

fn open(groups: u32, flags: SocketFlags) -> io::Result<OwnedFd> {
    let flags = flags | SocketFlags::CLOEXEC;
    let family = rustix::net::AddressFamily::NETLINK;
    // Of no protocol is the one for routes.
    let socket = socket_with(family, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

/// Lists the routes of all tables; none if they changed meanwhile.
fn routes(family: AddressFamily) -> io::Result<Option<Vec<RouteMessage>>> {
    let socket = open(0, SocketFlags::empty())?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut all = RouteMessage::default();
    all.header.address_family = family;
    let payload = NetlinkPayload::from(RouteNetlinkMessage::GetRoute(all));
    let mut request = NetlinkMessage::new(header, payload);
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    retry_on_intr(|| send(&socket, &bytes, SendFlags::empty()))?;

    let (mut routes, mut whole) = (Vec::new(), true);
    let mut piece = vec![0; PIECE];
    loop {
        let (len, _) = retry_on_intr(|| recv(&socket, &mut piece[..], RecvFlags::empty()))?;
        let mut rest = piece.get(..len).unwrap_or_default();
        if rest.len() < HEADER {
            return Err(io::ErrorKind::InvalidData.into());
        }
        while rest.len() >= HEADER {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(io::Error::other)?;
            whole &= message.header.flags & NLM_F_DUMP_INTR == 0;
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(whole.then_some(routes)),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => {
                    routes.push(route);
                }
                _ => {}
            }
            let len = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(len.max(HEADER)..).unwrap_or_default();
        }
    }
}

/// Hears of changes of the host's networks.
#[derive(Debug)]
pub struct Watch(OwnedFd);

impl Watch {
    /// Begins to listen: what changes from here on is heard of.
    pub fn open() -> io::Result<Self> {
        open(GROUPS, SocketFlags::NONBLOCK).map(Watch)
    }

    /// Tells how the host's networks are, and how they are after each change, until a
    /// descriptor is readable or nobody listens.
    pub fn follow(self, end: &impl AsFd, tell: impl Fn(&HostNetworks) -> io::Result<()>) {
        let end = end.as_fd().as_raw_fd();
        let mut told = None;
        loop {
            match HostNetworks::list() {
                Ok(now) if told.as_ref() != Some(&now) => {
                    if tell(&now).is_err() {
                        return;
                    }
                    told = Some(now);
                }
                Ok(_) => {}
                Err(error) => log::warn!("network: listing the host's addresses: {error}"),
            }
            if ready(end, libc::POLLIN, SETTLE_MS) {
                return;
            }
            let mut sources = [self.0.as_raw_fd(), end].map(|fd| entry(fd, libc::POLLIN));
            while poll(&mut sources, -1).is_err_and(|it| it.kind() == io::ErrorKind::Interrupted) {}
            if sources[1].revents != 0 {
                return;
            }
            self.forget();
        }
    }

    /// What it says is of no interest, nor that it would have said more.
    fn forget(&self) {
        let mut piece = [0; 4096];
        while matches!(
            recv(&self.0, &mut piece[..], RecvFlags::TRUNC),
            Ok(_) | Err(Errno::INTR | Errno::NOBUFS)
        ) {}
    }
}

/// Addresses, to look one up quickly: ranges in order, apart from each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Addresses(Vec<(u128, u128)>);

impl Addresses {
    fn new(networks: &[Cidr]) -> Self {
        let mut ranges: Vec<_> = networks
            .iter()
            .map(|network| {
                let first = bits(network.address());
                let free = match network.address() {
                    IpAddr::V4(_) => 32,
                    IpAddr::V6(_) => 128,
                } - u32::from(network.prefix());
                let rest = 1u128.checked_shl(free).map_or(u128::MAX, |size| size - 1);
                (first, first | rest)
            })
            .collect();
        ranges.sort_unstable();
        ranges.dedup_by(|next, known| {
            let within = next.0 <= known.1;
            known.1 = if within { known.1.max(next.1) } else { known.1 };
            within
        });
        Addresses(ranges)
    }

    fn contains(&self, address: IpAddr) -> bool {
        let address = bits(address);
        let after = self.0.partition_point(|(first, _)| *first <= address);
        let candidate = after.checked_sub(1).and_then(|index| self.0.get(index));
        candidate.is_some_and(|(_, last)| address <= *last)
    }
}

/// An IPv4 address is where IPv6 has it.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

#[derive(Debug, Default)]
struct Known {
    own: Addresses,
    near: Addresses,
}

/// What is known of the host's networks: shared by who learns of them, and who asks.
#[derive(Clone, Debug, Default)]
pub struct KnownHost(Arc<Mutex<Known>>);

impl KnownHost {
    /// The host's networks as they are now.
    pub fn new(networks: &HostNetworks) -> Self {
        let known = KnownHost::default();
        known.set(networks);
        known
    }

    /// They are different now.
    pub fn set(&self, networks: &HostNetworks) {
        let new = Known {
            own: Addresses::new(&networks.own),
            near: Addresses::new(&networks.near),
        };
        *lock(&self.0) = new;
    }

    /// The host itself answers to the address.
    pub fn owns(&self, address: IpAddr) -> bool {
        lock(&self.0).own.contains(address)
    }

    /// The host reaches the address without a router.
    pub fn is_near(&self, address: IpAddr) -> bool {
        lock(&self.0).near.contains(address)
    }
}

/// Puts together what comes in parts, for all who ask.
#[derive(Debug, Default)]
pub struct Updates {
    known: Vec<KnownHost>,
    parts: HostNetworks,
}

impl Updates {
    /// Those who ask.
    pub fn new(known: Vec<KnownHost>) -> Self {
        let parts = HostNetworks::default();
        Updates { known, parts }
    }

    /// A part comes, after which there are more or not.
    pub fn take(&mut self, part: HostNetworks, more: bool) {
        self.parts.own.extend(part.own);
        self.parts.near.extend(part.near);
        if !more {
            let all = mem::take(&mut self.parts);
            for known in &self.known {
                known.set(&all);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(all: &[&str]) -> Vec<Cidr> {
        all.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn addresses_are_found_in_networks() {
        let all = [
            "10.0.0.0/8",
            "10.1.0.0/16",
            "192.168.1.5",
            "fd00::/64",
            "2001:db8::1",
            "192.168.1.4",
        ];
        let known = Addresses::new(&networks(&all));
        for (address, found) in [
            ("10.255.255.255", true),
            ("11.0.0.0", false),
            ("9.255.255.255", false),
            ("10.1.2.3", true),
            ("192.168.1.3", false),
            ("192.168.1.4", true),
            ("192.168.1.5", true),
            ("192.168.1.6", false),
            ("fd00::ffff:1", true),
            ("fd00:0:0:1::", false),
            ("2001:db8::1", true),
            ("2001:db8::2", false),
            ("0.0.0.0", false),
            ("::", false),
        ] {
            assert_eq!(known.contains(address.parse().unwrap()), found, "{address}");
        }
        let everything = Addresses::new(&networks(&["::/0"]));
        assert!(everything.contains("ffff::".parse().unwrap()));
        assert!(!Addresses::default().contains("::1".parse().unwrap()));
    }

    /// Every host has its loopback addresses.
    #[test]
    fn this_host_owns_its_loopback() {
        let listed = HostNetworks::list().unwrap();
        let known = KnownHost::new(&listed);
        assert!(known.owns(Ipv4Addr::new(127, 3, 2, 1).into()), "{listed:?}");
        assert!(!known.owns(Ipv4Addr::new(192, 0, 2, 1).into()));
    }

    #[test]
    fn a_long_list_comes_in_parts() {
        let many = (0..PART as u32 + 5).map(|it| Cidr::of(Ipv4Addr::from_bits(it).into(), 32));
        let all = HostNetworks {
            own: many.collect(),
            near: networks(&["192.168.7.0/24"]),
        };
        let known = KnownHost::default();
        let mut updates = Updates::new(vec![known.clone()]);
        let mut parts = all.parts().into_iter().peekable();
        let mut count = 0;
        while let Some(part) = parts.next() {
            let text = serde_json::to_string(&part).unwrap();
            assert!(text.len() < 100 << 10);
            assert!(!known.owns(Ipv4Addr::from_bits(7).into()));
            let part = serde_json::from_str(&text).unwrap();
            updates.take(part, parts.peek().is_some());
            count += 1;
        }
        assert_eq!(count, 3);
        assert!(known.owns(Ipv4Addr::from_bits(PART as u32 + 4).into()));
        assert!(known.is_near(Ipv4Addr::new(192, 168, 7, 9).into()));
    }
}
