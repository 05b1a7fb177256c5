//! The filter of a user network. What passes is read again by a decoder that knows
//! nothing of the filter's, and must be allowed as that sees it.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use mayfly::net::egress::{Egress, EgressPolicy};
use mayfly::net::host::{HostNetworks, KnownHost};
use mayfly::net::user::{HostNetwork, UserConfig, UserNet, UserNet6};
use mayfly_devices::virtio::net::{FrameFilter, Verdict};

/// The host's own, for a start.
const OWN: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 1, 0, 7), Ipv4Addr::new(93, 184, 216, 35)];
const ALLOWED: [&str; 5] = [
    "10.1.0.0/16:443",
    "192.0.2.7",
    "2001:db8::/32",
    "a.example",
    "*.b.example:80",
];
const NAMES: [&str; 6] = [
    "a.example",
    "A.exAmple",
    "x.b.example",
    "b.example",
    "c.test",
    "b",
];
const RESOLVER: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 9);
const DNS: u16 = 53;
const STEPS_MAX: usize = 32;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// What happens.
#[derive(Arbitrary, Debug)]
pub enum Step {
    /// The guest sends a frame.
    Out(Vec<u8>),
    /// It gets one.
    In(Vec<u8>),
    /// The guest sends a segment or datagram.
    Send(Peer, Packet),
    /// It gets one.
    Get(Peer, Packet),
    /// It asks for a name.
    Ask(u16, u16, u8),
    /// The resolver answers with addresses, and more.
    Answer(u16, u16, u8, Vec<Record>, Vec<u8>),
    /// So many seconds pass.
    Wait(u16),
}

/// Somebody.
#[derive(Arbitrary, Debug)]
pub enum Peer {
    Resolver,
    Gateway,
    Web,
    Named,
    Allowed(u16),
    Any(u32),
    Six([u16; 3]),
    AnySix([u8; 16]),
}

/// What is sent.
#[derive(Arbitrary, Debug)]
pub struct Packet {
    tcp: bool,
    own: u16,
    port: u16,
    flags: u8,
    data: Vec<u8>,
}

/// A record of an answer: of the name itself, or of another.
#[derive(Arbitrary, Debug)]
pub struct Record {
    owner: Option<u8>,
    data: Data,
}

#[derive(Arbitrary, Debug)]
pub enum Data {
    Web,
    Four([u8; 4]),
    Six([u8; 16]),
    Alias(u8),
}

fn net() -> &'static (UserNet, UserConfig) {
    static NET: OnceLock<(UserNet, UserConfig)> = OnceLock::new();
    NET.get_or_init(|| {
        let publish = ["8080:80", "5353:53/udp"];
        let config = UserConfig {
            publish: publish.map(|text| text.parse().unwrap()).into(),
            allow: ALLOWED.map(|text| text.parse().unwrap()).into(),
            dns: vec![RESOLVER.into()],
            ..UserConfig::default()
        };
        let mut net = UserNet::new(&config, &HostNetwork::default());
        // Whatever this host has.
        net.ip6 = Some(UserNet6::new("eth0".into()));
        (net, config)
    })
}

impl Peer {
    fn address(&self) -> IpAddr {
        match self {
            Peer::Resolver => RESOLVER.into(),
            Peer::Gateway => net().0.gateway.into(),
            Peer::Web => Ipv4Addr::new(93, 184, 216, 34).into(),
            Peer::Named => Ipv4Addr::new(192, 0, 2, 7).into(),
            Peer::Allowed(host) => Ipv4Addr::from(0x0a01_0000 | u32::from(*host)).into(),
            Peer::Any(address) => Ipv4Addr::from(*address).into(),
            Peer::Six([a, b, c]) => Ipv6Addr::new(0x2001, 0xdb8, *a, 0, 0, 0, *b, *c).into(),
            Peer::AnySix(address) => Ipv6Addr::from(*address).into(),
        }
    }
}

