//! What a guest's user network lets pass. It sees what the guest sends before
//! anything of the host does, and is out of the guest's reach.
//!
//! passt opens sockets on behalf of the guest wherever its packets are for, as a process
//! of the host: what trusts the host, or listens there, would trust the guest. So there
//! is a filter always, which looks at whose an address is (`kind.rs`):
//!
//! | to | without `allow` | `isolated` | with `allow` |
//! |---|---|---|---|
//! | the internet | open | open | a rule names it |
//! | private networks, and those the host is on | open | closed | a rule names it |
//! | a link's, reserved, metadata, the host's own | closed | closed | a rule names it, not /0 |
//! | the host's loopback | closed | closed | closed, unless `host-loopback` |
//!
//! A rule with a name opens the addresses that the resolver gave in answer to a query for
//! it, for as long as it said, and connections that were begun then, longer: of the
//! internet, as a name's owner may let it lead anywhere.
//!
//! Always open are queries to the resolvers, with `allow` only by UDP and for names that
//! a rule names; answers of published ports; ARP, neighbour discovery and DHCP, which end
//! in passt.
//!
//! It also sees which clients of published ports the guest has not answered, and asks it
//! again (`resend.rs`).
//!
//! Packets must be plain: no fragments, VLANs, IP options or extension headers.

mod answer;
mod dns;
mod flow;
mod frame;
mod kind;
mod resend;
pub mod rule;
mod table;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use mayfly_devices::virtio::net::{FrameFilter, Verdict};
use serde::{Deserialize, Serialize};

use self::dns::Question;
use self::flow::{End, Flow};
use self::frame::{Frame, Packet, Segment, Upper, icmp};
use self::kind::Kind;
use self::resend::Requests;
use self::rule::Rule;
use self::table::Table;
use super::host::KnownHost;
use super::publish::Protocol;
use super::user::{UserConfig, UserNet};

const DNS: u16 = 53;
const DHCP: (u16, u16) = (68, 67);
const DHCP_6: (u16, u16) = (546, 547);
/// Connections and addresses that are known at once.
const FLOWS_MAX: usize = 4096;
const OPENED_MAX: usize = 4096;
/// Queries that wait for their answers, and for how long.
const ASKED_MAX: usize = 256;
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// For how long an address is open, whatever the answer says.
const TTL: std::ops::RangeInclusive<u32> = 60..=86_400;
/// The time without a packet after which passt forgets a connection, too.
const TCP_IDLE: Duration = Duration::from_secs(7200);
const UDP_IDLE: Duration = Duration::from_secs(180);
/// The shortest time between two log lines about denials.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// A query that a resolver was sent.
struct Asked {
    resolver: IpAddr,
    guest_port: u16,
    question: Question,
    end: Instant,
}

/// Why a packet does not pass.
enum Denied {
    /// The guest is told, and perhaps the log.
    Refused(Kind),
    /// The guest gets this datagram from the resolver.
    Name(String, Vec<u8>),
    /// It is malformed, or nothing that a user would miss.
    Silently,
}

#[derive(Clone, Copy, Default)]
struct Counters {
    packets: u64,
    names: u64,
    malformed: u64,
}

/// What a guest may reach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressPolicy {
    net: UserNet,
    /// With any, what they name and nothing else is open.
    rules: Vec<Rule>,
    /// Private networks are closed, too.
    isolated: bool,
    published: Vec<(Protocol, u16)>,
    /// The gateway's address is the host's loopback.
    host_loopback: bool,
}

impl EgressPolicy {
    /// What a user says of a guest's network.
    pub fn new(net: &UserNet, config: &UserConfig) -> Self {
        let published = config.publish.iter();
        let published = published.map(|publish| (publish.protocol, publish.guest));
        EgressPolicy {
            net: net.clone(),
            rules: config.allow.clone(),
            isolated: config.isolated,
            published: published.collect(),
            host_loopback: config.host_loopback,
        }
    }
}

/// The filter of one guest.
pub struct Egress {
    policy: EgressPolicy,
    host: KnownHost,
    flows: Table<Flow>,
    /// Addresses of names, with the port that their rule has.
    opened: Table<(IpAddr, Option<u16>)>,
    asked: VecDeque<Asked>,
    /// Requests of clients of published ports.
    requests: Requests,
    counters: Counters,
    /// When the log was told last, and of how many it was not.
    told: Option<Instant>,
    untold: u64,
}

impl Egress {
    /// A filter for a guest, on a host whose own networks are known.
    pub fn new(policy: EgressPolicy, host: KnownHost) -> Self {
        Egress {
            policy,
            host,
            flows: Table::new(FLOWS_MAX),
            opened: Table::new(OPENED_MAX),
            asked: VecDeque::new(),
            requests: Requests::default(),
            counters: Counters::default(),
            told: None,
            untold: 0,
        }
    }

