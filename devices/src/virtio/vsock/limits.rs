//! How much connections hold, and how long they wait.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How much a connection holds of what the guest sent: the guest's credit …
pub(super) const BUFFER: usize = 128 << 10;
/// … unless all of them may hold this much already …
pub(super) const BUFFERS: usize = 16 << 20;
/// … and then.
pub(super) const BUFFER_MIN: usize = 4 << 10;
/// The most data in a packet to the guest.
pub(super) const PACKET_MAX: usize = 64 << 10;

/// Connects to what listens on a port, without blocking.
pub type Connector = Box<dyn FnMut(u32) -> io::Result<UnixStream> + Send>;

/// How much, and how long, at most.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once, with clients that have none yet.
    pub connections: usize,
    /// Resets that wait for the guest. When there are more, it must take some
    /// before it can send.
    pub resets: usize,
    /// How long a client may take to send its request.
    pub greeting: Duration,
    /// How long the guest may take to accept a connection.
    pub request: Duration,
    /// How long a connection that one side has ended waits for the other.
    pub linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 4096,
            resets: 256,
            greeting: Duration::from_secs(5),
            request: Duration::from_secs(10),
            linger: Duration::from_secs(30),
        }
    }
}