fn ports(out: bool, packet: &Packet) -> [u8; 4] {
    let (own, port) = (packet.own.to_be_bytes(), packet.port.to_be_bytes());
    let [[a, b], [c, d]] = if out { [own, port] } else { [port, own] };
    [a, b, c, d]
}

/// A frame with all in its place; sums are nobody's business here.
fn frame(out: bool, peer: IpAddr, packet: &Packet) -> Vec<u8> {
    let data = &packet.data[..packet.data.len().min(1400)];
    let mut upper = ports(out, packet).to_vec();
    match packet.tcp {
        true => {
            upper.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, packet.flags, 0, 0, 0, 0, 0, 0]);
        }
        false => {
            upper.extend((data.len() as u16 + 8).to_be_bytes());
            upper.extend([0, 0]);
        }
    }
    upper.extend(data);
    let protocol = if packet.tcp { TCP } else { UDP };
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    match peer {
        IpAddr::V4(peer) => {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((upper.len() as u16 + 20).to_be_bytes());
            frame.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
            let own = net().0.guest_ip;
            let (from, to) = if out { (own, peer) } else { (peer, own) };
            frame.extend(from.octets());
            frame.extend(to.octets());
        }
        IpAddr::V6(peer) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((upper.len() as u16).to_be_bytes());
            frame.extend([protocol, 64]);
            let own = net().0.ip6.as_ref().unwrap().guest_ip;
            let (from, to) = if out { (own, peer) } else { (peer, own) };
            frame.extend(from.octets());
            frame.extend(to.octets());
        }
    }
    frame.extend(upper);
    frame
}

fn labels(name: u8) -> Vec<u8> {
    let name = NAMES[usize::from(name) % NAMES.len()];
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.bytes());
    }
    bytes.push(0);
    bytes
}

fn query(id: u16, name: u8) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    message.extend(labels(name));
    message.extend([0, 1, 0, 1]);
    message
}

fn answer(id: u16, name: u8, records: &[Record], rest: &[u8]) -> Vec<u8> {
    let mut message = query(id, name);
    message[2..4].copy_from_slice(&[0x81, 0x80]);
    message[7] = records.len() as u8 + u8::from(!rest.is_empty());
    for record in records {
        match record.owner {
            Some(owner) => message.extend(labels(owner)),
            None => message.extend([0xc0, 12]),
        }
        let (kind, data) = match &record.data {
            Data::Web => (1, vec![93, 184, 216, 34]),
            Data::Four(address) => (1, address.to_vec()),
            Data::Six(address) => (28, address.to_vec()),
            Data::Alias(name) => (5, labels(*name)),
        };
        message.extend([0, kind, 0, 1, 0, 0, 0, 5, 0, data.len() as u8]);
        message.extend(data);
    }
    message.extend(&rest[..rest.len().min(200)]);
    message
}

/// What another reader sees in a frame.
struct Seen<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    upper: &'a [u8],
}

impl Seen<'_> {
    fn port(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.upper[at], self.upper[at + 1]])
    }
}

/// Reads a plain packet; none in ARP.
fn read(frame: &[u8]) -> Result<Option<Seen<'_>>, &'static str> {
    let packet = frame.get(14..).ok_or("cut off")?;
    let four = |at: usize| Some(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into());
    let six = |at: usize| Some(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into());
    let number = |at: usize| {
        Some(usize::from(packet.get(at).copied()?) << 8 | usize::from(*packet.get(at + 1)?))
    };
    let (source, destination, protocol, upper) = match frame[12..14] {
        [8, 0] => {
            if packet.first() != Some(&0x45) || number(6).is_none_or(|it| it & 0x3fff != 0) {
                return Err("options or a fragment");
            }
            let upper = number(2).and_then(|len| packet.get(20..len));
            (four(12), four(16), packet.get(9), upper)
        }
        [0x86, 0xdd] => {
            if packet.first().is_none_or(|it| it >> 4 != 6) {
                return Err("no IPv6");
            }
            let upper = number(4).and_then(|len| packet.get(40..40 + len));
            (six(8), six(24), packet.get(6), upper)
        }
        [8, 6] => return Ok(None),
        _ => return Err("neither ARP nor IP"),
    };
    let seen = Seen {
        source: source.ok_or("cut off")?,
        destination: destination.ok_or("cut off")?,
        protocol: *protocol.ok_or("cut off")?,
        upper: upper.ok_or("cut off")?,
    };
    match seen.protocol {
        TCP if seen.upper.len() >= 20 => {}
        UDP if seen.upper.len() >= 8 && usize::from(seen.port(4)) == seen.upper.len() => {}
        1 | 58 if !seen.upper.is_empty() => {}
        _ => return Err("what it carries is not plain"),
    }
    Ok(Some(seen))
}

