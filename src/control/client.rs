//! The other side of the socket.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::protocol::{Command, Event, Reply};

/// Why a VM could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no such VM runs; see mayfly list")]
    NotRunning,
    /// The connection failed.
    #[error("talking to it")]
    Io(#[from] io::Error),
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

/// A connection to a VM.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to a VM's socket.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NotRunning,
            _ => ClientError::Io(error),
        })?;
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

    /// The next event, after [`Command::Events`]; none when the VM has ended.
    pub fn event(&mut self) -> Result<Option<Event>, ClientError> {
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
