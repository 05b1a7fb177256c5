//! A port: two bounded rings between the guest's queues and the host's side.
//!
//! When the ring of output is full, the device takes no more buffers: whoever
//! writes in the guest waits. (Linux' console waits with its CPU.)

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::lock;
use crate::char_device::{CharDevice, TerminalSize};
use crate::virtio::chain::Buffer;
use crate::virtio::device::NeedsReset;
use crate::virtio::queues::Queues;
use crate::virtio::state::{PortState, RestoreError};

/// How many bytes wait at most in each direction.
pub(super) const RING_MAX: usize = 64 << 10;
/// A device that was stopped goes on when the ring has emptied to this.
const RESUME_AT: usize = RING_MAX / 2;

/// A port as the host's side sees it.
pub struct Port {
    state: PortState,
    /// The device waits for room in the ring of output.
    stalled: bool,
    connected: bool,
    /// The host's side left, and the device does not know yet.
    hung_up: bool,
    size: Option<TerminalSize>,
    host_event: EventFd,
    wake: EventFd,
}

impl Port {
    fn full(&self) -> bool {
        self.state.output.len() >= RING_MAX
    }

    /// The size of the host's terminal, if it changed since the last call.
    pub(super) fn take_size(&mut self) -> Option<TerminalSize> {
        self.size.take()
    }

    /// Somebody is at the host's end.
    pub(super) fn is_connected(&self) -> bool {
        self.connected && !self.hung_up
    }

    /// True once for each time that the host's side left, when the guest was
    /// given all that came from it.
    pub(super) fn take_hang_up(&mut self) -> bool {
        let now = self.hung_up && self.state.input.is_empty();
        if now {
            self.hung_up = false;
            signal(&self.host_event);
        }
        now
    }
}

impl CharDevice for Port {
    fn output(&self) -> &[u8] {
        self.state.output.as_slices().0
    }

    fn output_done(&mut self, count: usize) {
        let count = count.min(self.state.output.len());
        self.state.output.drain(..count);
        if self.state.output.is_empty() {
            // A burst should not hold its memory for ever.
            self.state.output = VecDeque::new();
        }
        if self.stalled && self.state.output.len() <= RESUME_AT {
            self.stalled = false;
            signal(&self.wake);
        }
    }

    fn input_room(&self) -> usize {
        match self.state.open && !self.hung_up {
            true => RING_MAX.saturating_sub(self.state.input.len()),
            false => 0,
        }
    }

    fn input(&mut self, data: &[u8]) {
        let room = self.input_room();
        if room > 0 && !data.is_empty() {
            self.state.input.extend(data.iter().take(room));
            signal(&self.wake);
        }
    }

    fn connected(&mut self, connected: bool) {
        self.hung_up |= self.connected && !connected;
        self.connected = connected;
        signal(&self.wake);
    }

    fn resized(&mut self, size: TerminalSize) {
        self.size = Some(size);
        signal(&self.wake);
    }
}

/// A chain that the guest wants to send, and what of it has no room yet.
struct Held {
    head: u16,
    rest: Buffer,
    /// How many of its bytes have gone.
    taken: usize,
}

/// A port as its device sees it.
pub(super) struct DevicePort {
    port: Arc<Mutex<Port>>,
    held: Option<Held>,
    /// Bytes that went to the host …
    pub output_bytes: u64,
    /// … and to the guest.
    pub input_bytes: u64,
}

impl DevicePort {
    /// A port. `host_event` tells the host's side that there is output after
    /// there was none, or room for input after there was none; `wake` tells the
    /// device that the host's side did something.
    pub fn new(host_event: EventFd, wake: EventFd) -> Self {
        let port = Port {
            state: PortState::default(),
            stalled: false,
            connected: false,
            hung_up: false,
            size: None,
            host_event,
            wake,
        };
        DevicePort {
            port: Arc::new(Mutex::new(port)),
            held: None,
            output_bytes: 0,
            input_bytes: 0,
        }
    }

