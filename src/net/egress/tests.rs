use std::net::Ipv4Addr;

use etherparse::{IpHeaders, PacketBuilder, PacketBuilderStep, TcpHeader};
use proptest::prelude::*;

use super::frame::Segment;
use super::*;
use crate::net::cidr::Cidr;
use crate::net::host::HostNetworks;
use crate::net::user::{GATEWAY, GUEST_IP, UserNet, UserNet6};

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const RESOLVER: [u8; 4] = [9, 9, 9, 9];
const WEB: [u8; 4] = [93, 184, 216, 34];

/// A host, and the networks that it is on.
fn host() -> KnownHost {
    let networks = |all: &[&str]| all.iter().map(|text| text.parse().unwrap()).collect();
    KnownHost::new(&HostNetworks {
        own: networks(&["203.0.113.7", "192.168.1.5", "2001:db8:7::7"]),
        near: networks(&["203.0.113.0/24", "192.168.1.0/24", "2001:db8:7::/64"]),
    })
}

fn policy(config: &UserConfig) -> EgressPolicy {
    EgressPolicy::new(&UserNet::new(config, &Default::default()), config)
}

/// A filter with rules and published ports.
fn filter(rules: &[&str]) -> Egress {
    filter_of(rules, UserConfig::default())
}

fn filter_of(rules: &[&str], mut config: UserConfig) -> Egress {
    if config.dns.is_empty() {
        config.dns.push(RESOLVER.into());
    }
    config.publish = ["8080:80", "5353:53/udp"]
        .map(|text| text.parse().unwrap())
        .into();
    config.allow = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    Egress::new(policy(&config), host())
}

fn guest() -> [u8; 4] {
    GUEST_IP.octets()
}

/// Which way a frame goes.
#[derive(Clone, Copy)]
enum Way {
    Out,
    In,
}

fn ends(way: Way, peer: [u8; 4]) -> PacketBuilderStep<IpHeaders> {
    match way {
        Way::Out => PacketBuilder::ethernet2(GUEST_MAC, HOST_MAC).ipv4(guest(), peer, 64),
        Way::In => PacketBuilder::ethernet2(HOST_MAC, GUEST_MAC).ipv4(peer, guest(), 64),
    }
}

fn ports(way: Way, own: u16, peer: u16) -> (u16, u16) {
    match way {
        Way::Out => (own, peer),
        Way::In => (peer, own),
    }
}

fn tcp(way: Way, own: u16, (peer, port): ([u8; 4], u16), flags: &str) -> Vec<u8> {
    let (from, to) = ports(way, own, port);
    let mut header = TcpHeader::new(from, to, 1000, 500);
    header.syn = flags.contains('S');
    header.ack = flags.contains('A');
    header.rst = flags.contains('R');
    header.acknowledgment_number = 77;
    let mut frame = Vec::new();
    let builder = ends(way, peer).tcp_header(header);
    builder.write_to_vec(&mut frame, &[]).unwrap();
    frame
}

fn udp(way: Way, own: u16, (peer, port): ([u8; 4], u16), data: &[u8]) -> Vec<u8> {
    let (from, to) = ports(way, own, port);
    let mut frame = Vec::new();
    ends(way, peer)
        .udp(from, to)
        .write_to_vec(&mut frame, data)
        .unwrap();
    frame
}

fn ping(peer: [u8; 4]) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = ends(Way::Out, peer).icmpv4_echo_request(1, 1);
    builder.write_to_vec(&mut frame, b"ping").unwrap();
    frame
}

fn labels(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes
}

fn query(id: u16, name: &str) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    message.extend(labels(name));
    message.extend([0, 1, 0, 1]);
    message
}

/// An answer of records: owner, type, data. An owner "" is the question's.
fn answer(id: u16, name: &str, records: &[(&str, u16, &[u8])]) -> Vec<u8> {
    let mut message = query(id, name);
    message[2..4].copy_from_slice(&[0x81, 0x80]);
    message[7] = records.len() as u8;
    for (owner, kind, data) in records {
        match *owner {
            "" => message.extend([0xc0, 12]),
            owner => message.extend(labels(owner)),
        }
        message.extend(kind.to_be_bytes());
        message.extend([0, 1, 0, 0, 0, 5]);
        message.extend((data.len() as u16).to_be_bytes());
        message.extend(*data);
    }
    message
}

impl Egress {
    fn passes(&mut self, frame: &[u8], now: Instant) -> bool {
        self.outgoing(frame, now) == Verdict::Pass
    }

    /// The guest asks, and the resolver answers.
    fn resolve(&mut self, name: &str, address: [u8; 4], now: Instant) {
        let resolver = (RESOLVER, 53);
        let asked = udp(Way::Out, 4000, resolver, &query(7, name));
        assert!(self.passes(&asked, now), "{name}");
        let answer = answer(7, name, &[("", 1, &address)]);
        assert!(self.incoming(&udp(Way::In, 4000, resolver, &answer), now));
    }

    /// The same for an address of IPv6.
    fn resolve_ipv6(&mut self, name: &str, address: [u8; 16], now: Instant) {
        let resolver = (RESOLVER, 53);
        let mut asked = query(7, name);
        let at = asked.len() - 3;
        asked[at] = 28;
        assert!(self.passes(&udp(Way::Out, 4000, resolver, &asked), now));
        let mut answer = answer(7, name, &[("", 28, &address)]);
        answer[at] = 28;
        assert!(self.incoming(&udp(Way::In, 4000, resolver, &answer), now));
    }
}

