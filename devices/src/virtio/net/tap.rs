//! A TAP device: a packet a call, with the header that the guest uses, too.

#![allow(unsafe_code, reason = "the TAP's ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_net as spec;

use super::packet::{HEADER, Incoming, PACKET_MAX};
use crate::virtio::chain::{Buffer, Chain};
use crate::virtio::feature;
use crate::virtio::transfer;

// Linux' `if_tun.h`.
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const TUN_F_CSUM: u32 = 1 << 0;
const TUN_F_TSO4: u32 = 1 << 1;
const TUN_F_TSO6: u32 = 1 << 2;
const TUN_F_TSO_ECN: u32 = 1 << 3;

/// A descriptor of a TAP.
pub struct Tap {
    /// Does not block; speaks [`HEADER`].
    file: File,
    /// The TAP gives packets to it.
    attached: bool,
    /// Room for what the guest's buffers did not have room for of a packet, from the first
    /// one on.
    rest: Vec<u8>,
    /// One that was read, and waits for more buffers.
    waiting: Option<Waiting>,
}

/// A packet of which a part lies in the guest's buffers, and the rest behind them.
#[derive(Clone, Copy)]
struct Waiting {
    len: usize,
    placed: usize,
}

impl Tap {
    pub fn new(file: File) -> Self {
        Tap {
            file,
            attached: true,
            rest: Vec::new(),
            waiting: None,
        }
    }

    pub fn source(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub fn reset(&mut self) {
        self.rest = Vec::new();
        self.waiting = None;
    }

    /// Whether the TAP shall give packets to this descriptor.
    pub fn attach(&mut self, attached: bool) -> io::Result<()> {
        if self.attached == attached {
            return Ok(());
        }
        // SAFETY: plain bytes, for which zeroes are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flags = match attached {
            true => libc::IFF_ATTACH_QUEUE,
            false => libc::IFF_DETACH_QUEUE,
        };
        request.ifr_ifru.ifru_flags = flags.try_into().map_err(io::Error::other)?;
        // SAFETY: reads the live request.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETQUEUE, &request) } != 0 {
            let error = io::Error::last_os_error();
            // What is no TAP has nothing to switch.
            if error.raw_os_error() != Some(libc::ENOTTY) {
                return Err(error);
            }
        }
        self.attached = attached;
        Ok(())
    }

    /// Tells the TAP what it may leave to the guest.
    pub fn set_offloads(&self, acked: u64) {
        // A driver may ask for what needs another (virtio 1.2, 5.1.3.1): the
        // TAP refuses that, and would keep what an earlier driver asked for.
        let has = |bit| acked & feature(bit) != 0;
        let csum = has(spec::VIRTIO_NET_F_GUEST_CSUM);
        let tso4 = csum && has(spec::VIRTIO_NET_F_GUEST_TSO4);
        let tso6 = csum && has(spec::VIRTIO_NET_F_GUEST_TSO6);
        let ecn = (tso4 || tso6) && has(spec::VIRTIO_NET_F_GUEST_ECN);
        let offloads = [
            (csum, TUN_F_CSUM),
            (tso4, TUN_F_TSO4),
            (tso6, TUN_F_TSO6),
            (ecn, TUN_F_TSO_ECN),
        ];
        let flags = offloads
            .iter()
            .filter(|(wanted, _)| *wanted)
            .fold(0, |flags, (_, flag)| flags | flag);
        let flags = libc::c_ulong::from(flags);
        // SAFETY: an open descriptor, and a number.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, flags) } != 0 {
            log::warn!("network: setting offloads: {}", io::Error::last_os_error());
        }
    }

    /// Reads a packet to the guest's buffers, one after the other, unless one waits.
    pub fn poll<'a>(&mut self, buffers: impl Iterator<Item = &'a Buffer>) -> Incoming {
        if self.waiting.is_some() {
            return Incoming::Packet;
        }
        self.rest.resize(PACKET_MAX, 0);
        match transfer::read_packet(&self.file, buffers, &mut self.rest) {
            Ok((len, placed)) if (HEADER..=PACKET_MAX).contains(&len) => {
                self.waiting = Some(Waiting { len, placed });
                Incoming::Packet
            }
            Ok(_) => Incoming::Lost,
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    log::warn!("network: receiving: {error}");
                }
                Incoming::Nothing
            }
        }
    }

    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// The length of the packet that waits, and how much of it is in the guest's buffers.
    pub fn waiting(&self) -> (usize, usize) {
        self.waiting
            .map_or((0, 0), |Waiting { len, placed }| (len, placed))
    }

    /// What is behind them.
    pub fn rest(&self) -> &[u8] {
        let (len, placed) = self.waiting();
        self.rest
            .get(..len.saturating_sub(placed))
            .unwrap_or_default()
    }

    /// What lies in the guest's buffers is read back, to be with the rest.
    pub fn take_back(&mut self, read: impl FnOnce(&mut [u8])) {
        if let Some(Waiting { len, placed }) = &mut self.waiting {
            self.rest.copy_within(..*len - *placed, *placed);
            read(self.rest.get_mut(..*placed).unwrap_or_default());
            *placed = 0;
        }
    }

    pub fn forget(&mut self) {
        self.waiting = None;
    }

    pub fn send(&self, chain: &Chain) -> bool {
        // The kernel copies it once, and checks the header that it copied.
        let sent = transfer::write(&self.file, &chain.readable);
        if let Err(error) = &sent {
            log::debug!("network: sending: {error}");
        }
        sent.is_ok()
    }
}
