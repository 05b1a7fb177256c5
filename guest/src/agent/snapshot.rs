//! The snapshot point, and becoming another machine behind it.

#![allow(unsafe_code, reason = "the kernel's random numbers, and its clock")]

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::slice;

use mayfly_protocol::mailbox::{Directory, Mail, PAGE, open};

use super::names;
use crate::interface;
use crate::port;
use crate::system::check;

const RANDOM: &str = "/dev/urandom";
const HARDWARE_RANDOM: &str = "/dev/hwrng";
const MACHINE_ID: &str = "/etc/machine-id";

/// How many pages there are for mail: a command with its environment. What is longer comes
/// by the connection.
const PAGES: usize = 32;
const PAGEMAP: &str = "/proc/self/pagemap";

/// Stops at the snapshot point. Behind it this is the same machine or a clone, long after
/// perhaps: what the host says to it, if it says anything, has been heeded when this returns.
/// How the next connection to the host begins is left.
pub fn pause() -> Result<Vec<u8>, String> {
    let failed = |error| format!("the mailbox: {error}");
    let mailbox = Mailbox::new().map_err(failed)?;
    let mail = mailbox.pause().map_err(failed)?;
    match mail {
        None => Ok(Vec::new()),
        Some(mail) => {
            become_another(&mail)?;
            Ok(mail.frames)
        }
    }
}

/// Pages that the host writes to: the directory, and those for mail.
struct Mailbox(NonNull<[[u8; PAGE]; PAGES + 1]>);

impl Mailbox {
    /// Pages of zeroes, that stay in memory.
    fn new() -> io::Result<Self> {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | libc::MAP_LOCKED,
        );
        let len = (PAGES + 1) * PAGE;
        // SAFETY: takes addresses that nothing uses.
        let pages = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        match NonNull::new(pages) {
            Some(pages) if pages.as_ptr() != libc::MAP_FAILED => Ok(Mailbox(pages.cast())),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Waits for mail.
    fn pause(self) -> io::Result<Option<Mail>> {
        let (directory, mail) = self.addresses()?;
        let page = Directory { pages: mail }.to_page();
        // SAFETY: the first page of the mapping, which nothing else refers to.
        unsafe { self.0.as_ptr().cast::<[u8; PAGE]>().write(page) };
        port::snapshot_point(directory);
        // SAFETY: as many pages as the mapping has; the host has written what it had to, and
        // the access to the port is one to memory for all that the compiler knows.
        let pages = unsafe { slice::from_raw_parts(self.0.as_ptr().cast(), PAGES + 1) };
        match pages.split_first() {
            Some((directory, mail)) => open(directory, mail.as_flattened()),
            None => Ok(None),
        }
    }

    /// The physical addresses of the directory and of the pages for mail. They are the
    /// kernel's to change, but nothing makes it do so to locked pages in the meantime; if it
    /// did, there would be no word in the mailbox.
    fn addresses(&self) -> io::Result<(u64, Vec<u64>)> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let first = self.0.addr().get() / PAGE;
        let mut entries = [[0; 8]; PAGES + 1];
        let pagemap = File::open(PAGEMAP)?;
        pagemap.read_exact_at(entries.as_flattened_mut(), (first * 8) as u64)?;
        let mut addresses = entries.into_iter().map(|entry| {
            let entry = u64::from_ne_bytes(entry);
            match (entry & PRESENT, entry & FRAME) {
                (0, _) | (_, 0) => Err(io::Error::other("the kernel does not say where it is")),
                (_, frame) => Ok(frame * PAGE as u64),
            }
        });
        let directory = addresses.next().unwrap_or(Ok(0))?;
        Ok((directory, addresses.collect::<io::Result<_>>()?))
    }
}

/// There may be secrets in it.
impl Drop for Mailbox {
    fn drop(&mut self) {
        // SAFETY: as many pages as the mapping has, which is not used any more.
        unsafe {
            self.0.as_ptr().write_bytes(0, 1);
            libc::munmap(self.0.as_ptr().cast(), (PAGES + 1) * PAGE);
        }
    }
}