#[test]
fn without_rules_the_hosts_loopback_is_closed() {
    let (mut open, now) = (filter(&[]), Instant::now());
    for peer in [WEB, [10, 0, 0, 1], [192, 168, 1, 1], RESOLVER] {
        assert!(
            open.passes(&tcp(Way::Out, 1, (peer, 80), "S"), now),
            "{peer:?}"
        );
        assert!(open.passes(&udp(Way::Out, 1, (peer, 80), b"x"), now));
        assert!(open.passes(&ping(peer), now));
    }
    for peer in [[127, 0, 0, 1], [127, 9, 9, 9], [0, 0, 0, 0], [0, 1, 2, 3]] {
        let verdict = open.outgoing(&tcp(Way::Out, 1, (peer, 80), "S"), now);
        assert!(
            matches!(verdict, Verdict::Answer(_)),
            "{peer:?}: {verdict:?}"
        );
    }
    assert_eq!(
        open.outgoing(&udp(Way::Out, 1, ([224, 0, 0, 251], 5353), b"x"), now),
        Verdict::Drop
    );
    for peer in [
        "::1",
        "::",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
        "::127.0.0.1",
    ] {
        let peer: Ipv6Addr = peer.parse().unwrap();
        let mut frame = Vec::new();
        let own = Ipv6Addr::new(0xfd6d, 0x6179, 0x666c, 0, 0, 0, 0, 0x15);
        let builder =
            PacketBuilder::ethernet2(GUEST_MAC, HOST_MAC).ipv6(own.octets(), peer.octets(), 64);
        builder.udp(1, 2).write_to_vec(&mut frame, b"x").unwrap();
        assert!(!open.passes(&frame, now), "{peer}");
    }
    let counters = open.counters();
    assert_eq!(
        counters,
        [
            ("denied_packets", 10),
            ("denied_names", 0),
            ("malformed_packets", 0),
            ("resent_requests", 0)
        ]
    );
}

/// A frame of each kind that a refusal answers, to any address.
fn three_to(peer: IpAddr) -> [Vec<u8>; 3] {
    let ethernet = || PacketBuilder::ethernet2(GUEST_MAC, HOST_MAC);
    let own = Ipv6Addr::new(0xfd6d, 0x6179, 0x666c, 0, 0, 0, 0, 0x15);
    let ip = || match peer {
        IpAddr::V4(peer) => ethernet().ipv4(guest(), peer.octets(), 64),
        IpAddr::V6(peer) => ethernet().ipv6(own.octets(), peer.octets(), 64),
    };
    let mut frames = [const { Vec::new() }; 3];
    let mut header = TcpHeader::new(1, 80, 1000, 500);
    header.syn = true;
    let [tcp, udp, ping] = &mut frames;
    ip().tcp_header(header).write_to_vec(tcp, &[]).unwrap();
    ip().udp(1, 80).write_to_vec(udp, b"x").unwrap();
    match peer {
        IpAddr::V4(_) => ip().icmpv4_echo_request(1, 1).write_to_vec(ping, b"x"),
        IpAddr::V6(_) => ip().icmpv6_echo_request(1, 1).write_to_vec(ping, b"x"),
    }
    .unwrap();
    frames
}

/// The answer says at once that it does not pass.
fn is_refusal(answer: &[u8], of: &[u8]) -> bool {
    let Some(Frame::Ip(packet)) = Frame::parse(answer) else {
        return false;
    };
    let Some(Frame::Ip(asked)) = Frame::parse(of) else {
        return false;
    };
    let prohibited = match asked.destination {
        IpAddr::V4(_) => answer.get(34..36) == Some(&[3, 13]),
        IpAddr::V6(_) => answer.get(54..56) == Some(&[1, 1]),
    };
    packet.source == asked.destination
        && packet.destination == asked.source
        && match (asked.upper, packet.upper) {
            (Upper::Tcp(_), Upper::Tcp(segment)) => segment.rst,
            (Upper::Udp { .. } | Upper::Icmp(_), Upper::Icmp(_)) => prohibited,
            _ => false,
        }
}

/// All three pass, or all three are refused at once.
fn is_open(egress: &mut Egress, peer: IpAddr) -> bool {
    let now = Instant::now();
    let open = three_to(peer).map(|frame| match egress.outgoing(&frame, now) {
        Verdict::Pass => true,
        Verdict::Answer(answer) if is_refusal(&answer, &frame) => false,
        verdict => panic!("{peer}: {verdict:?}"),
    });
    assert!(open.iter().all(|one| *one == open[0]), "{peer}: {open:?}");
    open[0]
}

fn filter_with_ipv6(allow: &[&str], isolated: bool) -> Egress {
    let config = UserConfig {
        allow: allow.iter().map(|rule| rule.parse().unwrap()).collect(),
        dns: vec![RESOLVER.into()],
        isolated,
        ..Default::default()
    };
    let mut net = UserNet::new(&config, &Default::default());
    net.ip6 = Some(UserNet6::new("eth0".into()));
    Egress::new(EgressPolicy::new(&net, &config), host())
}

