//! The console and the channels.

use std::sync::{Arc, Mutex};

use mayfly_devices::serial::Serial;
use mayfly_devices::virtio::console::{Channels, Console};
use vmm_sys_util::eventfd::EventFd;

use super::pending::PendingDevice;
use crate::console::Connection;
use crate::link::{BlamePart, Part, VmmFailure};
use crate::vmm::events::{duplicate, event};

/// The names of the devices.
const CONSOLE: &str = "console";
const CHANNELS: &str = "channels";

/// The console on the serial port, which signals when the host's side is to look.
pub fn on_serial((serial, host_event): (Arc<Mutex<Serial>>, EventFd)) -> Connection {
    Connection {
        name: "console".to_owned(),
        lines: vec![serial],
        host_event,
    }
}

/// A device of its own for the console: the serial port has the guest's first words.
pub fn make(console: &mut Connection) -> Result<PendingDevice, VmmFailure> {
    let device =
        Console::new(duplicate(&console.host_event)?).or_host_of(Part::Device(CONSOLE.into()))?;
    console.lines.push(device.port());
    Ok(PendingDevice::new(device))
}

/// All channels are ports of one device.
pub fn make_channels(names: &[String]) -> Result<(PendingDevice, Vec<Connection>), VmmFailure> {
    let (mut ports, mut connections) = (Vec::new(), Vec::new());
    for name in names {
        let host_event = event()?;
        ports.push((name.clone(), duplicate(&host_event)?));
        connections.push(Connection {
            name: format!("channel {name}"),
            lines: Vec::new(),
            host_event,
        });
    }
    let device = Channels::new(ports).or_host_of(Part::Device(CHANNELS.into()))?;
    for (connection, port) in connections.iter_mut().zip(device.ports()) {
        connection.lines.push(port);
    }
    Ok((PendingDevice::new(device), connections))
}
