//! The network device (virtio 1.2, 5.1), on a TAP device of the host.
//!
//! The TAP speaks the same packet header as the guest, so checksums and
//! segmentation are passed through untouched. What the guest sends goes to the
//! TAP straight from its memory; what it receives is copied once, as only the
//! packet itself tells how many buffers it needs.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_net as spec;

use super::chain::Chain;
use super::device::{Broken, DeviceId, Token, VirtioDevice};
use super::queues::Queues;
use super::{GuestMemory, feature};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// `struct virtio_net_hdr_v1`, and where its `num_buffers` is.
pub const HEADER: usize = 12;
const NUM_BUFFERS: usize = 10;
/// The largest packet, with its header: 64 KiB and an Ethernet header.
const PACKET_MAX: usize = HEADER + 14 + 65_535;
const STATUS_LINK_UP: u16 = 1;

// Linux' `if_tun.h`.
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUN_F_CSUM: u32 = 1 << 0;
const TUN_F_TSO4: u32 = 1 << 1;
const TUN_F_TSO6: u32 = 1 << 2;
const TUN_F_TSO_ECN: u32 = 1 << 3;

/// What the guest may leave to the host, and the host to the guest.
const FEATURES: [u32; 11] = [
    spec::VIRTIO_NET_F_MAC,
    spec::VIRTIO_NET_F_STATUS,
    spec::VIRTIO_NET_F_MRG_RXBUF,
    spec::VIRTIO_NET_F_CSUM,
    spec::VIRTIO_NET_F_HOST_TSO4,
    spec::VIRTIO_NET_F_HOST_TSO6,
    spec::VIRTIO_NET_F_HOST_ECN,
    spec::VIRTIO_NET_F_GUEST_CSUM,
    spec::VIRTIO_NET_F_GUEST_TSO4,
    spec::VIRTIO_NET_F_GUEST_TSO6,
    spec::VIRTIO_NET_F_GUEST_ECN,
];

/// The device.
pub struct Net {
    /// Does not block; speaks [`HEADER`].
    tap: File,
    config: [u8; 8],
    mergeable: bool,
    /// A packet that was read, and waits for buffers.
    packet: Vec<u8>,
    waiting: bool,
    /// Buffers that were taken, and wait for a packet.
    held: VecDeque<Chain>,
}

