//! One terminal, `/dev/hvc0` in Linux.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::features::{F_SIZE, QUEUE_SIZE};
use super::port::{DevicePort, Port};
use crate::bus::lock;
use crate::char_device::TerminalSize;
use crate::virtio::device::{DeviceId, NeedsReset, Token, VirtioDevice};
use crate::virtio::queues::Queues;
use crate::virtio::state::{ConsoleState, DeviceState, RestoreError, SaveError};
use crate::virtio::{GuestMemory, feature};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [QUEUE_SIZE; 2];

/// The device.
///
/// Linux' driver loses what it is given before the terminal is set up, and does
/// not say when that is. But then it reads the configuration if it was notified
/// of a change: it is notified of one at the start, and input waits until it reads.
pub struct Console {
    port: DevicePort,
    /// Columns and rows (virtio 1.2, 5.3.4).
    config: [u8; 4],
    /// The driver is interested in the size.
    sized: bool,
    /// It was notified that the configuration changed.
    told: bool,
    wake: EventFd,
}

impl Console {
    /// A terminal. `host_event` is signalled when there is output after there
    /// was none, or room for input after there was none.
    pub fn new(host_event: EventFd) -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK)?;
        Ok(Console {
            port: DevicePort::new(host_event, wake.try_clone()?),
            config: [0; 4],
            sized: false,
            told: false,
            wake,
        })
    }

    /// The host's side.
    pub fn port(&self) -> Arc<Mutex<Port>> {
        self.port.shared().clone()
    }

    fn receive(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        self.port.receive(RECEIVE, queues)?;
        // A terminal has no way to tell; the next client's input goes on.
        lock(self.port.shared()).take_hang_up();
        Ok(())
    }

    fn tell(&mut self, queues: &mut Queues) {
        let size = lock(self.port.shared()).take_size();
        if let Some(TerminalSize { columns, rows }) = size {
            let ([a, b], [c, d]) = (columns.to_le_bytes(), rows.to_le_bytes());
            self.config = [a, b, c, d];
        }
        if self.sized && (size.is_some() || !self.told) {
            self.told = true;
            queues.config_changed();
        }
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> DeviceId {
        DeviceId::Console
    }

    fn features(&self) -> u64 {
        feature(F_SIZE)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn hears_config_reads(&self) -> bool {
        true
    }

    fn config_read(&mut self) {
        if self.told {
            self.port.set_open(true);
        }
    }

    fn activate(&mut self, acked: u64, _: &Arc<GuestMemory>) -> Result<(), NeedsReset> {
        self.sized = acked & feature(F_SIZE) != 0;
        if !self.sized {
            self.port.set_open(true);
        }
        Ok(())
    }

    fn process_queue(&mut self, queue: usize, queues: &mut Queues) -> Result<(), NeedsReset> {
        self.tell(queues);
        match queue {
            RECEIVE => self.receive(queues),
            _ => self.port.transmit(TRANSMIT, queues),
        }
    }

    fn sources(&self) -> Vec<(Token, RawFd)> {
        vec![(0, self.wake.as_raw_fd())]
    }

    fn handle_event(&mut self, _: Token, queues: &mut Queues) -> Result<(), NeedsReset> {
        let _ = self.wake.read();
        self.tell(queues);
        self.receive(queues)?;
        self.port.transmit(TRANSMIT, queues)
    }

    fn quiesce(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        self.port.put_back(TRANSMIT, queues);
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::Console(ConsoleState {
            size: self.config,
            notified: self.told,
            port: self.port.save(),
        }))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Console(ConsoleState {
            size,
            notified,
            port,
        }) = state
        else {
            return Err(RestoreError::Kind(DeviceId::Console));
        };
        self.config = size;
        self.told = notified;
        self.port.restore(port)
    }

    fn reset(&mut self) {
        self.port.reset();
        self.sized = false;
        self.told = false;
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("output_bytes", self.port.output_bytes),
            ("input_bytes", self.port.input_bytes),
        ]
    }
}

#[cfg(test)]
#[path = "terminal_tests.rs"]
mod tests;