    fn kind(&self, address: IpAddr) -> Kind {
        // Behind it is the host's loopback.
        match self.policy.net.is_gateway(address) {
            true if self.policy.host_loopback => Kind::Public,
            true => Kind::Loopback,
            false => Kind::of(address, &self.host),
        }
    }

    /// Only a rule with the address opens it.
    fn is_closed(&self, kind: Kind) -> bool {
        match kind {
            Kind::Public => false,
            Kind::Near | Kind::Private => self.policy.isolated,
            Kind::Special | Kind::Metadata | Kind::Host | Kind::Loopback => true,
        }
    }

    /// A rule with a name opens it. A LAN's is not, also where it is open to others:
    /// whoever answers for a name would say what of a private network is open.
    fn is_for_names(&self, kind: Kind) -> bool {
        kind <= Kind::Near && !self.is_closed(kind)
    }

    fn judge(&mut self, packet: &Packet, now: Instant) -> Result<(), Denied> {
        if is_configuration(packet) || self.policy.rules.is_empty() && is_dhcp_6(packet) {
            return Ok(());
        }
        let to = packet.destination;
        if is_many(to) {
            return Err(Denied::Silently);
        }
        let kind = self.kind(to);
        let loopback = self.policy.net.is_gateway(to) && !self.policy.host_loopback;
        if kind == Kind::Loopback && !loopback {
            return Err(Denied::Refused(kind));
        }
        if !self.policy.rules.is_empty() && !self.policy.net.is_guest(packet.source) {
            return Err(match packet.source {
                // What it uses to talk to who is on its link.
                IpAddr::V6(own) if own.is_unicast_link_local() => Denied::Refused(kind),
                _ => Denied::Silently,
            });
        }
        if self.policy.rules.is_empty() && !self.is_closed(kind) {
            return Ok(());
        }
        let port = match &packet.upper {
            Upper::Tcp(segment) => Some(segment.destination),
            Upper::Udp { destination, .. } => Some(*destination),
            Upper::Icmp(icmp::ECHO_REQUEST | icmp::ECHO_REQUEST_6) => None,
            Upper::Icmp(_) => return Err(Denied::Silently),
        };
        if port == Some(DNS) && self.policy.net.dns.contains(&to) {
            return self.judge_query(packet, loopback, now);
        }
        if loopback {
            return self.go_on(packet, kind, now);
        }
        self.judge_address(packet, kind, port, now)
    }

    /// A conversation that was begun before goes on: one that the guest began only while
    /// a name may open the address.
    fn go_on(&mut self, packet: &Packet, kind: Kind, now: Instant) -> Result<(), Denied> {
        let begins = matches!(packet.upper, Upper::Tcp(segment) if segment.opens());
        let ends: &[End] = match self.is_for_names(kind) {
            true => &[End::Peer, End::Guest],
            false => &[End::Peer],
        };
        let flows = ends.iter().filter_map(|&end| outgoing_flow(packet, end));
        let known = flows
            .filter(|_| !begins)
            .find(|flow| self.flows.has(flow, now));
        let flow = known.ok_or(Denied::Refused(kind))?;
        self.flows.keep(flow, now, flow.protocol.idle());
        Ok(())
    }

    fn judge_address(
        &mut self,
        packet: &Packet,
        kind: Kind,
        port: Option<u16>,
        now: Instant,
    ) -> Result<(), Denied> {
        let peer = packet.destination;
        let closed = self.is_closed(kind);
        let permits = |rule: &Rule| match closed {
            true => rule.permits_explicitly(peer, port),
            false => rule.permits(peer, port),
        };
        if self.policy.rules.iter().any(permits) {
            return Ok(());
        }
        // It may have become the host's own meanwhile.
        let opened = self.is_for_names(kind)
            && (self.opened.has(&(peer, None), now)
                || port.is_some() && self.opened.has(&(peer, port), now));
        if !opened {
            return self.go_on(packet, kind, now);
        }
        if let Some(flow) = outgoing_flow(packet, End::Guest) {
            self.flows.keep(flow, now, flow.protocol.idle());
        }
        Ok(())
    }

