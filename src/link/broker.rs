//! What the VMM process can have done outside: this and nothing else.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::socket::Link;

/// What the VMM process asks its supervisor for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BrokerRequest {
    /// Connect to the host's socket of a port of vsock.
    Connect(u32),
    /// End the helper of a device.
    EndHelper(String),
}

/// What came of it: with [`BrokerRequest::Connect`], a descriptor comes along.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BrokerReply {
    /// It is done.
    Done,
    /// It is not, for this error of Linux.
    Failed(i32),
}

/// Asks the supervisor, one request at a time.
#[derive(Debug)]
pub struct Broker(Mutex<Link>);

impl Broker {
    /// Over a link of its own.
    pub fn new(link: Link) -> Self {
        Broker(Mutex::new(link))
    }

    fn link(&self) -> MutexGuard<'_, Link> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects the guest to a port of the host's.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let link = self.link();
        link.send(&BrokerRequest::Connect(port), &[])?;
        match link.receive_with_files()? {
            (BrokerReply::Done, files) => match files.into_iter().next() {
                Some(file) => Ok(file.into()),
                None => Err(ErrorKind::InvalidData.into()),
            },
            (BrokerReply::Failed(error), _) => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Ends a device's helper, and waits until it has ended.
    pub fn end_helper(&self, device: &str) {
        let link = self.link();
        let request = BrokerRequest::EndHelper(device.to_owned());
        if link.send(&request, &[]).is_ok() {
            let _ = link.receive::<BrokerReply>();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn replies_bring_a_socket_or_an_error() {
        let (ours, theirs) = Link::pair().unwrap();
        let supervisor = std::thread::spawn(move || {
            let (stream, mut far) = UnixStream::pair().unwrap();
            far.write_all(b"hello").unwrap();
            let request = theirs.receive::<BrokerRequest>().unwrap().unwrap();
            assert_eq!(request, BrokerRequest::Connect(80));
            theirs.send(&BrokerReply::Done, &[stream.into()]).unwrap();
            theirs.receive::<BrokerRequest>().unwrap().unwrap();
            let refused = BrokerReply::Failed(libc::ECONNREFUSED);
            theirs.send(&refused, &[]).unwrap();
        });
        let broker = Broker::new(ours);
        let mut text = [0; 5];
        broker.connect(80).unwrap().read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
        let refused = broker.connect(81).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        supervisor.join().unwrap();
    }
}
