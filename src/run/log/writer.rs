//! Writes the log.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::piece::{CONTINUES, HEADER, PIECE_MAX, earlier};
use crate::timing::now_ms;

/// How much is kept where the user says nothing.
pub const SIZE: u64 = 64 << 20;

/// Is told what keeps a log from being kept.
type OnFailure = Box<dyn Fn(&str) + Send>;

/// A log that is written.
#[derive(Clone)]
pub struct Log(Arc<Mutex<Writer>>);

struct Writer {
    path: PathBuf,
    /// None if it could not be made anew.
    file: Option<File>,
    /// How long the file is.
    len: u64,
    /// How long it may become: half of what is kept.
    len_max: u64,
    /// How many bytes were written, whether or not they are kept.
    position: u64,
    /// Whether a stream is in the middle of a line.
    inside: [bool; 2],
    failed: bool,
    on_failure: Option<OnFailure>,
}

impl Log {
    /// A new log, of which the last bytes are kept: at most `size`, and at least half of
    /// that.
    pub fn create(path: &Path, size: u64) -> io::Result<Self> {
        Ok(Log(Arc::new(Mutex::new(Writer {
            path: path.to_owned(),
            file: Some(create(path)?),
            len: 0,
            len_max: size / 2,
            position: 0,
            inside: [false; 2],
            failed: false,
            on_failure: None,
        }))))
    }

    /// Calls a function, once, if the log cannot be written.
    pub fn on_failure(&self, tell: impl Fn(&str) + Send + 'static) {
        self.writer().on_failure = Some(Box::new(tell));
    }

    /// A log's sink for a stream, which passes everything on.
    pub fn tee(&self, stream: u8, target: Box<dyn Write + Send>) -> Box<dyn Write + Send> {
        Box::new(Tee {
            log: self.clone(),
            stream,
            target,
        })
    }

    fn writer(&self) -> std::sync::MutexGuard<'_, Writer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what a stream had. If that fails, what it is about goes on, and whoever
    /// reads the log finds that something is missing.
    fn write(&self, stream: u8, data: &[u8]) {
        let mut writer = self.writer();
        for piece in data.chunks(PIECE_MAX) {
            if let Err(error) = writer.write(stream, piece)
                && !std::mem::replace(&mut writer.failed, true)
            {
                let problem = format!("log: {error}; output is missing in it");
                match &writer.on_failure {
                    Some(tell) => tell(&problem),
                    None => ::log::warn!("{problem}"),
                }
            }
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path)
}

impl Writer {
    fn write(&mut self, stream: u8, data: &[u8]) -> io::Result<()> {
        let [out, err] = &mut self.inside;
        let inside = if stream == 2 { err } else { out };
        let continues = if *inside { CONTINUES } else { 0 };
        *inside = !data.ends_with(b"\n");
        let len = u32::try_from(data.len()).map_err(io::Error::other)?;
        let mut piece = Vec::with_capacity(HEADER + data.len());
        piece.push(stream | continues);
        piece.extend_from_slice(&now_ms().to_le_bytes());
        piece.extend_from_slice(&self.position.to_le_bytes());
        piece.extend_from_slice(&len.to_le_bytes());
        piece.extend_from_slice(data);
        self.position = self.position.saturating_add(len.into());
        self.append(&piece)
    }

    fn append(&mut self, piece: &[u8]) -> io::Result<()> {
        let piece_len = piece.len() as u64;
        if self.file.is_some() && self.len > 0 && self.len + piece_len > self.len_max {
            fs::rename(&self.path, earlier(&self.path))?;
            self.file = None;
        }
        if self.file.is_none() {
            self.len = 0;
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(create(&self.path)?),
        };
        if let Err(error) = file.write_all(piece) {
            // Half a piece would make nonsense of what follows.
            rustix::fs::ftruncate(&*file, self.len)?;
            io::Seek::seek(file, io::SeekFrom::Start(self.len))?;
            return Err(error);
        }
        self.len += piece_len;
        Ok(())
    }
}

struct Tee {
    log: Log,
    stream: u8,
    target: Box<dyn Write + Send>,
}

impl Write for Tee {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        // Kept, whatever comes of it there.
        self.log.write(self.stream, data);
        self.target.write_all(data)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.target.flush()
    }
}