/// In this order: no random number is drawn, and no time looked at, before they are right.
fn become_another(mail: &Mail) -> Result<(), String> {
    let failed = |what: &str, error: io::Error| format!("{what}: {error}");
    rekey(mail).map_err(|error| failed("the kernel's random numbers", error))?;
    forget_hardware_bytes();
    set_clock(mail.realtime).map_err(|error| failed("the clock", error))?;
    if let Some(hostname) = &mail.hostname {
        names::rename(hostname)?;
    }
    if let Some(id) = &mail.machine_id {
        set_machine_id(Path::new(MACHINE_ID), id).map_err(|error| failed(MACHINE_ID, error))?;
    }
    if let Some(net) = &mail.net {
        interface::configure(interface::FIRST, &net.addresses, &net.gateways)?;
        names::give_resolvers(net)?;
    }
    Ok(())
}

/// Gives the kernel random bytes, and makes it forget what it would have drawn: writing to
/// its device does only the first.
fn rekey(mail: &Mail) -> io::Result<()> {
    const ADD_ENTROPY: libc::c_ulong = 0x4008_5203; // RNDADDENTROPY
    const RESEED: libc::c_ulong = 0x5207; // RNDRESEEDCRNG
    /// Linux' `rand_pool_info`, with what follows it.
    #[repr(C)]
    struct Entropy {
        bits: libc::c_int,
        len: libc::c_int,
        bytes: [[u8; 32]; 2],
        generation: [u8; 16],
    }
    let device = File::options().write(true).open(RANDOM)?;
    let entropy = Entropy {
        bits: size_of_val(&mail.entropy) as libc::c_int * 8,
        len: (size_of_val(&mail.entropy) + size_of_val(&mail.generation)) as libc::c_int,
        bytes: mail.entropy,
        generation: mail.generation,
    };
    // SAFETY: reads a live structure of the length that it tells.
    check(unsafe { libc::ioctl(device.as_raw_fd(), ADD_ENTROPY, &entropy) }.into())?;
    // SAFETY: passes no memory.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RESEED) }.into())
}

/// Drops the random bytes that the entropy device gave before: all clones have the same. There
/// are a few hundred at most; what comes behind them is this machine's own.
fn forget_hardware_bytes() {
    const MOST: usize = 64;
    let device = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(HARDWARE_RANDOM);
    // A kernel may have no such device.
    let Ok(mut device) = device else { return };
    for _ in 0..MOST {
        // Without waiting it reads what is there, and asks for more when that is used up.
        if !matches!(device.read(&mut [0; 64]), Ok(1..)) {
            return;
        }
    }
}

fn set_clock(nanoseconds: u64) -> io::Result<()> {
    const SECOND: u64 = 1_000_000_000;
    let time = libc::timespec {
        tv_sec: (nanoseconds / SECOND)
            .try_into()
            .map_err(io::Error::other)?,
        tv_nsec: (nanoseconds % SECOND)
            .try_into()
            .map_err(io::Error::other)?,
    };
    // SAFETY: reads a live structure.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &time) }.into())
}

/// An image that has none gets none: its init makes one, or nobody wants it.
fn set_machine_id(path: &Path, id: &[u8; 16]) -> io::Result<()> {
    match fs::read(path) {
        Ok(text) if !text.trim_ascii().is_empty() => {
            let digits: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
            fs::write(path, digits + "\n")
        }
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_at_the_mailbox_is_an_error() {
        let mailbox = Mailbox::new().unwrap();
        // Only root can read its pages' addresses, and PID 1 is root.
        if mailbox.addresses().is_err() {
            return;
        }
        let (directory, mail) = mailbox.addresses().unwrap();
        let mut all = [&[directory], &mail[..]].concat();
        assert!(all.iter().all(|address| address % PAGE as u64 == 0));
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), PAGES + 1);
        let directory = Directory { pages: mail }.to_page();
        assert!(open(&directory, &[0; PAGE]).is_err());
    }

    #[test]
    fn only_a_system_with_an_identifier_gets_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine-id");
        let id = [0x0a; 16];
        set_machine_id(&path, &id).unwrap();
        assert!(!path.exists());
        fs::write(&path, "\n").unwrap();
        set_machine_id(&path, &id).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "\n");
        fs::write(&path, "0123\n").unwrap();
        set_machine_id(&path, &id).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, "0a".repeat(16) + "\n");
    }
}