/// The table of the documentation: of all spellings of addresses.
#[test]
fn what_is_open_without_being_named() {
    const ALL: [&str; 2] = ["0.0.0.0/0", "::/0"];
    // Open to all, to the isolated, by a rule for all, by its own rule, by a name.
    for (open, addresses) in [
        (
            [true; 5],
            "1.1.1.1 2001:db8::1 64:ff9b::1.1.1.1 2002:101:101::1",
        ),
        ([true, false, true, true, true], "203.0.113.8 2001:db8:7::8"),
        (
            [true, false, true, true, false],
            "10.1.2.3 172.16.0.1 192.168.1.6 100.64.0.1 198.18.0.1 10.0.2.3 fd12::1 fec0::1 \
             64:ff9b::10.1.2.3 64:ff9b:1::1 2002:a01:203::1",
        ),
        (
            [false, false, false, true, false],
            "169.254.169.254 169.254.1.1 169.254.170.2 100.100.100.200 192.0.0.192 192.0.0.8 \
             168.63.129.16 240.0.0.1 203.0.113.7 192.168.1.5 2001:db8:7::7 fe80::1 fe80::a9fe:a9fe \
             fd00:ec2::254 fd20:ce::254 64:ff9b::169.254.169.254 64:ff9b::192.168.1.5 \
             2002:a9fe:a9fe::1 2001:0:a9fe:a9fe::1 2001:0:101:101::5601:5601",
        ),
        (
            [false; 5],
            "127.0.0.1 127.9.9.9 0.0.0.0 0.1.2.3 10.0.2.2 fd6d:6179:666c::2 :: ::1 ::127.0.0.1 \
             ::1.1.1.1 ::ffff:127.0.0.1 ::ffff:1.1.1.1 ::ffff:0:1.1.1.1 64:ff9b::127.0.0.1 \
             2002:7f00:1::1 2001:0:7f00:1::1",
        ),
    ] {
        for text in addresses.split_whitespace() {
            let address: IpAddr = text.parse().unwrap();
            let mut named = filter_with_ipv6(&["*.example.com"], false);
            if let IpAddr::V4(address) = address {
                named.resolve("a.example.com", address.octets(), Instant::now());
            } else if let IpAddr::V6(address) = address {
                named.resolve_ipv6("a.example.com", address.octets(), Instant::now());
            }
            let found = [
                is_open(&mut filter_with_ipv6(&[], false), address),
                is_open(&mut filter_with_ipv6(&[], true), address),
                is_open(&mut filter_with_ipv6(&ALL, false), address),
                is_open(&mut filter_with_ipv6(&[text], false), address),
                is_open(&mut named, address),
            ];
            assert_eq!(found, open, "{text}");
            // An isolated guest is not let out by a rule for all, but by its own.
            let rules = [ALL[0], ALL[1]];
            assert_eq!(
                is_open(&mut filter_with_ipv6(&rules, true), address),
                open[1],
                "{text}"
            );
            assert_eq!(
                is_open(&mut filter_with_ipv6(&[ALL[0], text], true), address),
                open[3],
                "{text}"
            );
        }
    }
    // Nobody answers in the name of many.
    for many in ["224.0.0.251", "255.255.255.255", "ff02::fb", "ff0e::1"] {
        for frame in three_to(many.parse().unwrap()) {
            let mut egress = filter_with_ipv6(&[many], false);
            assert_eq!(egress.outgoing(&frame, Instant::now()), Verdict::Drop);
        }
    }
}

/// What is open may become the host's own, and be given away again.
#[test]
fn a_new_address_of_the_hosts_is_closed() {
    let web: IpAddr = WEB.into();
    let known = |own: &[IpAddr]| HostNetworks {
        own: own.iter().map(|it| Cidr::of(*it, 32)).collect(),
        near: Vec::new(),
    };
    for mut egress in [
        filter_with_ipv6(&[], false),
        filter_with_ipv6(&["0.0.0.0/0"], false),
        {
            let mut named = filter_with_ipv6(&["example.com"], false);
            named.resolve("example.com", WEB, Instant::now());
            named
        },
    ] {
        assert!(is_open(&mut egress, web));
        egress.host.set(&known(&[web]));
        assert!(!is_open(&mut egress, web));
        egress.host.set(&known(&[]));
        assert!(is_open(&mut egress, web));
    }
}

/// A resolver is reached wherever it is, and nothing else there.
#[test]
fn a_resolver_may_be_anywhere() {
    let now = Instant::now();
    for address in [[169, 254, 169, 254], [203, 0, 113, 7], [192, 168, 1, 1]] {
        let mut config = UserConfig {
            dns: vec![address.into()],
            isolated: true,
            ..Default::default()
        };
        let mut open = Egress::new(policy(&config), host());
        config.allow = vec!["example.com".parse().unwrap()];
        let mut strict = Egress::new(policy(&config), host());
        let asked = udp(Way::Out, 1, (address, 53), &query(1, "example.com"));
        assert!(open.passes(&asked, now) && strict.passes(&asked, now));
        assert!(open.passes(&tcp(Way::Out, 1, (address, 53), "S"), now));
        for frame in three_to(address.into()) {
            assert!(!open.passes(&frame, now) && !strict.passes(&frame, now));
        }
    }
}

/// Who may not be called may call, and is answered.
#[test]
fn clients_of_published_ports_may_be_the_host() {
    let (mut egress, now) = (filter(&[]), Instant::now());
    let client = ([203, 0, 113, 7], 40000);
    for (question, answer) in [
        (
            tcp(Way::In, 80, client, "S"),
            tcp(Way::Out, 80, client, "SA"),
        ),
        (
            udp(Way::In, 53, client, b"x"),
            udp(Way::Out, 53, client, b"y"),
        ),
    ] {
        assert!(!egress.passes(&answer, now));
        assert!(egress.incoming(&question, now));
        assert!(egress.passes(&answer, now));
    }
    assert!(!egress.passes(&tcp(Way::Out, 80, client, "S"), now));
    assert!(!egress.passes(&tcp(Way::Out, 81, client, "SA"), now));
}

