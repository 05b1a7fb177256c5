//! A pair of queues, and its descriptor of the TAP.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_net as spec;

use super::{HEADER, NUM_BUFFERS, PACKET_MAX};
use crate::virtio::chain::Chain;
use crate::virtio::device::Broken;
use crate::virtio::feature;
use crate::virtio::queues::Queues;

// Linux' `if_tun.h`.
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const TUN_F_CSUM: u32 = 1 << 0;
const TUN_F_TSO4: u32 = 1 << 1;
const TUN_F_TSO6: u32 = 1 << 2;
const TUN_F_TSO_ECN: u32 = 1 << 3;

/// What came of a try to receive.
pub enum Received {
    /// The guest has a packet of so many bytes.
    Packet(u64),
    /// It did not fit the guest's buffers, or was none.
    Lost,
    /// There is no packet, or the guest has no room; it will be told.
    Nothing,
}

/// The host's side of a pair.
pub struct Pair {
    /// Does not block; speaks [`HEADER`].
    tap: File,
    /// The TAP gives packets to it.
    attached: bool,
    /// Room for a packet, from the first one on.
    packet: Vec<u8>,
    /// The length of one that was read, and waits for buffers.
    waiting: Option<usize>,
    /// Buffers that were taken, and wait for a packet.
    held: VecDeque<Chain>,
}

impl Pair {
    pub fn new(tap: File) -> Self {
        Pair {
            tap,
            attached: true,
            packet: Vec::new(),
            waiting: None,
            held: VecDeque::new(),
        }
    }

    /// Readable when there are packets.
    pub fn source(&self) -> RawFd {
        self.tap.as_raw_fd()
    }

    /// Forgets the guest's buffers, and what it did not get.
    pub fn reset(&mut self) {
        self.held.clear();
        self.packet = Vec::new();
        self.waiting = None;
    }

    /// Whether the TAP shall give packets to this pair.
    pub fn attach(&mut self, attached: bool) -> io::Result<()> {
        if self.attached == attached {
            return Ok(());
        }
        // SAFETY: plain bytes, for which zeroes are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = match attached {
            true => libc::IFF_ATTACH_QUEUE,
            false => libc::IFF_DETACH_QUEUE,
        } as libc::c_short;
        // SAFETY: reads the live request.
        if unsafe { libc::ioctl(self.tap.as_raw_fd(), TUNSETQUEUE, &request) } != 0 {
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
        if unsafe { libc::ioctl(self.tap.as_raw_fd(), TUNSETOFFLOAD, flags) } != 0 {
            log::warn!("network: setting offloads: {}", io::Error::last_os_error());
        }
    }

    /// Passes one packet to the guest.
    pub fn receive(
        &mut self,
        queue: usize,
        mergeable: bool,
        queues: &mut Queues,
    ) -> Result<Received, Broken> {
        if self.waiting.is_none() {
            self.packet.resize(PACKET_MAX, 0);
            let read = loop {
                match self.tap.read(&mut self.packet) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    read => break read,
                }
            };
            match read {
                Ok(len) if len >= HEADER => self.waiting = Some(len),
                Ok(_) => return Ok(Received::Lost),
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        log::warn!("network: receiving: {error}");
                    }
                    return Ok(Received::Nothing);
                }
            }
        }
        let received = self.deliver(queue, mergeable, queues)?;
        if !matches!(received, Received::Nothing) {
            self.waiting = None;
        }
        Ok(received)
    }

    /// Puts the waiting packet into the guest's buffers, if it has enough.
    fn deliver(
        &mut self,
        queue: usize,
        mergeable: bool,
        queues: &mut Queues,
    ) -> Result<Received, Broken> {
        let len = self.waiting.unwrap_or(0).min(self.packet.len());
        let mut room: usize = self.held.iter().map(|chain| chain.writable.len()).sum();
        while room < len && (mergeable || self.held.is_empty()) {
            let Some(chain) = queues.pop(queue)? else {
                return Ok(Received::Nothing);
            };
            if !chain.readable.is_empty() || chain.writable.len() < HEADER {
                return Err(Broken(
                    "a receive buffer must be writable and hold a header",
                ));
            }
            room += chain.writable.len();
            self.held.push_back(chain);
        }
        if room < len {
            return Ok(Received::Lost);
        }
        let mut rest = len;
        let count = self
            .held
            .iter()
            .take_while(|chain| {
                let more = rest > 0;
                rest = rest.saturating_sub(chain.writable.len());
                more
            })
            .count();
        let count_bytes = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        if let Some(field) = self.packet.get_mut(NUM_BUFFERS..HEADER) {
            field.copy_from_slice(&count_bytes);
        }
        let mut rest = self.packet.get(..len).unwrap_or_default();
        for chain in self.held.drain(..count) {
            let len = chain.writable.write(rest);
            rest = rest.get(len..).unwrap_or_default();
            queues.complete(queue, chain.head, len as u32)?;
        }
        Ok(Received::Packet((len - HEADER) as u64))
    }

    /// Sends a packet, or loses it, as a network may.
    pub fn send(&self, chain: &Chain) -> bool {
        let iovecs = chain.readable.iovecs();
        let count = iovecs.len() as libc::c_int;
        // SAFETY: the vectors point to guest memory that `chain` holds. The
        // kernel copies it once, and checks the header that it copied.
        let sent = unsafe { libc::writev(self.tap.as_raw_fd(), iovecs.as_ptr(), count) };
        if sent < 0 {
            log::debug!("network: sending: {}", io::Error::last_os_error());
        }
        sent >= 0
    }
}
