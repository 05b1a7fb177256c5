//! The control queue (virtio 1.2, 5.1.6.5): how many pairs the guest uses.

use virtio_bindings::virtio_net as spec;

use super::Net;
use crate::virtio::device::NeedsReset;
use crate::virtio::queues::Queues;

/// Class, command, and the only arguments that are known.
const COMMAND: usize = 4;

/// How a command ended (`VIRTIO_NET_OK`, `VIRTIO_NET_ERR`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Ack {
    Ok = 0,
    Error = 1,
}

impl Net {
    pub(super) fn control(&mut self, queue: usize, queues: &mut Queues) -> Result<(), NeedsReset> {
        while let Some(chain) = queues.pop(queue)? {
            if chain.writable.is_empty() {
                return Err(NeedsReset("a control command has no room for its answer"));
            }
            let mut command = [0; COMMAND];
            let whole =
                chain.readable.len() == COMMAND && chain.readable.read(&mut command) == COMMAND;
            let ack = match whole && self.obey(command) {
                true => Ack::Ok,
                false => Ack::Error,
            };
            let len = chain.writable.write(&[ack as u8]);
            queues.complete(queue, chain.head, len)?;
        }
        Ok(())
    }

    /// Carries a command out, if it is known and makes sense.
    fn obey(&mut self, [class, command, low, high]: [u8; COMMAND]) -> bool {
        let known = (u32::from(class), u32::from(command))
            == (
                spec::VIRTIO_NET_CTRL_MQ,
                spec::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
            );
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        known && (1..=self.pairs.len()).contains(&pairs) && self.use_pairs(pairs)
    }
}