/// Behind the gateway is the host's loopback: its resolver, and clients of
/// published ports.
#[test]
fn the_gateway_is_for_answers_and_queries() {
    let now = Instant::now();
    let gateway = |port| (GATEWAY.octets(), port);
    let config = UserConfig {
        dns: vec!["127.0.0.53".parse().unwrap()],
        ..Default::default()
    };
    let rules: [&[&str]; 2] = [&[], &["0.0.0.0/0", "10.0.2.2:53", "any.name"]];
    for rules in rules {
        let mut egress = filter_of(rules, config.clone());
        for frame in [
            tcp(Way::Out, 80, gateway(8000), "S"),
            tcp(Way::Out, 80, gateway(8000), "A"),
            tcp(Way::Out, 1, gateway(53), "S"),
            udp(Way::Out, 53, gateway(5000), b"x"),
            ping(GATEWAY.octets()),
        ] {
            assert!(!egress.passes(&frame, now), "{rules:?} {frame:x?}");
        }
        assert!(egress.passes(&udp(Way::Out, 1, gateway(53), &query(1, "any.name")), now));
        let answer = answer(1, "any.name", &[("", 1, &WEB)]);
        assert!(egress.incoming(&udp(Way::In, 1, gateway(53), &answer), now));
        egress.incoming(&tcp(Way::In, 80, gateway(8000), "S"), now);
        egress.incoming(&udp(Way::In, 53, gateway(5000), b"x"), now);
        assert!(egress.passes(&tcp(Way::Out, 80, gateway(8000), "SA"), now));
        assert!(egress.passes(&udp(Way::Out, 53, gateway(5000), b"x"), now));
        assert!(!egress.passes(&tcp(Way::Out, 80, gateway(8000), "S"), now));
        assert!(!egress.passes(&udp(Way::Out, 53, gateway(5001), b"x"), now));
        let mut config = config.clone();
        config.host_loopback = true;
        let mut egress = filter_of(rules, config);
        assert!(egress.passes(&tcp(Way::Out, 1, gateway(8000), "S"), now));
    }
}

#[test]
fn rules_by_address_and_port() {
    let (mut egress, now) = (filter(&["10.1.0.0/16:443", "10.2.0.1"]), Instant::now());
    for (peer, port, passes) in [
        ([10, 1, 2, 3], 443, true),
        ([10, 1, 2, 3], 80, false),
        ([10, 2, 0, 1], 80, true),
        ([10, 2, 0, 2], 80, false),
        (GATEWAY.octets(), 443, false),
        ([127, 0, 0, 1], 443, false),
    ] {
        for flags in ["S", "A", "SA"] {
            assert_eq!(
                egress.passes(&tcp(Way::Out, 1, (peer, port), flags), now),
                passes
            );
        }
        assert_eq!(
            egress.passes(&udp(Way::Out, 1, (peer, port), b""), now),
            passes
        );
    }
    assert!(egress.passes(&ping([10, 2, 0, 1]), now));
    assert!(!egress.passes(&ping([10, 1, 2, 3]), now));
}

#[test]
fn a_no_is_quick_and_well_formed() {
    let (mut egress, now) = (filter(&["10.2.0.1"]), Instant::now());
    let mut refusal = |frame: &[u8]| match egress.outgoing(frame, now) {
        Verdict::Answer(frame) => frame,
        verdict => panic!("{verdict:?}"),
    };
    let reset = refusal(&tcp(Way::Out, 1234, (WEB, 80), "S"));
    let Some(Frame::Ip(packet)) = Frame::parse(&reset) else {
        panic!()
    };
    assert_eq!(packet.macs, (HOST_MAC, GUEST_MAC));
    assert_eq!(
        (packet.source, packet.destination),
        (WEB.into(), guest().into())
    );
    let segment = Segment {
        source: 80,
        destination: 1234,
        acknowledged: 1001,
        rst: true,
        ack: true,
        ..Default::default()
    };
    assert_eq!(packet.upper, Upper::Tcp(segment));
    let tcp_slice = etherparse::TcpSlice::from_slice(&reset[34..]).unwrap();
    let sum = tcp_slice.calc_checksum_ipv4(WEB, guest()).unwrap();
    assert_eq!(tcp_slice.checksum(), sum);
    // In the middle of a connection.
    let reset = refusal(&tcp(Way::Out, 1234, (WEB, 80), "A"));
    let Some(Frame::Ip(packet)) = Frame::parse(&reset) else {
        panic!()
    };
    let Upper::Tcp(segment) = packet.upper else {
        panic!()
    };
    assert_eq!(
        (segment.sequence, segment.rst, segment.ack),
        (77, true, false)
    );
    let denied = udp(Way::Out, 5, (WEB, 6), &[0; 500]);
    let error = refusal(&denied);
    assert_eq!(error[23], 1, "ICMP");
    assert_eq!(error[34..36], [3, 13]);
    assert_eq!(error[42..42 + 64], denied[14..14 + 64]);
    assert_eq!(
        egress.outgoing(&tcp(Way::Out, 1, (WEB, 80), "R"), now),
        Verdict::Drop
    );
}

