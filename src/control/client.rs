//! The other side of the socket.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::protocol::{Command, Event, Reply};
use crate::unix_socket;

/// Why a VM could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no such VM runs; see mayfly list")]
    NotRunning,
    /// It is there, and says nothing.
    #[error("it does not answer; its process is stopped (SIGSTOP), or stuck")]
    Silent,
    /// The connection failed.
    #[error("talking to it")]
    Io(#[source] io::Error),
    /// The answer is none.
    #[error("its answer is not understood")]
    Answer(#[from] serde_json::Error),
    /// It ended before it answered.
    #[error("it has ended")]
    Ended,
    /// It said no.
    #[error("{0}")]
    Refused(String),
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NotRunning,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Silent,
            _ => ClientError::Io(error),
        }
    }
}

/// A connection to a VM.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to a VM's socket. An answer may take as long as the timeout.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        // As many wait as can if this would block.
        let stream = unix_socket::connect(path)?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let stream = BufReader::new(stream);
        Ok(Client { stream })
    }

    /// Asks, and waits for the answer.
    pub fn ask(&mut self, command: &Command) -> Result<serde_json::Value, ClientError> {
        let mut line = serde_json::to_string(command)?;
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes())?;
        match self.line()? {
            None => Err(ClientError::Ended),
            Some(line) => match serde_json::from_str(&line)? {
                Reply::Ok(value) => Ok(value),
                Reply::Error(reason) => Err(ClientError::Refused(reason)),
            },
        }
    }

    /// The next event, after [`Command::Events`], however long it takes; none
    /// when the VM has ended.
    pub fn event(&mut self) -> Result<Option<Event>, ClientError> {
        self.stream.get_ref().set_read_timeout(None)?;
        let line = self.line()?;
        Ok(line.as_deref().map(serde_json::from_str).transpose()?)
    }

    fn line(&mut self) -> io::Result<Option<String>> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some(line)),
            // It was ended with the answer unread, or before it.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    #[test]
    fn an_answer_has_its_time_and_an_event_has_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let connect = || Client::connect(&path, Duration::from_millis(20));
        assert!(matches!(connect(), Err(ClientError::NotRunning)));
        let listener = UnixListener::bind(&path).unwrap();
        let mut client = connect().unwrap();
        let silent = client.ask(&Command::Info {});
        assert!(matches!(silent, Err(ClientError::Silent)), "{silent:?}");

        let mut client = connect().unwrap();
        let (_, mut server) = (listener.accept(), listener.accept().unwrap().0);
        server.write_all(b"{\"ok\":null}\n").unwrap();
        client.ask(&Command::Events {}).unwrap();
        let event = Event::now("late", None);
        let line = serde_json::to_string(&event).unwrap() + "\n";
        thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(100));
                server.write_all(line.as_bytes()).unwrap();
            });
            assert_eq!(client.event().unwrap(), Some(event));
        });
        assert_eq!(client.event().unwrap(), None);
        drop(listener);
        assert!(matches!(connect(), Err(ClientError::NotRunning)));
    }
}