    /// A packet to a resolver's port: a query by UDP for a name that a rule
    /// names, or to where a rule says so with the port. Those for the host's
    /// loopback are for its resolver, which only takes UDP from here.
    fn judge_query(&mut self, packet: &Packet, loopback: bool, now: Instant) -> Result<(), Denied> {
        let resolver = packet.destination;
        let explicit = |rule: &Rule| rule.port == Some(DNS) && rule.permits(resolver, Some(DNS));
        let explicit = self.policy.rules.iter().any(explicit);
        let Upper::Udp { source, data, .. } = packet.upper else {
            let passes = (explicit || self.policy.rules.is_empty()) && !loopback;
            let refused = || Denied::Refused(self.kind(resolver));
            return passes.then_some(()).ok_or_else(refused);
        };
        if self.policy.rules.is_empty() {
            return Ok(());
        }
        let Some((question, end)) = dns::query(data) else {
            return explicit.then_some(()).ok_or(Denied::Silently);
        };
        let named = self
            .policy
            .rules
            .iter()
            .any(|rule| rule.names(&question.name));
        if !named && !explicit {
            let refusal = dns::refuse(data, end).ok_or(Denied::Silently)?;
            return Err(Denied::Name(question.name, refusal));
        }
        if named {
            if self.asked.len() >= ASKED_MAX {
                self.asked.pop_front();
            }
            self.asked.push_back(Asked {
                resolver,
                guest_port: source,
                question,
                end: now + ANSWER_TIME,
            });
        }
        Ok(())
    }

    /// A resolver answers: once for each query.
    fn learn(&mut self, resolver: IpAddr, guest_port: u16, data: &[u8], now: Instant) -> bool {
        self.asked.retain(|asked| now < asked.end);
        let answered = self.asked.iter().enumerate().find_map(|(index, asked)| {
            let from = asked.resolver == resolver && asked.guest_port == guest_port;
            let addresses = from.then(|| dns::addresses(data, &asked.question))?;
            Some((index, addresses?))
        });
        let Some((index, addresses)) = answered else {
            return false;
        };
        let Some(asked) = self.asked.remove(index) else {
            return false;
        };
        for &(address, ttl) in &addresses {
            // The gateway is private, whatever is behind it.
            let kind = Kind::of(address, &self.host);
            if !self.is_for_names(kind) {
                // A rule may have the address itself.
                let name = &asked.question.name;
                self.tell(format_args!("{name} at {address}"), Some(kind), now);
                continue;
            }
            let time = Duration::from_secs(ttl.clamp(*TTL.start(), *TTL.end()).into());
            let naming = |rule: &&Rule| rule.names(&asked.question.name);
            for rule in self.policy.rules.iter().filter(naming) {
                self.opened.keep((address, rule.port), now, time);
            }
        }
        true
    }

    fn tell(&mut self, what: std::fmt::Arguments, kind: Option<Kind>, now: Instant) {
        if self.told.is_some_and(|told| now < told + TELL_EVERY) {
            self.untold += 1;
            return;
        }
        self.told = Some(now);
        let kind = kind.map(|kind| format!(": it is {kind}"));
        let kind = kind.unwrap_or_default();
        match std::mem::take(&mut self.untold) {
            0 => log::info!("network: {what} is not allowed{kind}"),
            more => log::info!("network: {what} is not allowed{kind} ({more} more before)"),
        }
    }
}

impl FrameFilter for Egress {
    fn outgoing(&mut self, frame: &[u8], now: Instant) -> Verdict {
        let packet = match Frame::parse(frame) {
            Some(Frame::Arp(sender)) => {
                let own = sender.is_unspecified() || self.policy.net.is_guest(sender.into());
                return match own || self.policy.rules.is_empty() {
                    true => Verdict::Pass,
                    false => Verdict::Drop,
                };
            }
            Some(Frame::Ip(packet)) => packet,
            None => {
                self.counters.malformed += 1;
                return Verdict::Drop;
            }
        };
        let answer = match self.judge(&packet, now) {
            Ok(()) => {
                if let Upper::Tcp(segment) = packet.upper
                    && (segment.syn || segment.rst)
                    && let Some(flow) = outgoing_flow(&packet, End::Peer)
                {
                    self.requests.remove(&flow);
                }
                return Verdict::Pass;
            }
            Err(Denied::Silently) => {
                self.counters.packets += 1;
                None
            }
            Err(Denied::Name(name, refusal)) => {
                self.counters.names += 1;
                self.tell(format_args!("a query for {name}"), None, now);
                answer::datagram(&packet, &refusal)
            }
            Err(Denied::Refused(kind)) => {
                self.counters.packets += 1;
                self.tell(format_args!("{packet}"), Some(kind), now);
                answer::refusal(&packet)
            }
        };
        answer.map_or(Verdict::Drop, Verdict::Answer)
    }