#[test]
fn a_name_opens_its_addresses_for_a_while() {
    let (mut egress, now) = (
        filter(&["example.com:443", "*.example.org"]),
        Instant::now(),
    );
    let (web, other) = ((WEB, 443), ([1, 2, 3, 4], 443));
    assert!(!egress.passes(&tcp(Way::Out, 1, web, "S"), now));
    egress.resolve("Example.COM", WEB, now);
    assert!(egress.passes(&tcp(Way::Out, 1, web, "S"), now));
    assert!(!egress.passes(&tcp(Way::Out, 1, (WEB, 80), "S"), now));
    assert!(!egress.passes(&tcp(Way::Out, 1, other, "S"), now));
    assert!(!egress.passes(&ping(WEB), now));
    egress.resolve("a.b.example.org", [1, 2, 3, 4], now);
    assert!(egress.passes(&tcp(Way::Out, 1, other, "S"), now));
    assert!(egress.passes(&ping([1, 2, 3, 4]), now));
    // It said 5 s, which no program keeps to; then only what was begun goes on.
    let later = now + Duration::from_secs(59);
    assert!(egress.passes(&tcp(Way::Out, 2, web, "S"), later));
    let later = now + Duration::from_secs(61);
    assert!(!egress.passes(&tcp(Way::Out, 1, web, "S"), later));
    assert!(!egress.passes(&tcp(Way::Out, 3, web, "A"), later));
    assert!(egress.passes(&tcp(Way::Out, 1, web, "A"), later));
}

#[test]
fn other_names_are_refused_at_once() {
    let (mut egress, now) = (filter(&["example.com"]), Instant::now());
    for name in [
        "example.org",
        "www.example.com",
        "example.com.evil.net",
        "com",
    ] {
        let asked = query(9, name);
        let verdict = egress.outgoing(&udp(Way::Out, 4000, (RESOLVER, 53), &asked), now);
        let Verdict::Answer(frame) = verdict else {
            panic!("{name}: {verdict:?}")
        };
        let Some(Frame::Ip(packet)) = Frame::parse(&frame) else {
            panic!()
        };
        let Upper::Udp {
            source: 53,
            destination: 4000,
            data,
        } = packet.upper
        else {
            panic!("{packet:?}")
        };
        assert_eq!(packet.source, IpAddr::from(RESOLVER));
        assert_eq!(data[..4], [0, 9, 0x81, 0x85], "REFUSED");
        assert_eq!(data[4..], asked[4..]);
    }
    let asked = query(9, "example.com");
    // Other resolvers, by TCP, and what is no query.
    for (frame, silent) in [
        (udp(Way::Out, 1, ([8, 8, 8, 8], 53), &asked), false),
        (udp(Way::Out, 1, (GATEWAY.octets(), 53), &asked), false),
        (tcp(Way::Out, 1, (RESOLVER, 53), "S"), false),
        (tcp(Way::Out, 1, (RESOLVER, 853), "S"), false),
        (udp(Way::Out, 1, (RESOLVER, 53), b"tunnel"), true),
        (
            udp(Way::Out, 1, (RESOLVER, 53), &answer(9, "example.com", &[])),
            true,
        ),
    ] {
        match egress.outgoing(&frame, now) {
            Verdict::Pass => panic!("{frame:?}"),
            verdict => assert_eq!(verdict == Verdict::Drop, silent),
        }
    }
    // Unless a rule says so.
    let mut egress = filter(&["9.9.9.9:53"]);
    assert!(egress.passes(
        &udp(Way::Out, 1, (RESOLVER, 53), &query(1, "any.name")),
        now
    ));
    assert!(egress.passes(&tcp(Way::Out, 1, (RESOLVER, 53), "S"), now));
    let mut egress = filter(&["9.9.9.9", "0.0.0.0/0"]);
    assert!(!egress.passes(
        &udp(Way::Out, 1, (RESOLVER, 53), &query(1, "any.name")),
        now
    ));
}

#[test]
fn only_the_answer_to_a_question_opens() {
    let now = Instant::now();
    let resolver = (RESOLVER, 53);
    let good = answer(7, "example.com", &[("", 1, &WEB)]);
    let cases = [
        ("", udp(Way::In, 4000, resolver, &good), true),
        ("port", udp(Way::In, 4001, resolver, &good), false),
        (
            "resolver",
            udp(Way::In, 4000, ([8, 8, 8, 8], 53), &good),
            false,
        ),
        (
            "id",
            udp(
                Way::In,
                4000,
                resolver,
                &answer(8, "example.com", &[("", 1, &WEB)]),
            ),
            false,
        ),
        (
            "name",
            udp(
                Way::In,
                4000,
                resolver,
                &answer(7, "example.net", &[("", 1, &WEB)]),
            ),
            false,
        ),
        (
            "owner",
            udp(
                Way::In,
                4000,
                resolver,
                &answer(7, "example.com", &[("evil.net", 1, &WEB)]),
            ),
            false,
        ),
        (
            "query",
            udp(Way::In, 4000, resolver, &query(7, "example.com")),
            false,
        ),
        (
            "failure",
            udp(Way::In, 4000, resolver, &{
                let mut bad = good.clone();
                bad[3] = 0x83;
                bad
            }),
            false,
        ),
        (
            "short",
            udp(Way::In, 4000, resolver, &good[..good.len() - 1]),
            false,
        ),
    ];
    for (what, frame, opens) in cases {
        let mut egress = filter(&["example.com"]);
        assert!(egress.passes(
            &udp(Way::Out, 4000, resolver, &query(7, "example.com")),
            now
        ));
        egress.incoming(&frame, now);
        assert_eq!(
            egress.passes(&tcp(Way::Out, 1, (WEB, 1), "S"), now),
            opens,
            "{what}"
        );
        if opens {
            // Once.
            assert!(!egress.incoming(&frame, now));
        }
    }
    // Late.
    let mut egress = filter(&["example.com"]);
    assert!(egress.passes(
        &udp(Way::Out, 4000, resolver, &query(7, "example.com")),
        now
    ));
    let later = now + ANSWER_TIME;
    assert!(!egress.incoming(&udp(Way::In, 4000, resolver, &good), later));
    assert!(!egress.passes(&tcp(Way::Out, 1, (WEB, 1), "S"), later));
    // The gateway, the host and the link are nobody's names.
    for address in [
        GATEWAY.octets(),
        [127, 0, 0, 1],
        [0, 0, 0, 0],
        [169, 254, 169, 254],
    ] {
        let mut egress = filter(&["example.com"]);
        egress.resolve("example.com", address, now);
        assert!(
            !egress.passes(&tcp(Way::Out, 1, (address, 1), "S"), now),
            "{address:?}"
        );
    }
}

