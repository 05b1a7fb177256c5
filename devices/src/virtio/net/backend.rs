//! The host's end of a pair of queues.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;

use virtio_bindings::virtio_net as spec;

use super::filter::FrameFilter;
use super::packet::Incoming;
use super::stream::Stream;
use super::tap::Tap;
use crate::virtio::chain::{Buffer, Chain};

enum Kind {
    Tap(Tap),
    Stream(Box<Stream>),
}

/// The host's end of a pair of queues.
pub struct Backend(Kind);

/// What the guest may leave to a TAP, and the TAP to the guest.
const TAP_FEATURES: [u32; 8] = [
    spec::VIRTIO_NET_F_CSUM,
    spec::VIRTIO_NET_F_HOST_TSO4,
    spec::VIRTIO_NET_F_HOST_TSO6,
    spec::VIRTIO_NET_F_HOST_ECN,
    spec::VIRTIO_NET_F_GUEST_CSUM,
    spec::VIRTIO_NET_F_GUEST_TSO4,
    spec::VIRTIO_NET_F_GUEST_TSO6,
    spec::VIRTIO_NET_F_GUEST_ECN,
];

impl Backend {
    /// A descriptor of a TAP that does not block, and has packet headers of
    /// [`HEADER`](super::HEADER) bytes.
    pub fn tap(file: File) -> Self {
        Backend(Kind::Tap(Tap::new(file)))
    }

    /// A socket that carries Ethernet frames, each behind its length in four
    /// bytes, big end first.
    pub fn stream(socket: UnixStream, filter: Option<Box<dyn FrameFilter>>) -> io::Result<Self> {
        let stream = Stream::new(socket, filter)?;
        Ok(Backend(Kind::Stream(Box::new(stream))))
    }

    /// What it adds to the device's features.
    pub(super) fn features(&self) -> &'static [u32] {
        match &self.0 {
            Kind::Tap(_) => &TAP_FEATURES,
            Kind::Stream(_) => &[],
        }
    }

    /// Readable when there are packets.
    pub(super) fn source(&self) -> RawFd {
        match &self.0 {
            Kind::Tap(tap) => tap.source(),
            Kind::Stream(stream) => stream.source(),
        }
    }

    /// Readable when one that had no room has some again.
    pub(super) fn room_source(&self) -> Option<RawFd> {
        match &self.0 {
            Kind::Tap(_) => None,
            Kind::Stream(stream) => Some(stream.room_source()),
        }
    }

    /// Readable when [`handle_timer`](Self::handle_timer) shall be called.
    pub(super) fn timer_source(&self) -> Option<RawFd> {
        match &self.0 {
            Kind::Tap(_) => None,
            Kind::Stream(stream) => Some(stream.timer_source()),
        }
    }

    /// Gets the packets that its filter has for the guest by now.
    pub(super) fn handle_timer(&mut self) {
        if let Kind::Stream(stream) = &mut self.0 {
            stream.handle_timer();
        }
    }

    /// Forgets what the guest did not get.
    pub(super) fn reset(&mut self) {
        match &mut self.0 {
            Kind::Tap(tap) => tap.reset(),
            Kind::Stream(stream) => stream.reset(),
        }
    }

    /// Whether it shall get packets for the guest.
    pub(super) fn attach(&mut self, attached: bool) -> io::Result<()> {
        match &mut self.0 {
            Kind::Tap(tap) => tap.attach(attached),
            Kind::Stream(_) => Ok(()),
        }
    }

    /// The guest and the device agreed on features.
    pub(super) fn set_offloads(&self, acked: u64) {
        if let Kind::Tap(tap) = &self.0 {
            tap.set_offloads(acked);
        }
    }

    /// It reads packets to the guest's buffers, which must be there before.
    pub(super) fn places(&self) -> bool {
        match &self.0 {
            Kind::Tap(_) => true,
            Kind::Stream(_) => false,
        }
    }

    /// Looks for a packet for the guest, unless one waits. One that is placed goes to these
    /// buffers.
    pub(super) fn poll<'a>(&mut self, buffers: impl Iterator<Item = &'a Buffer>) -> Incoming {
        match &mut self.0 {
            Kind::Tap(tap) => tap.poll(buffers),
            Kind::Stream(stream) => stream.poll(),
        }
    }

    /// A packet waits for buffers.
    pub(super) fn is_waiting(&self) -> bool {
        match &self.0 {
            Kind::Tap(tap) => tap.is_waiting(),
            Kind::Stream(stream) => stream.is_waiting(),
        }
    }

    /// The length of the one that waits, with its header, and how much of it lies in the
    /// guest's buffers.
    pub(super) fn waiting(&mut self) -> (usize, usize) {
        match &mut self.0 {
            Kind::Tap(tap) => tap.waiting(),
            Kind::Stream(stream) => (stream.packet().len(), 0),
        }
    }

    /// What of it does not lie there.
    pub(super) fn rest(&mut self) -> &[u8] {
        match &mut self.0 {
            Kind::Tap(tap) => tap.rest(),
            Kind::Stream(stream) => stream.packet(),
        }
    }

    /// The guest's buffers go: what lies in them of a packet that waits is read back.
    pub(super) fn take_back(&mut self, read: impl FnOnce(&mut [u8])) {
        if let Kind::Tap(tap) = &mut self.0 {
            tap.take_back(read);
        }
    }

    /// The one that waits does so no more.
    pub(super) fn forget(&mut self) {
        match &mut self.0 {
            Kind::Tap(tap) => tap.forget(),
            Kind::Stream(stream) => stream.forget(),
        }
    }

    /// It takes another packet from the guest; else its source tells when.
    pub(super) fn has_room(&mut self) -> bool {
        match &mut self.0 {
            Kind::Tap(_) => true,
            Kind::Stream(stream) => stream.has_room(),
        }
    }

    /// Takes a packet with its header, at most
    /// [`PACKET_MAX`](super::PACKET_MAX) bytes, or loses it, as a network may.
    pub(super) fn send(&mut self, chain: &Chain) -> bool {
        match &mut self.0 {
            Kind::Tap(tap) => tap.send(chain),
            Kind::Stream(stream) => stream.send(chain),
        }
    }

    /// The guest has no more packets for now: those that it took are sent.
    pub(super) fn flush(&mut self) {
        if let Kind::Stream(stream) = &mut self.0 {
            stream.flush();
        }
    }

    /// It has packets for the guest that its source does not tell of.
    pub(super) fn has_answers(&self) -> bool {
        match &self.0 {
            Kind::Tap(_) => false,
            Kind::Stream(stream) => stream.has_answers(),
        }
    }

    /// Why its network is gone for good; told once.
    pub(super) fn take_loss(&mut self) -> Option<String> {
        match &mut self.0 {
            Kind::Tap(_) => None,
            Kind::Stream(stream) => stream.take_loss(),
        }
    }

    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        match &self.0 {
            Kind::Tap(_) => Vec::new(),
            Kind::Stream(stream) => stream.counters(),
        }
    }
}