fn never(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(it) => it.octets()[0] == 0 || it.is_loopback() || it.is_multicast(),
        // What has an IPv4 address inside, too.
        IpAddr::V6(it) => it.segments()[..5] == [0; 5] && [0, 0xffff].contains(&it.segments()[5]),
    }
}

/// A name may open it.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(it) => {
            let [a, b, ..] = it.octets();
            let closed = it.is_private() || it.is_link_local() || OWN.contains(&it) || a >= 224;
            !(closed || a == 100 && b & 0xc0 == 64) && it != Ipv4Addr::new(168, 63, 129, 16)
        }
        IpAddr::V6(it) => {
            let [a, b, ..] = it.octets();
            let inner = match it.segments() {
                [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some([high, low]),
                [0x2002, high, low, ..] => Some([high, low]),
                _ => None,
            };
            let inner = inner.map(|[high, low]| {
                let [[a, b], [c, d]] = [high.to_be_bytes(), low.to_be_bytes()];
                IpAddr::from([a, b, c, d])
            });
            let local = a & 0xfe == 0xfc || a == 0xff || (a == 0xfe && b & 0x80 != 0);
            !local && inner.is_none_or(|it| is_public(it) && !never(it))
        }
    }
}

/// The name that is asked for, and nothing else.
fn name_in(message: &[u8]) -> String {
    let mut name = Vec::new();
    let mut at = 12;
    while message[at] != 0 {
        let len = usize::from(message[at]);
        assert!(len < 64);
        name.push(std::str::from_utf8(&message[at + 1..at + 1 + len]).unwrap());
        at += 1 + len;
    }
    name.join(".").to_ascii_lowercase()
}

/// What was seen of those who talk to the guest.
#[derive(Default)]
struct Known {
    /// Messages from the resolver.
    answers: Vec<Vec<u8>>,
    /// Who sent something to a published port, and to which.
    callers: HashSet<(IpAddr, u8, u16, u16)>,
}

impl Known {
    /// Hears what is plain.
    fn hear(&mut self, frame: &[u8]) {
        let Ok(Some(seen)) = read(frame) else { return };
        if seen.source == RESOLVER {
            self.answers.push(seen.upper.to_vec());
        }
        if seen.upper.len() >= 4 {
            let caller = (seen.source, seen.protocol, seen.port(0), seen.port(2));
            self.callers.insert(caller);
        }
    }

    /// An answer had the address in it, wherever.
    fn told(&self, address: IpAddr) -> bool {
        let bytes = match address {
            IpAddr::V4(it) => it.octets().to_vec(),
            IpAddr::V6(it) => it.octets().to_vec(),
        };
        let has = |answer: &Vec<u8>| answer.windows(bytes.len()).any(|window| window == bytes);
        self.answers.iter().any(has)
    }

