//! The console and the channels that came with a module.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";
/// virtio 1.2, 5.3: consoles, and the feature of those that have channels.
const CONSOLE_ID: &str = "0x0003";
const F_MULTIPORT: usize = 1;
const CHANNELS: &str = "/dev/virtio-ports";
/// How long the device may take to announce a port and its name to the kernel.
const PORT_TIMEOUT: Duration = Duration::from_secs(2);
const NAP: Duration = Duration::from_millis(1);

/// Opens the console anew, for this and all that it starts: when the kernel
/// opened it, it was another one, or none.
pub fn adopt_console() {
    let deadline = Instant::now() + PORT_TIMEOUT;
    let console = loop {
        let console = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open("/dev/console");
        match console {
            Ok(console) => break console,
            // One of several ports is there only once the device has told of it.
            Err(_) if awaited() && Instant::now() < deadline => thread::sleep(NAP),
            Err(_) => return,
        }
    };
    let _ = dup2_stdin(&console);
    let _ = dup2_stdout(&console);
    let _ = dup2_stderr(&console);
}

/// The console is to be a virtio device's.
fn awaited() -> bool {
    let cmdline = text(Path::new("/proc/cmdline"));
    cmdline
        .split_whitespace()
        .any(|word| word.starts_with("console=hvc"))
}

/// Makes `/dev/virtio-ports/NAME` for each channel, as udev does.
pub fn link_channels() {
    let devices: Vec<PathBuf> = entries(Path::new(VIRTIO_DEVICES))
        .filter(|device| {
            let features = text(&device.join("features"));
            text(&device.join("device")) == CONSOLE_ID
                && features.as_bytes().get(F_MULTIPORT) == Some(&b'1')
        })
        .collect();
    let deadline = Instant::now() + PORT_TIMEOUT;
    for device in devices {
        // All ports are there before the first has a name.
        let ports = loop {
            let ports: Vec<_> = entries(&device.join("virtio-ports"))
                .map(|port| (text(&port.join("name")), port))
                .collect();
            let settled = !ports.is_empty() && ports.iter().all(|(name, _)| !name.is_empty());
            if settled || Instant::now() > deadline {
                break ports;
            }
            thread::sleep(NAP);
        };
        let _ = fs::create_dir_all(CHANNELS);
        for (name, port) in ports {
            if let (Some(node), false) = (port.file_name(), name.is_empty() || name.contains('/')) {
                let link = Path::new(CHANNELS).join(name);
                let _ = std::os::unix::fs::symlink(Path::new("/dev").join(node), link);
            }
        }
    }
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

fn text(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim_end().to_owned()
}