impl Net {
    /// A device with a MAC address, on a TAP that does not block and has
    /// packet headers of [`HEADER`] bytes.
    pub fn new(tap: File, mac: [u8; 6]) -> Self {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&mac);
        config[6..].copy_from_slice(&STATUS_LINK_UP.to_le_bytes());
        Net {
            tap,
            config,
            mergeable: false,
            packet: Vec::new(),
            waiting: false,
            held: VecDeque::new(),
        }
    }

    /// Tells the TAP what it may leave to the guest.
    fn set_offloads(&self, acked: u64) {
        let offloads = [
            (spec::VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
            (spec::VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
            (spec::VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
            (spec::VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
        ];
        let flags = offloads
            .iter()
            .filter(|(bit, _)| acked & feature(*bit) != 0)
            .fold(0, |flags, (_, flag)| flags | flag);
        // SAFETY: an open descriptor, and a number.
        if unsafe {
            libc::ioctl(
                self.tap.as_raw_fd(),
                TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        } != 0
        {
            log::warn!("network: setting offloads: {}", io::Error::last_os_error());
        }
    }

    /// Passes packets to the guest until there are none, or it has no room.
    fn receive(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        loop {
            if !self.waiting {
                self.packet.resize(PACKET_MAX, 0);
                match self.tap.read(&mut self.packet) {
                    Ok(len) if len >= HEADER => self.packet.truncate(len),
                    Ok(_) => continue,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => {
                        if error.kind() != io::ErrorKind::WouldBlock {
                            log::warn!("network: receiving: {error}");
                        }
                        return Ok(());
                    }
                }
                self.waiting = true;
            }
            if !self.deliver(queues)? {
                return Ok(());
            }
            self.waiting = false;
        }
    }

    /// Puts the waiting packet into the guest's buffers; false if it has too few.
    fn deliver(&mut self, queues: &mut Queues) -> Result<bool, Broken> {
        let mut room: usize = self.held.iter().map(|chain| chain.writable.len()).sum();
        while room < self.packet.len() && (self.mergeable || self.held.is_empty()) {
            let Some(chain) = queues.pop(RECEIVE)? else {
                return Ok(false);
            };
            if !chain.readable.is_empty() || chain.writable.len() < HEADER {
                return Err(Broken(
                    "a receive buffer must be writable and hold a header",
                ));
            }
            room += chain.writable.len();
            self.held.push_back(chain);
        }
        if room < self.packet.len() {
            return Ok(true); // lost, as it does not fit the guest's buffers
        }
        let mut rest = self.packet.len();
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
        let mut rest = self.packet.as_slice();
        for chain in self.held.drain(..count) {
            let len = chain.writable.write(rest);
            rest = rest.get(len..).unwrap_or_default();
            queues.complete(RECEIVE, chain.head, len as u32)?;
        }
        Ok(true)
    }

    fn transmit(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        while let Some(chain) = queues.pop(TRANSMIT)? {
            if !chain.writable.is_empty() || chain.readable.len() < HEADER {
                return Err(Broken(
                    "a packet to send must be readable and have a header",
                ));
            }
            if chain.readable.len() <= PACKET_MAX {
                self.send(&chain);
            }
            queues.complete(TRANSMIT, chain.head, 0)?;
        }
        Ok(())
    }

    /// Sends a packet, or loses it, as a network may.
    fn send(&self, chain: &Chain) {
        let iovecs = chain.readable.iovecs();
        // SAFETY: the vectors point to guest memory that `chain` holds. The
        // kernel copies it once, and checks the header that it copied.
        let sent = unsafe {
            libc::writev(
                self.tap.as_raw_fd(),
                iovecs.as_ptr(),
                iovecs.len() as libc::c_int,
            )
        };
        if sent < 0 {
            log::debug!("network: sending: {}", io::Error::last_os_error());
        }
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> DeviceId {
        DeviceId::Net
    }

    fn features(&self) -> u64 {
        FEATURES.iter().fold(0, |all, &bit| all | feature(bit))
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, acked: u64, _: &Arc<GuestMemory>) -> Result<(), Broken> {
        self.mergeable = acked & feature(spec::VIRTIO_NET_F_MRG_RXBUF) != 0;
        self.set_offloads(acked);
        Ok(())
    }

    fn serve(&mut self, queue: usize, queues: &mut Queues) -> Result<(), Broken> {
        match queue {
            RECEIVE => self.receive(queues),
            _ => self.transmit(queues),
        }
    }

    fn sources(&self) -> Vec<(Token, RawFd)> {
        vec![(0, self.tap.as_raw_fd())]
    }

    fn ready(&mut self, _: Token, queues: &mut Queues) -> Result<(), Broken> {
        self.receive(queues)
    }

    fn reset(&mut self) {
        self.held.clear();
        self.packet = Vec::new();
        self.waiting = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::mmio::Status;
    use crate::virtio::testing::{Descriptor, Driver, MEMORY, SIZE};
    use proptest::prelude::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    /// A datagram socket keeps packets apart as a TAP does.
    fn driver(mergeable: bool) -> (Driver, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let net = Net::new(File::from(OwnedFd::from(theirs)), [2, 0, 0, 0, 0, 1]);
        let mut driver = Driver::new(Box::new(net));
        driver.start(match mergeable {
            true => feature(spec::VIRTIO_NET_F_MRG_RXBUF),
            false => 0,
        });
        (driver, ours)
    }

    fn packet(len: usize) -> Vec<u8> {
        let mut packet = vec![0; HEADER];
        packet.extend((0..len).map(|index| index as u8));
        packet
    }

    fn received(peer: &UnixDatagram) -> Option<Vec<u8>> {
        let mut data = vec![0; 1 << 17];
        peer.recv(&mut data).ok().map(|len| data[..len].to_vec())
    }

    #[test]
    fn packets_are_sent_whole_and_in_order() {
        let (mut driver, peer) = driver(true);
        let data = packet(100);
        driver.write(0x8000, &data);
        driver.add(
            TRANSMIT,
            &[
                Descriptor::readable(0x8000, 12),
                Descriptor::readable(0x800c, 100),
            ],
        );
        driver.add(TRANSMIT, &[Descriptor::readable(0x8000, 50)]);
        driver.kick(TRANSMIT);
        assert_eq!(driver.used(TRANSMIT), [(0, 0), (2, 0)]);
        assert_eq!(received(&peer).unwrap(), data);
        assert_eq!(received(&peer).unwrap(), data[..50]);
    }

    #[test]
    fn a_packet_too_large_is_lost_and_no_more() {
        let (mut driver, peer) = driver(true);
        driver.add(
            TRANSMIT,
            &[Descriptor::readable(0x8000, PACKET_MAX as u32 + 1)],
        );
        driver.add(TRANSMIT, &[Descriptor::readable(0x8000, 20)]);
        driver.kick(TRANSMIT);
        assert_eq!(driver.used(TRANSMIT).len(), 2);
        assert_eq!(received(&peer).unwrap().len(), 20);
    }

    #[test]
    fn a_packet_is_spread_over_mergeable_buffers() {
        let (mut driver, peer) = driver(true);
        let data = packet(1000);
        peer.send(&data).unwrap();
        driver.serve_source();
        assert_eq!(driver.used(RECEIVE), []);
        for index in 0..4 {
            driver.add(
                RECEIVE,
                &[Descriptor::writable(0x8000 + index * 0x200, 400)],
            );
            driver.kick(RECEIVE);
        }
        assert_eq!(driver.used(RECEIVE), [(0, 400), (1, 400), (2, 212)]);
        let mut got = driver.read(0x8000, 400);
        got.extend(driver.read(0x8200, 400));
        got.extend(driver.read(0x8400, 212));
        assert_eq!(got[NUM_BUFFERS..HEADER], [3, 0]);
        assert_eq!(got[HEADER..], data[HEADER..]);
        assert_eq!(driver.interrupts(), 1);
        // The fourth waits for the next packet.
        peer.send(&packet(8)).unwrap();
        driver.serve_source();
        assert_eq!(driver.used(RECEIVE), [(3, 20)]);
    }

    #[test]
    fn without_merging_a_packet_that_does_not_fit_is_lost() {
        let (mut driver, peer) = driver(false);
        driver.add(RECEIVE, &[Descriptor::writable(0x8000, 100)]);
        driver.kick(RECEIVE);
        peer.send(&packet(1000)).unwrap();
        peer.send(&packet(50)).unwrap();
        driver.serve_source();
        assert_eq!(driver.used(RECEIVE), [(0, 62)]);
        assert_eq!(driver.read(0x8000 + NUM_BUFFERS as u64, 2), [1, 0]);
    }

    #[test]
    fn buffers_of_the_wrong_shape_break_the_device() {
        let wrong_receive = [
            vec![Descriptor::readable(0x8000, 100)],
            vec![Descriptor::writable(0x8000, 11)],
            vec![
                Descriptor::readable(0x8000, 100),
                Descriptor::writable(0x9000, 100),
            ],
        ];
        let wrong_transmit = [
            vec![Descriptor::writable(0x8000, 100)],
            vec![Descriptor::readable(0x8000, 11)],
            vec![
                Descriptor::readable(0x8000, 100),
                Descriptor::writable(0x9000, 100),
            ],
        ];
        let all = wrong_receive.map(|chain| (RECEIVE, chain));
        for (queue, chain) in all
            .into_iter()
            .chain(wrong_transmit.map(|chain| (TRANSMIT, chain)))
        {
            let (mut driver, peer) = driver(true);
            peer.send(&packet(10)).unwrap();
            driver.add(queue, &chain);
            driver.kick(queue);
            assert!(
                driver.status().contains(Status::NEEDS_RESET),
                "{queue} {chain:?}"
            );
            driver.reset();
            driver.start(0);
            driver.add(TRANSMIT, &[Descriptor::readable(0x8000, 20)]);
            driver.kick(TRANSMIT);
            assert_eq!(received(&peer).unwrap().len(), 20);
        }
    }

    #[test]
    fn a_reset_forgets_buffers_and_packets() {
        let (mut driver, peer) = driver(true);
        driver.add(RECEIVE, &[Descriptor::writable(0x8000, 100)]);
        driver.kick(RECEIVE);
        peer.send(&packet(1000)).unwrap();
        driver.serve_source();
        driver.reset();
        driver.write(0x8000, &[0x77; 100]);
        peer.send(&packet(8)).unwrap();
        driver.serve_source();
        assert_eq!(driver.read(0x8000, 100), [0x77; 100]);
        driver.start(0);
        driver.add(RECEIVE, &[Descriptor::writable(0x9000, 100)]);
        driver.kick(RECEIVE);
        assert_eq!(driver.used(RECEIVE), [(0, 20)]);
    }

    #[test]
    fn a_guest_that_never_rests_leaves_others_their_turn() {
        let (mut driver, _peer) = driver(true);
        driver.describe(TRANSMIT, 0, Descriptor::readable(0x8000, 20));
        for _ in 0..SIZE {
            driver.offer(TRANSMIT, 0);
        }
        driver.kick(TRANSMIT);
        assert_eq!(driver.used(TRANSMIT).len(), usize::from(SIZE));
    }

    proptest! {
        #[test]
        fn no_chains_panic(
            chains in prop::collection::vec(
                (0usize..2, prop::collection::vec((any::<bool>(), 0u64..MEMORY as u64 + 100, 0u32..70_000), 1..4)),
                1..8),
            sizes in prop::collection::vec(0usize..3000, 0..8),
            mergeable: bool,
        ) {
            let (mut driver, peer) = driver(mergeable);
            for size in sizes {
                let _ = peer.send(&packet(size));
            }
            for (queue, chain) in chains {
                let chain: Vec<_> = chain.iter().map(|&(write, addr, len)| match write {
                    true => Descriptor::writable(addr.max(0x8000), len),
                    false => Descriptor::readable(addr.max(0x8000), len),
                }).collect();
                driver.add(queue, &chain);
                driver.kick(queue);
                driver.transport.source_ready(0);
            }
        }
    }
}
