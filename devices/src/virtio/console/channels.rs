//! Named ports, `/dev/virtio-ports/NAME` in Linux.
//!
//! Port 0 stays unused: a driver that knows one port only takes it for a
//! terminal. What the guest is to be told is kept as bits for each port, so
//! that it cannot pile up.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use bitflags::bitflags;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::features::{F_MULTIPORT, QUEUE_SIZE};
use super::port::{DevicePort, Port};
use crate::bus::lock;
use crate::number;
use crate::virtio::device::{DeviceId, NeedsReset, Token, VirtioDevice};
use crate::virtio::queues::Queues;
use crate::virtio::state::{ChannelState, DeviceState, RestoreError, SaveError};
use crate::virtio::{GuestMemory, feature};

/// The most channels of a device.
pub const CHANNELS_MAX: usize = 15;

// Queues (virtio 1.2, 5.3.2): port 0 has the first two, and the others come
// behind those for control.
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
const CHANNELS_START: usize = 4;
/// The port of the first channel.
const FIRST_PORT: u32 = 1;

/// `struct virtio_console_control` (5.3.6.2): port, event, value.
const MESSAGE: usize = 8;
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

bitflags! {
    /// What the guest is to be told of a port, in this order.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    struct News: u8 {
        const ADD = 1 << 0;
        const NAME = 1 << 1;
        const CLOSE = 1 << 2;
        const OPEN = 1 << 3;
    }
}

/// What the guest can see of a channel, beside its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    news: u8,
    /// The driver has made the port.
    ready: bool,
    /// When it was told all news, the host's side is there.
    connected: bool,
}

impl Progress {
    fn news(&self) -> News {
        News::from_bits_truncate(self.news)
    }

    fn set(&mut self, news: News, on: bool) {
        let mut all = self.news();
        all.set(news, on);
        self.news = all.bits();
    }
}

struct Channel {
    name: String,
    state: Progress,
    port: DevicePort,
}

impl Channel {
    /// Learns what happened on the host's side.
    fn look(&mut self) {
        let mut port = lock(self.port.shared());
        let state = &mut self.state;
        if port.take_hang_up() && state.connected {
            state.connected = false;
            if state.news().contains(News::OPEN) {
                state.set(News::OPEN, false); // it never knew
            } else {
                state.set(News::CLOSE, true);
            }
        }
        if state.ready && port.is_connected() && !state.connected {
            state.connected = true;
            state.set(News::OPEN, true);
        }
    }

    fn message(&self, id: u32, news: News) -> Vec<u8> {
        let (event, value, name) = match news {
            News::ADD => (PORT_ADD, 1, ""),
            News::NAME => (PORT_NAME, 1, self.name.as_str()),
            News::CLOSE => (PORT_OPEN, 0, ""),
            _ => (PORT_OPEN, 1, ""),
        };
        let mut message = Vec::with_capacity(MESSAGE + name.len());
        message.extend(id.to_le_bytes());
        message.extend(u16::to_le_bytes(event));
        message.extend(u16::to_le_bytes(value));
        message.extend(name.bytes());
        message
    }
}

/// The device.
pub struct Channels {
    /// Channel N is port N + 1.
    channels: Vec<Channel>,
    queue_sizes: Vec<u16>,
    /// Columns and rows, not valid; the number of ports (virtio 1.2, 5.3.4).
    config: [u8; 8],
    wake: EventFd,
}

/// The role of a queue (virtio 1.2, 5.3.2).
enum Role {
    Unused,
    ControlReceive,
    ControlTransmit,
    Receive(usize),
    Transmit(usize),
}

fn role(queue: usize) -> Role {
    match (queue.checked_sub(CHANNELS_START), queue) {
        (Some(rest), _) if rest & 1 == 0 => Role::Receive(rest / 2),
        (Some(rest), _) => Role::Transmit(rest / 2),
        (None, CONTROL_RECEIVE) => Role::ControlReceive,
        (None, CONTROL_TRANSMIT) => Role::ControlTransmit,
        (None, _) => Role::Unused,
    }
}

fn receive_queue(channel: usize) -> usize {
    CHANNELS_START + 2 * channel
}