#[test]
fn aliases_are_followed() {
    let now = Instant::now();
    let (a, b) = (labels("a.cdn.net"), labels("b.cdn.net"));
    let opens = |records: &[(&str, u16, &[u8])]| {
        let mut egress = filter(&["example.com"]);
        let resolver = (RESOLVER, 53);
        egress.passes(
            &udp(Way::Out, 4000, resolver, &query(7, "example.com")),
            now,
        );
        egress.incoming(
            &udp(Way::In, 4000, resolver, &answer(7, "example.com", records)),
            now,
        );
        egress.passes(&tcp(Way::Out, 1, (WEB, 1), "S"), now)
    };
    let own = labels("example.com");
    assert!(opens(&[
        ("", 5, &a),
        ("a.cdn.net", 5, &b),
        ("b.cdn.net", 1, &WEB)
    ]));
    assert!(opens(&[
        ("b.cdn.net", 1, &WEB),
        ("a.cdn.net", 5, &b),
        ("", 5, &a)
    ]));
    assert!(!opens(&[("", 5, &a), ("b.cdn.net", 1, &WEB)]));
    assert!(!opens(&[
        ("", 5, &a),
        ("a.cdn.net", 5, &own),
        ("b.cdn.net", 1, &WEB)
    ]));
    // A pointer to itself, and ever on.
    assert!(!opens(&[
        ("", 5, &[0xc0, 12]),
        ("", 5, &[0xc0, 0xff]),
        ("", 1, &WEB)
    ]));
}

#[test]
fn requests_to_published_ports_are_sent_again_until_the_guest_answers() {
    let now = Instant::now();
    let second = Duration::from_secs(1);
    let client = (GATEWAY.octets(), 40_000);
    let request = tcp(Way::In, 80, client, "S");
    let asked = |rules: &[&str]| {
        let mut egress = filter(rules);
        assert!(egress.incoming(&request, now));
        egress
    };
    for rules in [&[][..], &["example.com"]] {
        let mut egress = asked(rules);
        assert_eq!(egress.next_due(), Some(now + second));
        assert_eq!(egress.take_due(now), None);
        assert_eq!(egress.take_due(now + second), Some(request.clone()));
        assert_eq!(egress.take_due(now + second), None);
        assert_eq!(egress.next_due(), Some(now + 2 * second));
        // Until it is accepted, or refused, or the client has gone.
        for (way, flags, ends) in [
            (Way::Out, "SA", true),
            (Way::Out, "RA", true),
            (Way::In, "R", true),
            (Way::Out, "A", false),
        ] {
            let mut egress = asked(rules);
            let frame = tcp(way, 80, client, flags);
            match way {
                Way::Out => assert!(egress.passes(&frame, now)),
                Way::In => assert!(egress.incoming(&frame, now)),
            }
            assert_eq!(egress.next_due().is_none(), ends, "{flags}");
            // Another client's is none.
            let mut egress = asked(rules);
            let other = (client.0, client.1 + 1);
            egress.incoming(&tcp(way, 80, other, flags), now);
            egress.outgoing(&tcp(way, 80, other, flags), now);
            assert!(egress.next_due().is_some(), "{flags}");
        }
    }
    // No other packet is.
    let mut egress = filter(&[]);
    for frame in [
        tcp(Way::In, 81, client, "S"),
        tcp(Way::In, 80, client, "SA"),
        tcp(Way::In, 80, client, "A"),
        udp(Way::In, 53, client, b"?"),
    ] {
        egress.incoming(&frame, now);
        assert_eq!(egress.next_due(), None);
    }
}

