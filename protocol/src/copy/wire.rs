//! Entries over a connection: a [`Piece::Entry`] each, a file's data and holes behind it,
//! an empty frame of data at the end of them, and [`Piece::End`] at the end of all.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use super::entry::{Data, Entry, Kind, Sink, Source};
use super::xattrs;
use crate::agent::{DATA_MAX, Frame, Frames, Stream, send, send_data};

/// How many bytes of the window an entry counts for, without its attributes, or a hole.
pub const ENTRY_WEIGHT: usize = 1024;

/// A message of a copy in progress.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Piece {
    /// The next entry.
    Entry(Entry),
    /// The length of a hole in a file: zeroes that are not there as data.
    Hole(u64),
    /// There are no more.
    End,
    /// There is more, but it cannot be read: one line.
    Failed(String),
}

/// Sends entries. `before` is called for each frame, with its weight.
pub struct Outgoing<W, F> {
    to: W,
    stream: Stream,
    before: F,
    holes: bool,
    buffer: Vec<u8>,
}

/// How much of the window an entry counts for.
fn weight(entry: &Entry) -> usize {
    ENTRY_WEIGHT + xattrs::len(&entry.xattrs)
}

impl<W: Write, F: FnMut(usize) -> io::Result<()>> Outgoing<W, F> {
    /// Over a connection, with data of a stream.
    pub fn new(to: W, stream: Stream, before: F) -> Self {
        Outgoing {
            to,
            stream,
            before,
            holes: true,
            buffer: vec![0; DATA_MAX],
        }
    }

    /// Sends holes as zeroes: to a receiver that does not know them, or that would write
    /// more for one message than it has room for.
    pub fn without_holes(self) -> Self {
        Outgoing {
            holes: false,
            ..self
        }
    }
}

impl<W: Write, F: FnMut(usize) -> io::Result<()>> Sink for Outgoing<W, F> {
    fn put(&mut self, entry: &Entry, data: &mut dyn Data) -> io::Result<()> {
        (self.before)(weight(entry))?;
        send(&mut self.to, &Piece::Entry(entry.clone()))?;
        let Kind::File(mut left) = entry.kind else {
            return Ok(());
        };
        loop {
            let hole = match self.holes {
                true => data.skip_hole()?.min(left),
                false => 0,
            };
            if hole > 0 {
                left -= hole;
                (self.before)(ENTRY_WEIGHT)?;
                send(&mut self.to, &Piece::Hole(hole))?;
                continue;
            }
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(DATA_MAX);
            let buffer = self.buffer.get_mut(..most).unwrap_or_default();
            let len = match data.read(buffer) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            left -= len as u64;
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

/// Takes entries from a party that may be hostile. `taken` is called with the
/// weight of each frame.
pub struct Incoming<'a, R, F> {
    frames: &'a mut Frames<R>,
    stream: Stream,
    taken: F,
    /// How many bytes the current file may still have, until its end.
    left: Option<u64>,
    buffer: Vec<u8>,
    at: usize,
    /// How many zeroes come behind the buffer.
    hole: u64,
    holes: bool,
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
            hole: 0,
            holes: true,
        }
    }

    /// No word of a party may stand for more than it sends.
    pub fn without_holes(self) -> Self {
        Incoming {
            holes: false,
            ..self
        }
    }

    /// Waits for the next data of the current file; false at their end.
    fn fill(&mut self) -> io::Result<bool> {
        let Some(left) = self.left else {
            return Ok(false);
        };
        self.buffer.clear();
        self.at = 0;
        self.hole = 0;
        let longer = || broken("a file is longer than it was said to be");
        match self.frames.frame()? {
            Some(Frame::Data(stream, data)) if stream == self.stream => {
                let less = left.checked_sub(data.len() as u64).ok_or_else(longer)?;
                self.buffer.extend_from_slice(data);
                self.left = (!data.is_empty()).then_some(less);
            }
            Some(Frame::Message(Piece::Hole(hole))) if self.holes && hole > 0 => {
                self.left = Some(left.checked_sub(hole).ok_or_else(longer)?);
                self.hole = hole;
                (self.taken)(ENTRY_WEIGHT)?;
                return Ok(true);
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
        self.at = 0;
        let piece = self.frames.message()?;
        match piece {
            Piece::Entry(entry) => {
                let entry = entry.checked()?;
                if let Kind::File(size) = entry.kind {
                    self.left = Some(size);
                }
                (self.taken)(weight(&entry))?;
                Ok(Some(entry))
            }
            Piece::Hole(_) => Err(broken("a hole in no file")),
            Piece::End => Ok(None),
            Piece::Failed(reason) => Err(io::Error::other(reason)),
        }
    }
}

impl<R: Read, F: FnMut(usize) -> io::Result<()>> Incoming<'_, R, F> {
    /// Sees to it that there is something to read; false at the end.
    fn ready(&mut self) -> io::Result<bool> {
        Ok(self.at < self.buffer.len() || self.hole > 0 || self.fill()?)
    }
}

impl<R: Read, F: FnMut(usize) -> io::Result<()>> Read for Incoming<'_, R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.ready()? {
            return Ok(0);
        }
        let mut rest = self.buffer.get(self.at..).unwrap_or_default();
        if rest.is_empty() {
            let len = io::repeat(0).take(self.hole).read(buffer)?;
            self.hole -= len as u64;
            return Ok(len);
        }
        let len = rest.read(buffer)?;
        self.at += len;
        Ok(len)
    }
}

impl<R: Read, F: FnMut(usize) -> io::Result<()>> Data for Incoming<'_, R, F> {
    fn skip_hole(&mut self) -> io::Result<u64> {
        let waits = self.ready()? && self.at == self.buffer.len();
        Ok(if waits {
            std::mem::take(&mut self.hole)
        } else {
            0
        })
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
