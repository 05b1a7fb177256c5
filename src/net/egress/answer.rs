//! What a guest hears of a packet that does not pass: a quick no is better than
//! a long silence.

use std::net::IpAddr;

use etherparse::{IpHeaders, PacketBuilder, PacketBuilderStep, TcpHeader};

use super::frame::{Packet, Segment, Upper};

const TTL: u8 = 64;
// "Administratively prohibited" (RFC 1812, 5.2.7.1; RFC 4443, 3.1).
const UNREACHABLE: (u8, u8) = (3, 13);
const UNREACHABLE_6: (u8, u8) = (1, 1);
/// How much of the packet an error message holds: its header, and its ports.
const QUOTE: usize = 64;

/// Says that nobody listens, or that nobody may talk.
pub fn refusal(packet: &Packet) -> Option<Vec<u8>> {
    match &packet.upper {
        Upper::Tcp(segment) => reset(packet, segment),
        Upper::Udp { .. } | Upper::Icmp(_) => prohibited(packet),
    }
}

/// A datagram back.
pub fn datagram(packet: &Packet, data: &[u8]) -> Option<Vec<u8>> {
    let Upper::Udp {
        source,
        destination,
        ..
    } = packet.upper
    else {
        return None;
    };
    let builder = back(packet)?.udp(destination, source);
    let mut frame = Vec::new();
    builder.write_to_vec(&mut frame, data).ok()?;
    Some(frame)
}

fn reset(packet: &Packet, segment: &Segment) -> Option<Vec<u8>> {
    if segment.rst {
        return None;
    }
    // RFC 9293, 3.10.7.1.
    let mut header = TcpHeader::new(segment.destination, segment.source, 0, 0);
    header.rst = true;
    if segment.ack {
        header.sequence_number = segment.acknowledged;
    } else {
        let taken = segment.len + u32::from(segment.syn) + u32::from(segment.fin);
        header.ack = true;
        header.acknowledgment_number = segment.sequence.wrapping_add(taken);
    }
    let mut frame = Vec::new();
    let builder = back(packet)?.tcp_header(header);
    builder.write_to_vec(&mut frame, &[]).ok()?;
    Some(frame)
}

fn prohibited(packet: &Packet) -> Option<Vec<u8>> {
    let quote = packet.bytes.get(..QUOTE).unwrap_or(packet.bytes);
    let back = back(packet)?;
    let mut frame = Vec::new();
    match packet.source {
        IpAddr::V4(_) => {
            let (kind, code) = UNREACHABLE;
            let builder = back.icmpv4_raw(kind, code, [0; 4]);
            builder.write_to_vec(&mut frame, quote).ok()?;
        }
        IpAddr::V6(_) => {
            let (kind, code) = UNREACHABLE_6;
            let builder = back.icmpv6_raw(kind, code, [0; 4]);
            builder.write_to_vec(&mut frame, quote).ok()?;
        }
    }
    Some(frame)
}

/// From whom the packet was for.
fn back(packet: &Packet) -> Option<PacketBuilderStep<IpHeaders>> {
    let (guest, host) = packet.macs;
    let ethernet = PacketBuilder::ethernet2(host, guest);
    match (packet.destination, packet.source) {
        (IpAddr::V4(from), IpAddr::V4(to)) => Some(ethernet.ipv4(from.octets(), to.octets(), TTL)),
        (IpAddr::V6(from), IpAddr::V6(to)) => Some(ethernet.ipv6(from.octets(), to.octets(), TTL)),
        _ => None,
    }
}
