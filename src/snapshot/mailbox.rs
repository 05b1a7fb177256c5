//! Mail for a guest that is about to go on from its snapshot point.

use std::io;

use mayfly_protocol::mailbox::{Directory, Mail, PAGE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::kvm::memory::GuestMemory;

/// Why a guest gets no mail: it cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MailboxError {
    /// Its mailbox is out of its memory.
    #[error("the guest's mailbox lies out of its memory")]
    Address(#[source] GuestMemoryError),
    /// It is none.
    #[error("the guest's mailbox")]
    Directory(#[source] io::Error),
    /// The mail does not fit.
    #[error("the mail for the guest has {mail} bytes, its mailbox {room}")]
    Room {
        /// How long the mail is.
        mail: usize,
        /// How much fits.
        room: usize,
    },
}

/// How many bytes of mail fit into the mailbox whose directory is at an address.
pub fn room(memory: &GuestMemory, address: u64) -> Result<usize, MailboxError> {
    Ok(directory(memory, address)?.pages.len() * PAGE)
}

/// Puts mail, or the word that there is none, into the mailbox whose directory is at an
/// address that the guest told. It does not run meanwhile.
pub fn deliver(
    memory: &GuestMemory,
    address: u64,
    mail: Option<&Mail>,
) -> Result<(), MailboxError> {
    let directory = directory(memory, address)?;
    let mail = match mail {
        None => Vec::new(),
        Some(mail) => mail.to_bytes().map_err(MailboxError::Directory)?,
    };
    let room = directory.pages.len() * PAGE;
    if mail.len() > room {
        let mail = mail.len();
        return Err(MailboxError::Room { mail, room });
    }
    let write = |bytes: &[u8], at: u64| {
        memory
            .write_slice(bytes, GuestAddress(at))
            .map_err(MailboxError::Address)
    };
    for (bytes, page) in mail.chunks(PAGE).zip(&directory.pages) {
        write(bytes, *page)?;
    }
    let (offset, answer) = Directory::answer(&mail).map_err(MailboxError::Directory)?;
    // It was read from there, so there is no end of the address space.
    write(&answer, address.saturating_add(offset as u64))
}

fn directory(memory: &GuestMemory, address: u64) -> Result<Directory, MailboxError> {
    let mut page = [0; PAGE];
    memory
        .read_slice(&mut page, GuestAddress(address))
        .map_err(MailboxError::Address)?;
    Directory::from_page(&page).map_err(MailboxError::Directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::memory::guest_memory;
    use crate::spec::MemorySpec;
    use mayfly_protocol::mailbox::open;

    const SIZE: u64 = 1 << 20;
    const AT: u64 = 0x5000;

    fn memory(pages: &[u64]) -> GuestMemory {
        let config = MemorySpec {
            size: SIZE,
            ..Default::default()
        };
        let memory = guest_memory(&config).unwrap();
        let pages = pages.to_vec();
        let page = Directory { pages }.to_page();
        memory.write_slice(&page, GuestAddress(AT)).unwrap();
        memory
    }

    /// What the agent finds in pages.
    fn found(memory: &GuestMemory, pages: &[u64]) -> io::Result<Option<Mail>> {
        let read = |at: u64| {
            let mut page = [0; PAGE];
            memory.read_slice(&mut page, GuestAddress(at)).unwrap();
            page
        };
        let content: Vec<_> = pages.iter().flat_map(|page| read(*page)).collect();
        open(&read(AT), &content)
    }

    fn mail(len: usize) -> Mail {
        Mail {
            hostname: Some("clone".into()),
            frames: (0..len).map(|number| number as u8).collect(),
            ..Mail::default()
        }
    }

    #[test]
    fn mail_goes_where_the_guest_wants_it() {
        let pages = [0x9000, 0x3000, SIZE - 0x1000];
        let memory = memory(&pages);
        assert!(found(&memory, &pages).is_err());
        deliver(&memory, AT, None).unwrap();
        assert_eq!(found(&memory, &pages).unwrap(), None);
        let mail = mail(10_000);
        deliver(&memory, AT, Some(&mail)).unwrap();
        assert_eq!(found(&memory, &pages).unwrap(), Some(mail));
    }

    #[test]
    fn a_hostile_mailbox_is_an_error() {
        for pages in [
            [SIZE; 4],
            [SIZE - 1; 4],
            [u64::MAX; 4],
            [u64::MAX - 4095; 4],
        ] {
            let memory = memory(&pages);
            deliver(&memory, AT, Some(&mail(10))).unwrap_err();
        }
        let memory = memory(&[0x9000]);
        deliver(&memory, AT, Some(&mail(PAGE))).unwrap_err();
        deliver(&memory, 0x6000, Some(&mail(1))).unwrap_err();
        for address in [SIZE - 4095, SIZE, u64::MAX, u64::MAX - 4095] {
            assert!(deliver(&memory, address, None).is_err(), "{address:#x}");
            assert!(room(&memory, address).is_err());
        }
        assert_eq!(room(&memory, AT).unwrap(), PAGE);
    }
}