    /// The port as the host's side shares it.
    pub fn shared(&self) -> &Arc<Mutex<Port>> {
        &self.port
    }

    /// The guest begins to listen, or stops: what it has not taken is lost.
    pub fn set_open(&mut self, open: bool) {
        let mut port = lock(&self.port);
        if !open {
            port.state.input = VecDeque::new();
        }
        if open != port.state.open {
            port.state.open = open;
            signal(&port.host_event);
        }
    }

    /// Forgets the guest, but not what it has sent.
    pub fn reset(&mut self) {
        self.held = None;
        self.set_open(false);
        let mut port = lock(&self.port);
        port.stalled = false;
        port.state.taken = 0;
    }

    /// Leaves a chain of which a part has no room in the ring, and remembers which part.
    pub fn put_back(&mut self, queue: usize, queues: &mut Queues) {
        if let Some(held) = self.held.take() {
            queues.unpop(queue);
            lock(&self.port).state.taken = held.taken;
        }
    }

    /// The bytes that are on their way.
    pub fn save(&self) -> PortState {
        lock(&self.port).state.clone()
    }

    /// Takes over what was on its way.
    pub fn restore(&mut self, state: PortState) -> Result<(), RestoreError> {
        if state.input.len() > RING_MAX || state.output.len() > RING_MAX {
            return Err(RestoreError::Mismatch(
                "more bytes are on their way through a console than it holds",
            ));
        }
        let mut port = lock(&self.port);
        port.state = state;
        // The host's side looks for what is there.
        signal(&port.host_event);
        Ok(())
    }

    /// Takes what the guest sends, until there is no more, or no more room.
    pub fn transmit(&mut self, queue: usize, queues: &mut Queues) -> Result<(), NeedsReset> {
        let mut port = lock(&self.port);
        loop {
            if port.full() {
                port.stalled = true;
                return Ok(());
            }
            let held = match self.held.take() {
                Some(held) => held,
                None => match queues.pop(queue)? {
                    Some(chain) if !chain.writable.is_empty() => {
                        return Err(NeedsReset("what a port sends must only be readable"));
                    }
                    Some(chain) => {
                        let taken = std::mem::take(&mut port.state.taken);
                        Held {
                            head: chain.head,
                            rest: chain.readable.split_at(taken).1,
                            taken,
                        }
                    }
                    None => return Ok(()),
                },
            };
            let room = RING_MAX.saturating_sub(port.state.output.len());
            let (now, rest) = held.rest.split_at(room);
            let mut data = vec![0; now.len()];
            let len = now.read(&mut data);
            if port.state.output.is_empty() && len > 0 {
                signal(&port.host_event);
            }
            port.state.output.extend(data.iter().take(len));
            self.output_bytes += len as u64;
            if rest.is_empty() {
                queues.complete(queue, held.head, 0)?;
            } else {
                let taken = held.taken + now.len();
                self.held = Some(Held {
                    rest,
                    taken,
                    ..held
                });
            }
        }
    }

    /// Gives the guest what there is for it, as far as it has room.
    pub fn receive(&mut self, queue: usize, queues: &mut Queues) -> Result<(), NeedsReset> {
        let mut port = lock(&self.port);
        while !port.state.input.is_empty() {
            let Some(chain) = queues.pop(queue)? else {
                return Ok(());
            };
            if !chain.readable.is_empty() || chain.writable.is_empty() {
                return Err(NeedsReset(
                    "what a port receives into must only be writable",
                ));
            }
            let was_full = port.input_room() == 0;
            let len = chain.writable.write(port.state.input.make_contiguous());
            port.state.input.drain(..len);
            self.input_bytes += len as u64;
            queues.complete(queue, chain.head, len)?;
            if was_full && port.input_room() > 0 {
                signal(&port.host_event);
            }
        }
        port.state.input = VecDeque::new();
        Ok(())
    }
}

/// An event descriptor only refuses when its counter is full: then it is
/// signalled already.
fn signal(event: &EventFd) {
    let _ = event.write(1);
}
