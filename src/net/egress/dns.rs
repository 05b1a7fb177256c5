//! DNS messages (RFC 1035, 4), as far as a filter must understand them.

use std::net::IpAddr;

const HEADER: usize = 12;
/// In the header's third byte.
const RESPONSE: u8 = 0x80;
const OPCODE: u8 = 0x78;
const RECURSION_DESIRED: u8 = 0x01;
/// In its fourth.
const RECURSION_AVAILABLE: u8 = 0x80;
const CODE: u8 = 0x0f;
const REFUSED: u8 = 5;

const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;

const LABEL_MAX: usize = 63;
const NAME_MAX: usize = 254;
const POINTER: u8 = 0xc0;
/// The most compression pointers that reading a name follows (RFC 1035, section 4.1.4).
const POINTERS_MAX: usize = 16;
/// The most records of an answer that are looked at.
const RECORDS_MAX: u16 = 64;
/// The longest chain of aliases (CNAME) that is followed.
const ALIASES_MAX: usize = 16;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// What the answer is known by.
    pub id: u16,
    /// The name, in small letters, without a dot at its end.
    pub name: String,
    kind: u16,
}

/// Reads a query of exactly one question. Returns where it ends, too.
pub fn query(message: &[u8]) -> Option<(Question, usize)> {
    let (question, end) = question(message)?;
    let flags = *message.get(2)?;
    // One question, and nothing but EDNS' options behind it.
    let counts = message.get(6..HEADER)?;
    let plain = flags & (RESPONSE | OPCODE) == 0
        && counts.starts_with(&[0, 0, 0, 0, 0])
        && counts.last().is_some_and(|&additional| additional <= 1);
    plain.then_some((question, end))
}

/// The same query, answered with a refusal.
pub fn refuse(query: &[u8], end: usize) -> Option<Vec<u8>> {
    let mut answer = query.get(..end)?.to_vec();
    let header = answer.first_chunk_mut::<HEADER>()?;
    header[2] = RESPONSE | header[2] & RECURSION_DESIRED;
    header[3] = RECURSION_AVAILABLE | REFUSED;
    header[6..].fill(0);
    Some(answer)
}

/// Reads the addresses that an answer gives for what was asked, by itself or
/// by an alias, and for how many seconds. There are none in an answer to
/// something else.
pub fn addresses(message: &[u8], asked: &Question) -> Option<Vec<(IpAddr, u32)>> {
    let (question, mut at) = question(message)?;
    let [flags, code] = *message.get(2..4)?.first_chunk()?;
    if question != *asked || flags & RESPONSE == 0 {
        return None;
    }
    let (mut aliases, mut found) = (Vec::new(), Vec::new());
    if code & CODE == 0 {
        for _ in 0..u16_at(message, 6)?.min(RECORDS_MAX) {
            let (owner, end) = name(message, at, POINTERS_MAX)?;
            let (kind, class) = (u16_at(message, end)?, u16_at(message, end + 2)?);
            let ttl = u32::from_be_bytes(*message.get(end + 4..)?.first_chunk()?);
            let len = usize::from(u16_at(message, end + 8)?);
            let data = message.get(end + 10..)?.get(..len)?;
            match kind {
                _ if class != CLASS_IN => {}
                TYPE_A => found.push((owner, IpAddr::from(<[u8; 4]>::try_from(data).ok()?), ttl)),
                TYPE_AAAA => {
                    found.push((owner, IpAddr::from(<[u8; 16]>::try_from(data).ok()?), ttl));
                }
                TYPE_CNAME => aliases.push((owner, name(message, end + 10, POINTERS_MAX)?.0)),
                _ => {}
            }
            at = end + 10 + len;
        }
    }
    let mut names = vec![asked.name.as_str()];
    for _ in 0..ALIASES_MAX {
        let next = aliases.iter().find(|(owner, target)| {
            names.contains(&owner.as_str()) && !names.contains(&target.as_str())
        });
        match next {
            Some((_, target)) => names.push(target),
            None => break,
        }
    }
    let of_it = found
        .iter()
        .filter(|(owner, ..)| names.contains(&owner.as_str()));
    Some(of_it.map(|&(_, address, ttl)| (address, ttl)).collect())
}

/// Reads the one question of a message, whose name is not compressed.
fn question(message: &[u8]) -> Option<(Question, usize)> {
    let id = u16_at(message, 0)?;
    if u16_at(message, 4)? != 1 {
        return None;
    }
    let (name, end) = name(message, HEADER, 0)?;
    let kind = u16_at(message, end)?;
    (u16_at(message, end + 2)? == CLASS_IN).then_some((Question { id, name, kind }, end + 4))
}

fn u16_at(message: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*message.get(at..)?.first_chunk()?))
}

/// Reads a name of letters, digits and the like, following at most `jumps` pointers, each
/// further back. Returns where what is behind it begins, too.
fn name(message: &[u8], at: usize, jumps: usize) -> Option<(String, usize)> {
    let (mut name, mut at, mut end, mut left) = (String::new(), at, None, jumps);
    loop {
        let len = *message.get(at)?;
        if len & POINTER == POINTER {
            end.get_or_insert(at + 2);
            let target = usize::from(u16_at(message, at)? & !(u16::from(POINTER) << 8));
            left = left.checked_sub(1)?;
            if target >= at {
                return None;
            }
            at = target;
            continue;
        }
        let len = usize::from(len);
        if len == 0 {
            return Some((name, end.unwrap_or(at + 1)));
        }
        if len > LABEL_MAX || name.len() + 1 + len > NAME_MAX {
            return None;
        }
        let label = message.get(at + 1..)?.get(..len)?;
        if !label
            .iter()
            .all(|&byte| byte.is_ascii_graphic() && byte != b'.')
        {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(
            label
                .iter()
                .map(|byte| char::from(byte.to_ascii_lowercase())),
        );
        at += 1 + len;
    }
}
