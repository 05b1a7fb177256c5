//! What the host tells a guest that goes on from its snapshot point: who it is from now on.
//!
//! At the snapshot point the agent has told a port of the VMM's (`SNAPSHOT_PORT`, in
//! `boot/src/layout.rs`) where in the guest's memory its mailbox is, and writes to the port's
//! second register; the VMM may save the machine there. Whoever makes it go on, be it the
//! same machine or a clone, puts a [`Mail`] into the mailbox first. So the agent's next
//! instruction finds it: nothing is asked for, and nothing runs in a clone before it has an
//! identity of its own.
//!
//! The mailbox is a [`Directory`] in a page, and pages for the mail as postcard writes it.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use crate::agent::Net;

/// A page of the guest's memory.
pub const PAGE: usize = 4096;
/// The most pages that a mailbox has for mail.
pub const PAGES_MAX: usize = (PAGE - HEADER) / WORD;
const WORD: usize = size_of::<u64>();
const HEADER: usize = 4 * WORD;
const MAGIC: u64 = u64::from_le_bytes(*b"mayfly-m");
const VERSION: u64 = 1;
/// Nobody has put in mail, or the word that there is none.
const UNANSWERED: u64 = u64::MAX;
/// The third number of a directory's.
const ANSWER_AT: usize = 3 * WORD;

/// The first page of a mailbox: numbers of 64 bits, little-endian. A magic one, the version,
/// how many pages there are for mail, the length of the mail; then each page's physical
/// address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    /// The physical addresses of the pages that the mail goes into, in order.
    pub pages: Vec<u64>,
}

impl Directory {
    /// As an agent writes it, before there is any mail.
    pub fn to_page(&self) -> [u8; PAGE] {
        let count = u64::try_from(self.pages.len()).unwrap_or(u64::MAX);
        let header = [MAGIC, VERSION, count, UNANSWERED];
        let mut page = [0; PAGE];
        let numbers = header.iter().chain(&self.pages);
        for (to, from) in page.as_chunks_mut().0.iter_mut().zip(numbers) {
            *to = from.to_le_bytes();
        }
        page
    }

    /// Reads what a guest wrote. The addresses are whatever it wants.
    pub fn from_page(page: &[u8; PAGE]) -> io::Result<Self> {
        let mut numbers = page.as_chunks().0.iter().copied().map(u64::from_le_bytes);
        let mut next = || numbers.next().unwrap_or(0);
        if (next(), next()) != (MAGIC, VERSION) {
            return Err(invalid("the guest has no mailbox of this version"));
        }
        let count = usize::try_from(next()).unwrap_or(usize::MAX);
        if count > PAGES_MAX {
            return Err(invalid("the guest's mailbox is larger than any"));
        }
        let _answer = next();
        Ok(Directory {
            pages: numbers.take(count).collect(),
        })
    }

    /// How the host says how long the mail is: where in the page, and which bytes.
    pub fn answer(mail: &[u8]) -> io::Result<(usize, [u8; WORD])> {
        let len = u64::try_from(mail.len()).map_err(io::Error::other)?;
        Ok((ANSWER_AT, len.to_le_bytes()))
    }
}

/// What the agent finds behind the snapshot point in its mailbox's pages. It is an error if
/// nobody was there: the machine must not go on as if it were the one that was saved.
pub fn open(directory: &[u8; PAGE], pages: &[u8]) -> io::Result<Option<Mail>> {
    let len = directory
        .get(ANSWER_AT..)
        .and_then(<[u8]>::split_first_chunk);
    let len = len.map_or(UNANSWERED, |(len, _)| u64::from_le_bytes(*len));
    match usize::try_from(len).ok().map(|len| pages.get(..len)) {
        Some(Some([])) => Ok(None),
        Some(Some(mail)) => Mail::from_bytes(mail).map(Some),
        _ => Err(invalid("there is no word in the mailbox")),
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The message to a machine that is restored: what it becomes.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mail {
    /// A random number that no other run of this state has.
    pub generation: [u8; 16],
    /// Random bytes, of which the guest's kernel makes its random numbers from now on.
    pub entropy: [[u8; 32]; 2],
    /// The time, in nanoseconds since 1970.
    pub realtime: u64,
    /// The machine's name, if it changes.
    pub hostname: Option<String>,
    /// The system's identifier (`machine-id(5)`), if it changes.
    pub machine_id: Option<[u8; 16]>,
    /// Its network, if that changes.
    pub net: Option<Net>,
    /// How the agent's next connection to the host begins: frames of
    /// [`crate::agent`] that need not be waited for.
    pub frames: Vec<u8>,
}

/// Without what nobody is to know.
impl fmt::Debug for Mail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mail")
            .field("realtime", &self.realtime)
            .field("hostname", &self.hostname)
            .field("net", &self.net)
            .field("frames", &self.frames.len())
            .finish_non_exhaustive()
    }
}

