//! The seam between transport and device: the transport owns features, status,
//! queues and interrupts; a device only moves bytes.

use std::os::fd::RawFd;
use std::sync::Arc;

pub use super::device_id::DeviceId;
pub use super::needs_reset::NeedsReset;

use super::GuestMemory;
use super::queues::{Queues, Ring};
use super::state::{DeviceState, RestoreError, SaveError};

/// Names one of a device's sources of events.
pub type Token = u32;

/// A device behind a transport.
///
/// `process_queue` and `handle_event` must not block, and must leave the loop when
/// [`Queues::pop`] says that there is no chain: it also says so when the device
/// had its share, and calls again.
pub trait VirtioDevice: Send {
    /// Its kind.
    fn id(&self) -> DeviceId;

    /// The features that it offers, beside those of the transport.
    fn features(&self) -> u64;

    /// The largest size of each queue.
    fn queue_sizes(&self) -> &[u16];

    /// What the guest reads of the configuration space.
    fn config(&self) -> &[u8];

    /// It wants to hear of reads of the configuration space, which makes them slower.
    fn hears_config_reads(&self) -> bool {
        false
    }

    /// The guest has read of the configuration space. Comes only if the device wants it.
    fn config_read(&mut self) {}

    /// The guest writes to the configuration space. The offset is any number.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The guest and the device agreed on features: chains may follow.
    fn activate(&mut self, acked: u64, memory: &Arc<GuestMemory>) -> Result<(), NeedsReset>;

    /// Another process runs the queues: the transport leaves them and their
    /// notifications to that, and offers no features of its own.
    fn is_vhost_user(&self) -> bool {
        false
    }

    /// Comes after the activation, if the device is remote: its queues, but for
    /// those that the driver left out.
    fn start_backend(&mut self, _: &[Option<Ring>]) -> Result<(), NeedsReset> {
        Ok(())
    }

    /// There are chains in a queue.
    fn process_queue(&mut self, queue: usize, queues: &mut Queues) -> Result<(), NeedsReset>;

    /// Descriptors of the host that [`VirtioDevice::handle_event`] is to be called for.
    /// They are watched on edges, and from before the activation on.
    fn sources(&self) -> Vec<(Token, RawFd)> {
        Vec::new()
    }

    /// A source is ready.
    fn handle_event(&mut self, _: Token, _: &mut Queues) -> Result<(), NeedsReset> {
        Ok(())
    }

    /// Forgets the guest: when this returns, nothing of it is touched any more.
    fn reset(&mut self);

    /// Finishes what was begun with popped chains, or puts them back, so that all that
    /// is on its way lies in the rings, in guest memory and in the state. It comes just
    /// before [`VirtioDevice::save`]; afterwards the device goes on.
    fn quiesce(&mut self, _: &mut Queues) -> Result<(), NeedsReset> {
        Ok(())
    }

    /// What the guest can tell of the device, beside the transport and its memory.
    fn save(&self) -> Result<DeviceState, SaveError>;

    /// Takes a saved state over. If the driver was running, this comes after the
    /// activation, and each queue is processed afterwards.
    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError>;

    /// What it has counted since it was made, by name: `read_bytes`, …
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}