#[test]
fn answers_of_published_ports_pass() {
    let (mut egress, now) = (filter(&["10.2.0.1"]), Instant::now());
    let client = (GATEWAY.octets(), 40000);
    let reply = tcp(Way::Out, 80, client, "SA");
    assert!(!egress.passes(&reply, now));
    assert!(egress.incoming(&tcp(Way::In, 80, client, "S"), now));
    assert!(egress.passes(&reply, now));
    // That is no leave to call back, nor for others.
    assert!(!egress.passes(&tcp(Way::Out, 80, client, "S"), now));
    assert!(!egress.passes(&tcp(Way::Out, 80, (WEB, 40000), "SA"), now));
    assert!(!egress.passes(&tcp(Way::Out, 81, client, "SA"), now));
    let reply = udp(Way::Out, 53, client, b"answer");
    assert!(!egress.passes(&reply, now));
    egress.incoming(&udp(Way::In, 53, client, b"question"), now);
    assert!(egress.passes(&reply, now));
    assert!(egress.passes(&reply, now + UDP_IDLE - Duration::from_secs(1)));
    assert!(!egress.passes(&reply, now + 3 * UDP_IDLE));
    // A port that is not published.
    egress.incoming(&tcp(Way::In, 22, client, "S"), now);
    assert!(!egress.passes(&tcp(Way::Out, 22, client, "SA"), now));
}

#[test]
fn what_is_not_plain_does_not_pass() {
    let (mut egress, now) = (filter(&["0.0.0.0/0", "::/0"]), Instant::now());
    let good = udp(Way::Out, 1, (WEB, 2), b"data");
    assert!(egress.passes(&good, now));
    let change = |changes: &[(usize, u8)]| {
        let mut frame = good.clone();
        for &(at, value) in changes {
            frame[at] = value;
        }
        frame
    };
    let mut vlan = good.clone();
    vlan.splice(12..12, [0x81, 0, 0, 1]);
    let cases = [
        ("VLAN", vlan),
        ("ethertype", change(&[(12, 0x88), (13, 0xcc)])),
        ("more fragments", change(&[(20, 0x20)])),
        ("a later fragment", change(&[(21, 1)])),
        ("options", change(&[(14, 0x46)])),
        ("version", change(&[(14, 0x65)])),
        ("IPv6 in IPv4's type", change(&[(14, 0x60)])),
        ("total length", change(&[(17, 200)])),
        ("protocol", change(&[(23, 47)])),
        ("UDP's length", change(&[(39, 9)])),
        ("source", change(&[(29, 16)])),
        ("short", good[..40].to_vec()),
        ("nothing", Vec::new()),
    ];
    for (what, frame) in cases {
        assert_eq!(egress.outgoing(&frame, now), Verdict::Drop, "{what}");
    }
    // ARP of its own, and of another's.
    let arp = |sender: [u8; 4]| {
        let mut frame = [HOST_MAC, GUEST_MAC].concat();
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend([&GUEST_MAC[..], &sender, &[0; 6], &GATEWAY.octets()].concat());
        frame
    };
    assert!(egress.passes(&arp(guest()), now) && egress.passes(&arp([0; 4]), now));
    assert!(!egress.passes(&arp([10, 0, 2, 99]), now));
    // DHCP.
    let mut frame = Vec::new();
    let dhcp = PacketBuilder::ethernet2(GUEST_MAC, [0xff; 6]).ipv4([0; 4], [0xff; 4], 64);
    dhcp.udp(68, 67)
        .write_to_vec(&mut frame, &[0; 300])
        .unwrap();
    assert!(egress.passes(&frame, now));
}

#[test]
fn ipv6_has_the_same_rules() {
    let now = Instant::now();
    let mut config = UserConfig {
        dns: vec!["2001:db8::53".parse().unwrap()],
        ..Default::default()
    };
    let mut net = UserNet::new(&config, &Default::default());
    net.ip6 = Some(UserNet6::new("eth0".into()));
    net.dns = config.dns.clone();
    let own: Ipv6Addr = "fd6d:6179:666c::15".parse().unwrap();
    let frame =
        |from: Ipv6Addr, to: &str, upper: &dyn Fn(PacketBuilderStep<IpHeaders>) -> Vec<u8>| {
            let to: Ipv6Addr = to.parse().unwrap();
            let ethernet = PacketBuilder::ethernet2(GUEST_MAC, HOST_MAC);
            upper(ethernet.ipv6(from.octets(), to.octets(), 255))
        };
    let udp = |ports: (u16, u16)| {
        move |ip: PacketBuilderStep<IpHeaders>| {
            let mut frame = Vec::new();
            ip.udp(ports.0, ports.1)
                .write_to_vec(&mut frame, b"x")
                .unwrap();
            frame
        }
    };
    let icmp = |kind: u8| {
        move |ip: PacketBuilderStep<IpHeaders>| {
            let mut frame = Vec::new();
            let message = ip.icmpv6_raw(kind, 0, [0; 4]);
            message.write_to_vec(&mut frame, &[0; 16]).unwrap();
            frame
        }
    };
    let mut open = Egress::new(EgressPolicy::new(&net, &config), host());
    config.allow = vec!["[2001:db8::/64]:9".parse().unwrap()];
    let mut strict = Egress::new(EgressPolicy::new(&net, &config), host());
    let link: Ipv6Addr = "fe80::1".parse().unwrap();
    for (frame, by_strict, by_open) in [
        (frame(own, "2001:db8::1", &udp((1, 9))), true, true),
        (frame(own, "2001:db8::1", &udp((1, 8))), false, true),
        (frame(own, "2001:db8:0:1::1", &udp((1, 9))), false, true),
        (frame(link, "2001:db8::1", &udp((1, 9))), false, true),
        (frame(own, "2001:db8::1", &icmp(128)), false, true),
        (frame(link, "ff02::1:ff00:2", &icmp(135)), true, true),
        (frame(link, "fd6d:6179:666c::2", &icmp(136)), true, true),
        (frame(link, "2001:db8::1", &icmp(135)), false, true),
        (frame(link, "ff02::2", &icmp(133)), true, true),
        (frame(link, "ff02::1:2", &udp((546, 547))), false, true),
        (frame(link, "ff02::fb", &udp((5353, 5353))), false, false),
    ] {
        assert_eq!(strict.passes(&frame, now), by_strict, "{frame:x?}");
        assert_eq!(open.passes(&frame, now), by_open, "{frame:x?}");
    }
    // Who asks on the link is told there.
    let asked = frame(link, "fe80::77", &udp((1, 9)));
    for egress in [&mut open, &mut strict] {
        let Verdict::Answer(answer) = egress.outgoing(&asked, now) else {
            panic!();
        };
        assert!(is_refusal(&answer, &asked));
    }
    // An extension header, even with what is allowed behind it.
    let mut hidden = frame(own, "2001:db8::1", &udp((1, 9)));
    hidden[20] = 0;
    hidden.splice(54..54, [17, 0, 1, 4, 0, 0, 0, 0]);
    hidden[19] += 8;
    assert_eq!(strict.outgoing(&hidden, now), Verdict::Drop);
    let verdict = strict.outgoing(&frame(own, "2001:db8::1", &udp((1, 8))), now);
    let Verdict::Answer(error) = verdict else {
        panic!("{verdict:?}")
    };
    assert_eq!(error[54..56], [1, 1]);
}