impl Mail {
    /// The bytes for the mailbox's pages.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        postcard::to_stdvec(self).map_err(io::Error::other)
    }

    /// Reads such bytes.
    pub fn from_bytes(bytes: &[u8]) -> io::Result<Self> {
        postcard::from_bytes(bytes).map_err(|_| invalid("what is in the mailbox is no mail"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What an agent finds when a host has put this in.
    fn delivered(mail: &[u8], pages: usize) -> io::Result<Option<Mail>> {
        let directory = Directory {
            pages: (1..).map(|page| page << 12).take(pages).collect(),
        };
        let mut page = directory.to_page();
        assert_eq!(Directory::from_page(&page).unwrap(), directory);
        let (at, bytes) = Directory::answer(mail).unwrap();
        page[at..at + bytes.len()].copy_from_slice(&bytes);
        assert_eq!(Directory::from_page(&page).unwrap(), directory);
        let mut content = vec![0xee; pages * PAGE];
        let len = mail.len().min(content.len());
        content[..len].copy_from_slice(&mail[..len]);
        open(&page, &content)
    }

    #[test]
    fn no_mail_and_nobody_are_told_apart() {
        assert_eq!(delivered(&[], 1).unwrap(), None);
        let directory = Directory { pages: vec![0] };
        assert!(open(&directory.to_page(), &[0; PAGE]).is_err());
        // More than there is room for.
        assert!(delivered(&[0; PAGE + 1], 1).is_err());
        assert!(delivered(&[0xff], 1).is_err());
    }

    #[test]
    fn directories_are_bounded() {
        let pages = vec![u64::MAX; PAGES_MAX];
        let page = Directory { pages }.to_page();
        assert_eq!(Directory::from_page(&page).unwrap().pages.len(), PAGES_MAX);
        for (word, value) in [(0, 0), (1, 2), (2, PAGES_MAX as u64 + 1), (2, u64::MAX)] {
            let mut bad = page;
            bad[word * 8..][..8].copy_from_slice(&u64::to_le_bytes(value));
            assert!(Directory::from_page(&bad).is_err(), "{word} {value}");
        }
    }

    #[test]
    fn nobody_reads_secrets_in_a_log() {
        let mail = Mail {
            entropy: [[77; 32]; 2],
            frames: vec![88; 9],
            ..Mail::default()
        };
        let text = format!("{mail:?}");
        assert!(!text.contains("77") && !text.contains("88"), "{text}");
    }

    proptest! {
        #[test]
        fn mail_arrives(
            generation: [u8; 16], realtime: u64, hostname: Option<String>,
            machine_id: Option<[u8; 16]>, frames: Vec<u8>,
        ) {
            let mail = Mail {
                generation, realtime, hostname, machine_id, frames,
                entropy: [[1; 32], [2; 32]],
                net: Some(Net {
                    addresses: vec![("10.0.2.15".parse().unwrap(), 24)],
                    ..Net::default()
                }),
            };
            let bytes = mail.to_bytes().unwrap();
            prop_assert_eq!(delivered(&bytes, 1).unwrap(), Some(mail));
        }

        #[test]
        fn foreign_bytes_are_no_panic(bytes: Vec<u8>) {
            let _ = delivered(&bytes, 1);
            let mut page = [0; PAGE];
            page.iter_mut().zip(&bytes).for_each(|(to, from)| *to = *from);
            let _ = Directory::from_page(&page);
            let _ = open(&page, &bytes);
        }
    }
}
