//! Entries over a connection: a [`Piece::Entry`] each, a file's data behind it, an
//! empty frame of data at the end of them, and [`Piece::End`] at the end of all.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use super::{Entry, Kind, Sink, Source};
use crate::protocol::{DATA_MAX, Frame, Frames, Stream, send, send_data};

/// How many bytes of the window an entry counts for.
pub const ENTRY_WEIGHT: usize = 1024;

/// What is said of what is copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Piece {
    /// The next entry.
    Entry(Entry),
    /// There are no more.
    End,
    /// There is more, but it cannot be read: one line.
    Failed(String),
}

/// Sends entries. `before` is asked for each frame, and told its weight.
pub struct Outgoing<W, F> {
    to: W,
    stream: Stream,
    before: F,
    buffer: Vec<u8>,
}

impl<W: Write, F: FnMut(usize) -> io::Result<()>> Outgoing<W, F> {
    /// Over a connection, with data of a stream.
    pub fn new(to: W, stream: Stream, before: F) -> Self {
        Outgoing {
            to,
            stream,
            before,
            buffer: vec![0; DATA_MAX],
        }
    }
}

impl<W: Write, F: FnMut(usize) -> io::Result<()>> Sink for Outgoing<W, F> {
    fn put(&mut self, entry: &Entry, data: &mut dyn Read) -> io::Result<()> {
        (self.before)(ENTRY_WEIGHT)?;
        send(&mut self.to, &Piece::Entry(entry.clone()))?;
        let Kind::File(size) = entry.kind else {
            return Ok(());
        };
        let mut data = data.take(size);
        loop {
            let len = match data.read(&mut self.buffer) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            (self.before)(len)?;
            let data = self.buffer.get(..len).unwrap_or_default();
            send_data(&mut self.to, self.stream, data)?;
            if len == 0 {
                return Ok(());
            }
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        send(&mut self.to, &Piece::End)
    }
}

/// Takes entries from a party that may be hostile. `taken` is told the weight of
/// each frame.
pub struct Incoming<'a, R, F> {
    frames: &'a mut Frames<R>,
    stream: Stream,
    taken: F,
    /// How many bytes the current file may still have, until its end.
    left: Option<u64>,
    buffer: Vec<u8>,
    at: usize,
}

impl<'a, R: Read, F: FnMut(usize) -> io::Result<()>> Incoming<'a, R, F> {
    /// Over a connection, with data of a stream.
    pub fn new(frames: &'a mut Frames<R>, stream: Stream, taken: F) -> Self {
        Incoming {
            frames,
            stream,
            taken,
            left: None,
            buffer: Vec::new(),
            at: 0,
        }
    }

    /// Waits for the next data of the current file; false at their end.
    fn fill(&mut self) -> io::Result<bool> {
        let Some(left) = self.left else {
            return Ok(false);
        };
        self.buffer.clear();
        self.at = 0;
        match self.frames.frame()? {
            Some(Frame::Data(stream, data)) if stream == self.stream => {
                let Some(less) = left.checked_sub(data.len() as u64) else {
                    return Err(broken("a file is longer than it was said to be"));
                };
                self.buffer.extend_from_slice(data);
                self.left = (!data.is_empty()).then_some(less);
            }
            Some(Frame::Message(Piece::Failed(reason))) => return Err(io::Error::other(reason)),
            Some(_) => return Err(broken("no data where they belong")),
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        (self.taken)(self.buffer.len())?;
        Ok(self.left.is_some())
    }
}

impl<R: Read, F: FnMut(usize) -> io::Result<()>> Source for Incoming<'_, R, F> {
    fn next(&mut self) -> io::Result<Option<Entry>> {
        while self.fill()? {}
        self.buffer.clear();
        let piece = self.frames.message()?;
        match piece {
            Piece::Entry(entry) => {
                let entry = entry.checked()?;
                if let Kind::File(size) = entry.kind {
                    self.left = Some(size);
                }
                (self.taken)(ENTRY_WEIGHT)?;
                Ok(Some(entry))
            }
            Piece::End => Ok(None),
            Piece::Failed(reason) => Err(io::Error::other(reason)),
        }
    }
}

impl<R: Read, F: FnMut(usize) -> io::Result<()>> Read for Incoming<'_, R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.buffer.len() && !self.fill()? {
            return Ok(0);
        }
        let mut rest = self.buffer.get(self.at..).unwrap_or_default();
        let len = rest.read(buffer)?;
        self.at += len;
        Ok(len)
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