#[test]
fn nothing_grows_without_end() {
    let (mut egress, now) = (filter(&["*.example.com"]), Instant::now());
    egress.resolve("a.example.com", WEB, now);
    for number in 0..20_000u32 {
        let (port, peer) = (number as u16, (number + (11 << 24)).to_be_bytes());
        egress.outgoing(&udp(Way::Out, port, (WEB, port), b"x"), now);
        egress.outgoing(
            &udp(
                Way::Out,
                port,
                (RESOLVER, 53),
                &query(port, "b.example.com"),
            ),
            now,
        );
        let answer = answer(port, "b.example.com", &[("", 1, &peer)]);
        egress.incoming(&udp(Way::In, port, (RESOLVER, 53), &answer), now);
        egress.incoming(&udp(Way::In, 53, (peer, 1), b"x"), now);
    }
    for (len, max) in [
        (egress.flows.len(), FLOWS_MAX),
        (egress.opened.len(), OPENED_MAX),
    ] {
        assert!((max / 4..=max).contains(&len), "{len}");
    }
    assert!(egress.asked.len() <= ASKED_MAX);
}

proptest! {
    /// A frame near to a good one, with a few bytes changed.
    #[test]
    fn no_frame_panics_and_none_leaves_for_elsewhere(
        kind in 0u8..5,
        changes in prop::collection::vec((0usize..120, any::<u8>()), 0..6),
        cut in 0usize..120,
        data in prop::collection::vec(any::<u8>(), 0..60),
    ) {
        let (mut egress, now) = (filter(&["10.2.0.0/16", "example.com"]), Instant::now());
        let mut frame = match kind {
            0 => tcp(Way::Out, 1, ([10, 2, 3, 4], 80), "S"),
            1 => udp(Way::Out, 1, ([10, 2, 3, 4], 80), &data),
            2 => udp(Way::Out, 1, (RESOLVER, 53), &query(1, "example.com")),
            3 => udp(Way::In, 1, (RESOLVER, 53), &answer(1, "example.com", &[("", 1, &WEB), ("", 5, &data)])),
            _ => data,
        };
        for (at, value) in changes {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        if cut < 60 {
            frame.truncate(cut);
        }
        egress.incoming(&frame, now);
        if egress.passes(&frame, now) && frame[12..14] == [8, 0] {
            // By a reading of its own.
            let to: [u8; 4] = frame[30..34].try_into().unwrap();
            let from: [u8; 4] = frame[26..30].try_into().unwrap();
            let dhcp = frame[23] == 17 && frame[34..38] == [0, 68, 0, 67];
            let resolver = to == RESOLVER && frame[36..38] == [0, 53] && frame[23] == 17;
            prop_assert!(to[..2] == [10, 2] || resolver || dhcp, "{:?}", frame);
            prop_assert!(from == guest() || dhcp);
        }
    }

    #[test]
    fn any_address_is_denied_unless_named(address: u32, port: u16, flags in "S|A|SA") {
        let address = Ipv4Addr::from(address);
        let (mut egress, now) = (filter(&["10.2.0.0/16:443"]), Instant::now());
        let named = address.octets()[..2] == [10, 2] && port == 443;
        let frame = tcp(Way::Out, 1, (address.octets(), port), &flags);
        prop_assert_eq!(egress.passes(&frame, now), named);
    }

    #[test]
    fn no_message_panics(mut message in prop::collection::vec(any::<u8>(), 0..300), names: bool) {
        if names && message.len() > 20 {
            // More likely to be read to its end.
            message[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 20, 0, 0, 0, 0]);
            message[12..20].copy_from_slice(&[1, b'a', 0, 0, 1, 0, 1, 0xc0]);
        }
        let asked = dns::query(&query(u16::from(*message.first().unwrap_or(&0)), "a")).unwrap();
        let _ = dns::query(&message);
        let _ = dns::addresses(&message, &asked.0);
        let _ = dns::refuse(&message, asked.1);
    }
}
