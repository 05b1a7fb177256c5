//! A TAP device: a packet a call, with the header that the guest uses, too.

#![allow(unsafe_code, reason = "the TAP's ioctls")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_net as spec;

use super::backend::Incoming;
use super::{HEADER, PACKET_MAX};
use crate::virtio::chain::Chain;
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
    /// Room for a packet, from the first one on.
    packet: Vec<u8>,
    /// The length of one that was read, and waits for buffers.
    waiting: Option<usize>,
}

impl Tap {
    pub fn new(file: File) -> Self {
        Tap {
            file,
            attached: true,
            packet: Vec::new(),
            waiting: None,
        }
    }

    pub fn source(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub fn reset(&mut self) {
        self.packet = Vec::new();
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

    pub fn poll(&mut self) -> Incoming {
        if self.waiting.is_some() {
            return Incoming::Packet;
        }
        self.packet.resize(PACKET_MAX, 0);
        let read = loop {
            match self.file.read(&mut self.packet) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        match read {
            Ok(len) if len >= HEADER => {
                self.waiting = Some(len);
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

    pub fn packet(&mut self) -> &mut [u8] {
        let len = self.waiting.unwrap_or(0);
        self.packet.get_mut(..len).unwrap_or_default()
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
