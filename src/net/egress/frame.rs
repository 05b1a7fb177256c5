//! Frames from a guest, parsed once: what is not plain is none.

use std::net::{IpAddr, Ipv4Addr};

use etherparse::{
    ArpPacketSlice, EtherType, Ethernet2Slice, IpNumber, Ipv4HeaderSlice, Ipv6HeaderSlice,
    TcpSlice, UdpSlice,
};

/// ICMP and ICMPv6 types.
pub mod icmp {
    /// A ping.
    pub const ECHO_REQUEST: u8 = 8;
    /// A ping of IPv6.
    pub const ECHO_REQUEST_6: u8 = 128;
    /// Who routes here?
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// Who has this address?
    pub const NEIGHBOR_SOLICITATION: u8 = 135;
    /// I have.
    pub const NEIGHBOR_ADVERTISEMENT: u8 = 136;
}

/// IPv4's header, without options.
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

/// What a frame holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// ARP for IPv4, said by this address.
    Arp(Ipv4Addr),
    /// A whole IP packet.
    Ip(Packet<'a>),
}

/// An IP packet without options or extension headers, and no fragment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Who sent the frame, and to whom.
    pub macs: ([u8; 6], [u8; 6]),
    /// From whom, it says.
    pub source: IpAddr,
    /// To whom.
    pub destination: IpAddr,
    /// From its first byte to its last.
    pub bytes: &'a [u8],
    /// What it carries.
    pub upper: Upper<'a>,
}

/// What a packet carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upper<'a> {
    /// A segment.
    Tcp(Segment),
    /// A datagram.
    Udp {
        /// From which port.
        source: u16,
        /// To which port.
        destination: u16,
        /// Its data.
        data: &'a [u8],
    },
    /// A message of ICMP, or ICMPv6, of this type.
    Icmp(u8),
}

/// A TCP segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// From which port.
    pub source: u16,
    /// To which port.
    pub destination: u16,
    /// Its first byte's number.
    pub sequence: u32,
    /// The number that is expected next, with `ack`.
    pub acknowledged: u32,
    /// How many bytes of data it has.
    pub len: u32,
    /// Flags.
    pub syn: bool,
    /// See above.
    pub ack: bool,
    /// See above.
    pub fin: bool,
    /// See above.
    pub rst: bool,
}

impl Segment {
    /// It asks for a connection.
    pub fn opens(&self) -> bool {
        self.syn && !self.ack
    }
}

impl<'a> Frame<'a> {
    /// Parses a frame; there is none where something is malformed, or more
    /// than a program needs.
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        let ethernet = Ethernet2Slice::from_slice_without_fcs(frame).ok()?;
        let macs = (ethernet.source(), ethernet.destination());
        let payload = ethernet.payload_slice();
        match ethernet.ether_type() {
            EtherType::ARP => arp(payload),
            EtherType::IPV4 => ipv4(payload, macs),
            EtherType::IPV6 => ipv6(payload, macs),
            _ => None,
        }
    }
}

fn arp(payload: &[u8]) -> Option<Frame<'_>> {
    let arp = ArpPacketSlice::from_slice(payload).ok()?;
    if arp.proto_addr_type() != EtherType::IPV4 || arp.hw_addr_size() != 6 {
        return None;
    }
    let sender: [u8; 4] = arp.sender_protocol_addr().try_into().ok()?;
    Some(Frame::Arp(sender.into()))
}

fn ipv4(payload: &[u8], macs: ([u8; 6], [u8; 6])) -> Option<Frame<'_>> {
    let header = Ipv4HeaderSlice::from_slice(payload).ok()?;
    if header.slice().len() != IPV4_HEADER || header.is_fragmenting_payload() {
        return None;
    }
    let bytes = payload.get(..header.total_len().into())?;
    let upper = upper(header.protocol(), IpNumber::ICMP, bytes.get(IPV4_HEADER..)?)?;
    Some(Frame::Ip(Packet {
        macs,
        source: header.source_addr().into(),
        destination: header.destination_addr().into(),
        bytes,
        upper,
    }))
}

fn ipv6(payload: &[u8], macs: ([u8; 6], [u8; 6])) -> Option<Frame<'_>> {
    let header = Ipv6HeaderSlice::from_slice(payload).ok()?;
    let len = IPV6_HEADER + usize::from(header.payload_length());
    let bytes = payload.get(..len)?;
    let upper = upper(
        header.next_header(),
        IpNumber::IPV6_ICMP,
        bytes.get(IPV6_HEADER..)?,
    )?;
    Some(Frame::Ip(Packet {
        macs,
        source: header.source_addr().into(),
        destination: header.destination_addr().into(),
        bytes,
        upper,
    }))
}

fn upper(protocol: IpNumber, icmp: IpNumber, bytes: &[u8]) -> Option<Upper<'_>> {
    match protocol {
        IpNumber::TCP => {
            let tcp = TcpSlice::from_slice(bytes).ok()?;
            Some(Upper::Tcp(Segment {
                source: tcp.source_port(),
                destination: tcp.destination_port(),
                sequence: tcp.sequence_number(),
                acknowledged: tcp.acknowledgment_number(),
                len: u32::try_from(tcp.payload().len()).ok()?,
                syn: tcp.syn(),
                ack: tcp.ack(),
                fin: tcp.fin(),
                rst: tcp.rst(),
            }))
        }
        IpNumber::UDP => {
            let udp = UdpSlice::from_slice(bytes).ok()?;
            // Nothing is hidden behind its end.
            let whole = usize::from(udp.length()) == bytes.len();
            whole.then(|| Upper::Udp {
                source: udp.source_port(),
                destination: udp.destination_port(),
                data: udp.payload(),
            })
        }
        protocol if protocol == icmp => Some(Upper::Icmp(*bytes.first()?)),
        _ => None,
    }
}
