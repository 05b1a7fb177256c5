//! The socket device (virtio 1.2, 5.10), on Unix sockets of the host.
//!
//! A connection of the guest to the host's port P becomes one to whatever the
//! [`Connector`] reaches for P. A client of the listener that writes
//! `CONNECT P` and a newline becomes a connection to the guest's port P: it
//! reads `OK HOSTPORT` and a newline once the guest accepted, then what the
//! guest sends; refused, it is disconnected.
//!
//! Bytes go straight from sockets to the guest's memory and back. Only what a
//! peer does not take is held, and never more than the guest's credit.

mod backlog;
mod connection;
mod greeting;
mod limits;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

pub use self::limits::{Connector, Limits};

use self::muxer::Muxer;
use self::packet::{HEADER, Header};
use super::device::{DeviceId, NeedsReset, Token, VirtioDevice};
use super::queues::Queues;
pub use super::state::VsockState;
use super::state::{DeviceState, RestoreError, SaveError};
use super::{GuestMemory, feature};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Streams are supported (virtio 1.2, 5.10.3).
const F_STREAM: u32 = 0;
/// Connections do not exist any more (virtio 1.2, 5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;
/// The guest's identifiers that are no guest's: below are the hypervisor, the
/// guest itself and the host, above is the one that stands for any.
pub const CIDS: std::ops::Range<u32> = 3..u32::MAX;

/// The device.
pub struct Vsock {
    state: VsockState,
    config: [u8; 8],
    muxer: Muxer,
    /// Edges may have been missed.
    unpolled: bool,
}

impl Vsock {
    /// A device whose clients come by a listener.
    pub fn new(state: VsockState, listener: UnixListener, connect: Connector) -> io::Result<Self> {
        Vsock::with_limits(state, listener, connect, Limits::default())
    }

    /// The same, with other limits.
    pub fn with_limits(
        state: VsockState,
        listener: UnixListener,
        connect: Connector,
        limits: Limits,
    ) -> io::Result<Self> {
        let cid = u64::from(state.cid);
        Ok(Vsock {
            state,
            config: cid.to_le_bytes(),
            muxer: Muxer::new(cid, listener, connect, limits)?,
            unpolled: true,
        })
    }

    /// Moves packets both ways, until there are none or a queue has no chains.
    fn work(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        if std::mem::take(&mut self.unpolled) {
            self.muxer.poll();
        }
        loop {
            let stalled = self.transmit(queues)?;
            let progress = self.receive(queues)?;
            // Either may have made room for clients that wait.
            self.muxer.accept();
            // Without progress the guest has no buffers: it will say when it has.
            if !(stalled && progress) {
                break;
            }
        }
        self.tell_end(queues)
    }

    /// Takes packets of the guest. True if there may be more, for which there
    /// is no room.
    fn transmit(&mut self, queues: &mut Queues) -> Result<bool, NeedsReset> {
        while !self.muxer.is_full() {
            let Some(chain) = queues.pop(TRANSMIT)? else {
                return Ok(false);
            };
            let mut header = [0; HEADER];
            if !chain.writable.is_empty() || chain.readable.read(&mut header) < HEADER {
                return Err(NeedsReset(
                    "a packet to send must be readable and have a header",
                ));
            }
            self.muxer.packet(&Header::parse(&header), &chain.readable);
            queues.complete(TRANSMIT, chain.head, 0)?;
        }
        Ok(true)
    }

    /// Gives packets to the guest. True if there were any.
    fn receive(&mut self, queues: &mut Queues) -> Result<bool, NeedsReset> {
        let mut progress = false;
        while self.muxer.has_packets() {
            let Some(chain) = queues.pop(RECEIVE)? else {
                break;
            };
            if !chain.readable.is_empty() || chain.writable.len() <= HEADER {
                return Err(NeedsReset(
                    "a receive buffer must be writable and hold more than a header",
                ));
            }
            let Some(header) = self.muxer.next(&chain.writable) else {
                queues.unpop(RECEIVE);
                break;
            };
            chain.writable.write(&header.bytes());
            // At most the packet's largest size.
            let len = HEADER + header.len as usize;
            queues.complete(RECEIVE, chain.head, len)?;
            progress = true;
        }
        Ok(progress)
    }

    fn tell_end(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        if !self.state.ended {
            return Ok(());
        }
        let Some(chain) = queues.pop(EVENT)? else {
            return Ok(());
        };
        let event = EVENT_TRANSPORT_RESET.to_le_bytes();
        if !chain.readable.is_empty() || chain.writable.write(&event) < event.len() {
            return Err(NeedsReset(
                "an event buffer must be writable and hold an event",
            ));
        }
        self.state.ended = false;
        queues.complete(EVENT, chain.head, event.len())
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> DeviceId {
        DeviceId::Vsock
    }

    fn features(&self) -> u64 {
        feature(F_STREAM)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, _: u64, _: &Arc<GuestMemory>) -> Result<(), NeedsReset> {
        self.unpolled = true;
        Ok(())
    }

    fn process_queue(&mut self, _: usize, queues: &mut Queues) -> Result<(), NeedsReset> {
        self.work(queues)
    }

    fn sources(&self) -> Vec<(Token, RawFd)> {
        vec![(0, self.muxer.fd())]
    }

    fn handle_event(&mut self, _: Token, queues: &mut Queues) -> Result<(), NeedsReset> {
        self.unpolled = true;
        self.work(queues)
    }

    /// Takes what the guest has sent: the ends of connections, perhaps.
    fn quiesce(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        self.work(queues)
    }

    /// Connections are not in the state: a device that is made of it notifies the guest
    /// that they ended, if there were any.
    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::Vsock(VsockState {
            ended: self.state.ended || self.muxer.is_busy(),
            ..self.state.clone()
        }))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(state) = state else {
            return Err(RestoreError::Kind(DeviceId::Vsock));
        };
        if state.cid != self.state.cid {
            return Err(RestoreError::Mismatch("the guest's CID is another"));
        }
        self.state = state;
        Ok(())
    }

    fn reset(&mut self) {
        self.muxer.reset();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = self.muxer.counters;
        vec![
            ("connections", counters.connections),
            ("refused_connections", counters.refused),
            ("resets", counters.resets),
            ("stray_packets", counters.foreign_packets),
            ("received_bytes", counters.received),
            ("sent_bytes", counters.sent),
        ]
    }
}
