//! What a comparison's probe and its peer, on the host, say to each other by TCP.
//!
//! The probe gets the peer's addresses and two secrets in an argument. On each connection
//! it sends the first one and a [`Task`]; the peer, which disconnects all others, answers
//! with the second: only then does the probe know that it talks to its own host. What
//! follows depends on the task:
//!
//! | task   | the probe sends                         | the peer sends                    |
//! |--------|-----------------------------------------|-----------------------------------|
//! | echo   | bytes                                   | the same bytes                    |
//! | sink   | chunks, of which the last says so       | a byte, once it has all of them   |
//! | source | nothing; it closes when it has enough   | chunks                            |
//!
//! Nobody closes a connection in one direction only: Debian 12's passt stalls then.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The start of the probe's argument.
pub const WORD: &str = "tcp=";
/// A secret's bytes.
pub const SECRET: usize = 16;
/// The bytes that are sent at once.
pub const CHUNK: usize = 128 << 10;
/// The first byte of the last chunk; others begin with zero.
pub const LAST: u8 = 1;
/// A word has no more addresses.
pub const ADDRESSES_MAX: usize = 4;

/// A random number that two know.
pub type Secret = [u8; SECRET];

/// The task of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Task {
    /// Bytes go there and come back.
    Echo = b'e',
    /// Bytes go to the host.
    Sink = b's',
    /// Bytes come from the host.
    Source = b'r',
}

impl Task {
    /// Of the byte behind the first secret.
    pub fn of(byte: u8) -> Option<Self> {
        let all = [Task::Echo, Task::Sink, Task::Source];
        all.into_iter().find(|&task| task as u8 == byte)
    }
}

/// Where the peer is, and how the two know each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meeting {
    /// On all of the host's addresses that matter,
    pub port: u16,
    /// which are these, beside loopback.
    pub addresses: Vec<Ipv4Addr>,
    /// The secret that the probe sends.
    pub question: Secret,
    /// The secret that the peer answers with.
    pub answer: Secret,
}

impl fmt::Display for Meeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{WORD}{}/", self.port)?;
        for secret in [&self.question, &self.answer] {
            secret.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
            f.write_str("/")?;
        }
        let addresses = self.addresses.iter().take(ADDRESSES_MAX);
        let addresses: Vec<String> = addresses.map(Ipv4Addr::to_string).collect();
        f.write_str(&addresses.join(","))
    }
}

/// It is no word about a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMeeting;

impl FromStr for Meeting {
    type Err = NoMeeting;

    fn from_str(word: &str) -> Result<Self, NoMeeting> {
        let mut parts = word.strip_prefix(WORD).ok_or(NoMeeting)?.split('/');
        let mut next = || parts.next().ok_or(NoMeeting);
        let port = next()?.parse().map_err(|_| NoMeeting)?;
        let (question, answer) = (secret(next()?)?, secret(next()?)?);
        let addresses = next()?.split(',').filter(|text| !text.is_empty());
        let addresses = addresses.map(|text| text.parse().map_err(|_| NoMeeting));
        Ok(Meeting {
            port,
            addresses: addresses.collect::<Result<_, _>>()?,
            question,
            answer,
        })
    }
}

fn secret(text: &str) -> Result<Secret, NoMeeting> {
    let number = Some(text).filter(|text| text.len() == 2 * SECRET);
    let number = number.and_then(|text| u128::from_str_radix(text, 16).ok());
    Ok(number.ok_or(NoMeeting)?.to_be_bytes())
}

/// How an instance comes to the host by TCP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// By the host's own loopback device: it has no network of its own.
    Loopback,
    /// By its network, to an address of the host's.
    Network,
    /// Not at all: it has no network but a loopback device of its own.
    None,
    /// Not at all, though it has a network: why.
    Lost(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_a_meeting() {
        let mut meeting = Meeting {
            port: 40_000,
            addresses: vec![Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(10, 0, 0, 1)],
            question: [0x0f; SECRET],
            answer: [0xf0; SECRET],
        };
        assert_eq!(meeting.to_string().parse(), Ok(meeting.clone()));
        meeting.addresses.clear();
        let word = meeting.to_string();
        assert_eq!(word.parse(), Ok(meeting));
        for (from, to) in [
            ("tcp=", "tcp"),
            ("40000", "70000"),
            ("0f/", "0/"),
            ("f0/", "+0/"),
            ("f0/", "f0/x"),
            ("f0/", "f0"),
        ] {
            let word = word.replacen(from, to, 1);
            assert_eq!(word.parse::<Meeting>(), Err(NoMeeting), "{word}");
        }
    }
}
