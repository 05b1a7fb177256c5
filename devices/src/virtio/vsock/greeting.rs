//! What a client of the host says first: `CONNECT PORT`, and a newline.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{RecvFlags, recv};

/// `CONNECT 4294967295`, and a newline, with some room.
const LINE_MAX: usize = 32;
const COMMAND: &str = "CONNECT ";

/// A client that has not sent its request yet.
pub struct Greeting {
    stream: UnixStream,
    /// When the client is disconnected without a request.
    pub deadline: Instant,
}

/// The part of a request that a client has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The port it wants.
    Connect(u32),
    /// Not all, so far.
    More,
    /// Nothing that makes sense.
    Nonsense,
}

impl Greeting {
    /// A client that has to speak up before a deadline.
    pub fn new(stream: UnixStream, deadline: Instant) -> Self {
        Greeting { stream, deadline }
    }

    /// Takes the line once it is whole. What is behind it is left alone: it is
    /// for the guest.
    pub fn listen(&self) -> Heard {
        let mut line = [0; LINE_MAX];
        let len = match self.peek(&mut line) {
            Ok(0) => return Heard::Nonsense,
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Heard::More,
            Err(_) => return Heard::Nonsense,
        };
        let said = line.get(..len).unwrap_or_default();
        let Some(end) = said.iter().position(|&byte| byte == b'\n') else {
            return match len {
                LINE_MAX => Heard::Nonsense,
                _ => Heard::More,
            };
        };
        let Some(port) = said.get(..end).and_then(parse) else {
            return Heard::Nonsense;
        };
        let whole = line.get_mut(..end + 1).unwrap_or_default();
        match (&self.stream).read_exact(whole) {
            Ok(()) => Heard::Connect(port),
            Err(_) => Heard::Nonsense,
        }
    }

    fn peek(&self, line: &mut [u8]) -> io::Result<usize> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        Ok(recv(&self.stream, line, flags)?.0)
    }

    /// The stream behind the line.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(line).ok()?.strip_prefix(COMMAND)?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_line_is_taken_whole_and_nothing_behind_it() {
        let (mut client, ours) = UnixStream::pair().unwrap();
        let greeting = Greeting::new(ours, Instant::now());
        for part in ["CONN", "ECT 4294967295"] {
            client.write_all(part.as_bytes()).unwrap();
            assert_eq!(greeting.listen(), Heard::More);
        }
        client.write_all(b"\nhello").unwrap();
        assert_eq!(greeting.listen(), Heard::Connect(u32::MAX));
        let mut rest = [0; 5];
        greeting.into_stream().read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn nonsense_is_known_at_the_latest_when_it_is_long() {
        for line in [
            "\n",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT 4294967296\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 1 \n",
            "CONNECT 0x1\n",
            "connect 1\n",
            "GET / HTTP/1.1\r\n",
            &"x".repeat(LINE_MAX),
        ] {
            let (mut client, ours) = UnixStream::pair().unwrap();
            client.write_all(line.as_bytes()).unwrap();
            let greeting = Greeting::new(ours, Instant::now());
            assert_eq!(greeting.listen(), Heard::Nonsense, "{line:?}");
        }
        let (client, ours) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(
            Greeting::new(ours, Instant::now()).listen(),
            Heard::Nonsense
        );
    }
}