impl Channels {
    /// Channels of the given names, at most [`CHANNELS_MAX`]. Each has an event
    /// descriptor that is signalled when there is output after there was none,
    /// or room for input after there was none.
    pub fn new(channels: Vec<(String, EventFd)>) -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let channels = channels
            .into_iter()
            .map(|(name, host_event)| {
                Ok(Channel {
                    name,
                    state: Progress::default(),
                    port: DevicePort::new(host_event, wake.try_clone()?),
                })
            })
            .collect::<io::Result<Vec<_>>>()?;
        let ports = number::length(channels.len()).saturating_add(FIRST_PORT);
        Ok(Channels {
            queue_sizes: vec![QUEUE_SIZE; receive_queue(channels.len())],
            channels,
            config: (u64::from(ports) << 32).to_le_bytes(),
            wake,
        })
    }

    /// The host's sides, in the channels' order.
    pub fn ports(&self) -> Vec<Arc<Mutex<Port>>> {
        let ports = self.channels.iter().map(|channel| channel.port.shared());
        ports.cloned().collect()
    }

    /// Takes the driver's messages.
    fn listen(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        while let Some(chain) = queues.pop(CONTROL_TRANSMIT)? {
            let mut message = [0; MESSAGE];
            if !chain.writable.is_empty() || chain.readable.read(&mut message) < MESSAGE {
                return Err(NeedsReset("a control message must be readable and whole"));
            }
            let [a, b, c, d, e, f, g, h] = message;
            self.heard(
                u32::from_le_bytes([a, b, c, d]),
                u16::from_le_bytes([e, f]),
                u16::from_le_bytes([g, h]),
            )?;
            queues.complete(CONTROL_TRANSMIT, chain.head, 0)?;
        }
        Ok(())
    }

    fn heard(&mut self, id: u32, event: u16, value: u16) -> Result<(), NeedsReset> {
        if event == DEVICE_READY {
            if value != 1 {
                log::warn!("the guest's driver of channels failed");
                return Ok(());
            }
            for channel in &mut self.channels {
                channel.state = Progress::default();
                channel.state.set(News::ADD, true);
            }
            return Ok(());
        }
        let channel = id
            .checked_sub(FIRST_PORT)
            .and_then(|index| self.channels.get_mut(index as usize))
            .ok_or(NeedsReset(
                "a control message names a port that is not there",
            ))?;
        match (event, value) {
            (PORT_READY, 1) => {
                channel.state = Progress {
                    ready: true,
                    ..Default::default()
                };
                channel.state.set(News::NAME, true);
            }
            (PORT_READY, _) => log::warn!("the guest failed to make port {}", channel.name),
            (PORT_OPEN, value) => channel.port.set_open(value != 0),
            // What later versions may say is no business of this one.
            _ => {}
        }
        Ok(())
    }

    /// Tells the driver the news, as far as it has room.
    fn tell(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        self.channels.iter_mut().for_each(Channel::look);
        // All ports are there before the first has a name.
        for kinds in [&[News::ADD][..], &[News::NAME, News::CLOSE, News::OPEN]] {
            for (id, channel) in (FIRST_PORT..).zip(&mut self.channels) {
                for &news in kinds {
                    if !channel.state.news().contains(news) {
                        continue;
                    }
                    let Some(chain) = queues.pop(CONTROL_RECEIVE)? else {
                        return Ok(());
                    };
                    let message = channel.message(id, news);
                    if !chain.readable.is_empty() || chain.writable.len() < message.len() {
                        return Err(NeedsReset(
                            "a control buffer must be writable and large enough",
                        ));
                    }
                    let len = chain.writable.write(&message);
                    queues.complete(CONTROL_RECEIVE, chain.head, len)?;
                    channel.state.set(news, false);
                }
            }
        }
        Ok(())
    }
}

impl VirtioDevice for Channels {
    fn id(&self) -> DeviceId {
        DeviceId::Console
    }

    fn features(&self) -> u64 {
        feature(F_MULTIPORT)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, acked: u64, _: &Arc<GuestMemory>) -> Result<(), NeedsReset> {
        match acked & feature(F_MULTIPORT) {
            0 => Err(NeedsReset("channels need VIRTIO_CONSOLE_F_MULTIPORT")),
            _ => Ok(()),
        }
    }

    fn process_queue(&mut self, queue: usize, queues: &mut Queues) -> Result<(), NeedsReset> {
        match role(queue) {
            Role::Receive(index) => {
                if let Some(channel) = self.channels.get_mut(index) {
                    channel.port.receive(queue, queues)?;
                }
                self.tell(queues) // of a hang-up that waited for this
            }
            Role::Transmit(index) => match self.channels.get_mut(index) {
                Some(channel) => channel.port.transmit(queue, queues),
                None => Ok(()),
            },
            Role::ControlTransmit => {
                self.listen(queues)?;
                self.tell(queues)
            }
            Role::ControlReceive => self.tell(queues),
            Role::Unused => Ok(()),
        }
    }

    fn sources(&self) -> Vec<(Token, RawFd)> {
        vec![(0, self.wake.as_raw_fd())]
    }

    fn handle_event(&mut self, _: Token, queues: &mut Queues) -> Result<(), NeedsReset> {
        let _ = self.wake.read();
        for (index, channel) in self.channels.iter_mut().enumerate() {
            let receive = receive_queue(index);
            channel.port.receive(receive, queues)?;
            channel.port.transmit(receive + 1, queues)?;
        }
        self.tell(queues)
    }

    fn quiesce(&mut self, queues: &mut Queues) -> Result<(), NeedsReset> {
        for (index, channel) in self.channels.iter_mut().enumerate() {
            channel.port.put_back(receive_queue(index) + 1, queues);
        }
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let channels = self.channels.iter().map(|channel| ChannelState {
            name: channel.name.clone(),
            news: channel.state.news,
            ready: channel.state.ready,
            connected: channel.state.connected,
            port: channel.port.save(),
        });
        Ok(DeviceState::Channels(channels.collect()))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Channels(states) = state else {
            return Err(RestoreError::Kind(DeviceId::Console));
        };
        let names = self.channels.iter().map(|channel| &channel.name);
        if !names.eq(states.iter().map(|state| &state.name)) {
            return Err(RestoreError::Mismatch("its channels have other names"));
        }
        for (channel, state) in self.channels.iter_mut().zip(states) {
            channel.state = Progress {
                news: News::from_bits_truncate(state.news).bits(),
                ready: state.ready,
                connected: state.connected,
            };
            channel.port.restore(state.port)?;
            // Whoever was connected is not any more; somebody else may be.
            if channel.state.connected && !lock(channel.port.shared()).is_connected() {
                channel.state.connected = false;
                match channel.state.news().contains(News::OPEN) {
                    true => channel.state.set(News::OPEN, false), // the guest never knew
                    false => channel.state.set(News::CLOSE, true),
                }
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        for channel in &mut self.channels {
            channel.state = Progress::default();
            channel.port.reset();
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let ports = || self.channels.iter().map(|channel| &channel.port);
        vec![
            ("output_bytes", ports().map(|port| port.output_bytes).sum()),
            ("input_bytes", ports().map(|port| port.input_bytes).sum()),
        ]
    }
}

#[cfg(test)]
#[path = "channels_tests.rs"]
mod tests;