    fn incoming(&mut self, frame: &[u8], now: Instant) -> bool {
        if self.policy.rules.is_empty() && self.policy.published.is_empty() {
            return true;
        }
        let Some(Frame::Ip(packet)) = Frame::parse(frame) else {
            return true;
        };
        if let Upper::Udp {
            source: DNS,
            destination,
            data,
        } = packet.upper
            && !self.policy.rules.is_empty()
            && self.policy.net.dns.contains(&packet.source)
        {
            // What a resolver that is allowed by itself says opens nothing.
            let explicit = |rule: &Rule| rule.permits(packet.source, Some(DNS));
            return self.learn(packet.source, destination, data, now)
                || self.policy.rules.iter().any(explicit);
        }
        let begins = match &packet.upper {
            Upper::Tcp(segment) => segment.opens(),
            Upper::Udp { .. } => true,
            Upper::Icmp(_) => false,
        };
        if let Some(flow) = incoming_flow(&packet)
            && begins
            && self
                .policy
                .published
                .contains(&(flow.protocol, flow.guest_port))
        {
            self.flows.keep(flow, now, flow.protocol.idle());
            if flow.protocol == Protocol::Tcp {
                self.requests.add(flow, frame, now);
            }
        }
        if let Upper::Tcp(Segment { rst: true, .. }) = packet.upper
            && let Some(flow) = incoming_flow(&packet)
        {
            self.requests.remove(&flow);
        }
        true
    }

    fn next_due(&self) -> Option<Instant> {
        self.requests.next_due()
    }

    fn take_due(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.requests.take(now)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Counters {
            packets,
            names,
            malformed,
        } = self.counters;
        vec![
            ("denied_packets", packets),
            ("denied_names", names),
            ("malformed_packets", malformed),
            ("resent_requests", self.requests.resent()),
        ]
    }
}

impl Protocol {
    fn idle(self) -> Duration {
        match self {
            Protocol::Tcp => TCP_IDLE,
            Protocol::Udp => UDP_IDLE,
        }
    }
}

fn ports(packet: &Packet) -> Option<(Protocol, u16, u16)> {
    match &packet.upper {
        Upper::Tcp(segment) => Some((Protocol::Tcp, segment.source, segment.destination)),
        Upper::Udp {
            source,
            destination,
            ..
        } => Some((Protocol::Udp, *source, *destination)),
        Upper::Icmp(_) => None,
    }
}

fn outgoing_flow(packet: &Packet, begun_by: End) -> Option<Flow> {
    ports(packet).map(|(protocol, guest_port, peer_port)| Flow {
        begun_by,
        protocol,
        guest_port,
        peer: packet.destination,
        peer_port,
    })
}

fn incoming_flow(packet: &Packet) -> Option<Flow> {
    ports(packet).map(|(protocol, peer_port, guest_port)| Flow {
        begun_by: End::Peer,
        protocol,
        guest_port,
        peer: packet.source,
        peer_port,
    })
}

/// It asks for an address, a route or a neighbour: passt itself answers that.
fn is_configuration(packet: &Packet) -> bool {
    match (&packet.upper, packet.destination) {
        (
            Upper::Udp {
                source,
                destination,
                ..
            },
            IpAddr::V4(to),
        ) => (*source, *destination) == DHCP && to.is_broadcast(),
        (Upper::Icmp(icmp::ROUTER_SOLICITATION), IpAddr::V6(to)) => is_link_multicast(to),
        (
            Upper::Icmp(icmp::NEIGHBOR_SOLICITATION | icmp::NEIGHBOR_ADVERTISEMENT),
            IpAddr::V6(to),
        ) => is_link_multicast(to) || is_private(to),
        _ => false,
    }
}

/// The same for DHCPv6. What is none of it passt would pass on, so this is not
/// for guests that may not talk to whom they like.
fn is_dhcp_6(packet: &Packet) -> bool {
    let ports = ports(packet).map(|(_, from, to)| (from, to));
    let link = |to| matches!(to, IpAddr::V6(to) if is_link_multicast(to));
    ports == Some(DHCP_6) && link(packet.destination)
}

/// ff02::/16
fn is_link_multicast(address: Ipv6Addr) -> bool {
    address.segments()[0] == 0xff02
}

/// Of a private network (RFC 4193), as the guest's own is.
fn is_private(address: Ipv6Addr) -> bool {
    address.is_unique_local() || address.is_unicast_link_local()
}

/// It is for several machines.
fn is_many(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_multicast() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_multicast(),
    }
}

impl std::fmt::Display for Packet<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let to = self.destination;
        match &self.upper {
            Upper::Tcp(segment) => write!(f, "TCP to {to} port {}", segment.destination),
            Upper::Udp { destination, .. } => write!(f, "UDP to {to} port {destination}"),
            Upper::Icmp(_) => write!(f, "ICMP to {to}"),
        }
    }
}
