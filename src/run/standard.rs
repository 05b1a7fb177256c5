//! The user's end of a session: the standard streams, the terminal, what is sent.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Sender};
use std::thread;

use mayfly_protocol::agent::{HostMessage, Size};

use super::agent::Link;
use crate::console::terminal;

/// A standard stream as a file of its own.
pub fn standard(stream: impl AsFd) -> io::Result<File> {
    stream.as_fd().try_clone_to_owned().map(File::from)
}

/// The size of the terminal that this has: where it is typed, else where it is shown.
pub fn terminal_size() -> Size {
    let input = standard(io::stdin()).ok();
    let output = standard(io::stdout()).ok();
    let size = [input, output].iter().flatten().find_map(terminal::size);
    match size {
        Some(size) => Size {
            rows: size.rows,
            columns: size.columns,
        },
        None => Size {
            rows: 24,
            columns: 80,
        },
    }
}

/// Sends on a thread of its own: a guest that does not listen holds up nobody else.
pub fn send_apart(link: Link) -> Sender<HostMessage> {
    let (sender, messages) = mpsc::channel();
    let send = move || {
        for message in messages {
            if link.send(&message).is_err() {
                return;
            }
        }
    };
    // Without a thread, nothing is sent.
    let _ = thread::Builder::new().name("sender".into()).spawn(send);
    sender
}