    fn check(&self, frame: &[u8]) {
        let Some(seen) = read(frame).expect("only what is plain passes") else {
            return;
        };
        let to = seen.destination;
        let port = matches!(seen.protocol, TCP | UDP).then(|| seen.port(2));
        let configuration = match to {
            IpAddr::V4(it) => it.is_broadcast() && seen.protocol == UDP && port == Some(67),
            IpAddr::V6(it) => {
                let local = it.is_unique_local() || it.is_unicast_link_local();
                let link = it.segments()[0] == 0xff02;
                seen.protocol == 58 && (133..=136).contains(&seen.upper[0]) && (local || link)
            }
        };
        if configuration {
            return;
        }
        assert!(!never(to), "a packet for {to} passed");
        let own = match seen.source {
            IpAddr::V4(it) => it == net().0.guest_ip,
            IpAddr::V6(it) => {
                it.segments()[..4] == net().0.ip6.as_ref().unwrap().guest_ip.segments()[..4]
            }
        };
        assert!(own, "one from {} passed", seen.source);
        let called = port.is_some_and(|port| {
            let caller = (to, seen.protocol, port, seen.port(0));
            let published = [(TCP, 80), (UDP, 53)].contains(&(seen.protocol, seen.port(0)));
            published && self.callers.contains(&caller)
        });
        let ruled = match to {
            IpAddr::V4(it) if it.octets()[..2] == [10, 1] => port == Some(443),
            IpAddr::V4(it) => it == Ipv4Addr::new(192, 0, 2, 7),
            IpAddr::V6(it) => it.segments()[..2] == [0x2001, 0xdb8],
        };
        let asks = to == RESOLVER && seen.protocol == UDP && port == Some(DNS);
        if asks && !ruled {
            let name = name_in(&seen.upper[8..]);
            let named = name == "a.example" || name.ends_with(".b.example");
            assert!(named, "a query for {name} passed");
            return;
        }
        let gateway = to == IpAddr::from(net().0.gateway)
            || to == IpAddr::from(net().0.ip6.as_ref().unwrap().gateway);
        let opened = self.told(to) && !gateway && is_public(to);
        assert!(
            ruled || called || opened,
            "a packet for {to} {port:?} passed"
        );
    }
}

/// Lets things happen.
pub fn run(steps: Vec<Step>) {
    let (net, config) = net();
    let host = HostNetworks {
        own: OWN
            .map(|it| format!("{it}/32").parse().expect("a network"))
            .into(),
        near: Vec::new(),
    };
    let mut filter = Egress::new(EgressPolicy::new(net, config), KnownHost::new(&host));
    let mut known = Known::default();
    let mut now = Instant::now();
    for step in steps.into_iter().take(STEPS_MAX) {
        let resolver = |out, own, data| {
            let (tcp, port, flags) = (false, DNS, 0);
            frame(
                out,
                RESOLVER.into(),
                &Packet {
                    tcp,
                    own,
                    port,
                    flags,
                    data,
                },
            )
        };
        let (out, frame) = match step {
            Step::Out(frame) => (true, frame),
            Step::In(frame) => (false, frame),
            Step::Send(peer, packet) => (true, frame(true, peer.address(), &packet)),
            Step::Get(peer, packet) => (false, frame(false, peer.address(), &packet)),
            Step::Ask(id, own, name) => (true, resolver(true, own, query(id, name))),
            Step::Answer(id, own, name, records, rest) => {
                let records = &records[..records.len().min(20)];
                (
                    false,
                    resolver(false, own, answer(id, name, records, &rest)),
                )
            }
            Step::Wait(seconds) => {
                now += Duration::from_secs(seconds.into());
                // Requests that are sent again pass a few at a time, and are small.
                for _ in 0..10 {
                    let again: Vec<_> = std::iter::from_fn(|| filter.take_due(now)).collect();
                    assert!(again.len() <= 4 && again.iter().all(|frame| frame.len() <= 114));
                    let due = filter.next_due();
                    assert!(due.is_none_or(|due| due > now && due <= now + Duration::from_secs(1)));
                    now += Duration::from_millis(10);
                }
                continue;
            }
        };
        if !out {
            filter.incoming(&frame, now);
            known.hear(&frame);
            continue;
        }
        match filter.outgoing(&frame, now) {
            Verdict::Pass => known.check(&frame),
            Verdict::Drop => {}
            Verdict::Answer(answer) => {
                let asked = read(&frame).unwrap().expect("an answer to IP");
                let seen = read(&answer).unwrap().expect("an answer in IP");
                assert_eq!(seen.destination, asked.source);
                assert_eq!(answer[..6], frame[6..12]);
            }
        }
    }
    filter.counters();
}
