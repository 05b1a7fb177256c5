//! What a VM's main process wrote, kept with its streams apart, up to a size.
//!
//! A piece is a stream (1 or 2), eight bytes of milliseconds since 1970, four
//! of its length, and so many bytes; numbers are little-endian.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::record::now_ms;

/// At most twice as many bytes are kept: this file, and the one before it.
const SIZE_MAX: u64 = 8 << 20;
const HEADER: usize = 13;
/// No writer makes longer ones.
const PIECE_MAX: usize = 1 << 20;

/// A log that is written.
#[derive(Clone)]
pub struct Log(Arc<Mutex<Writer>>);

struct Writer {
    path: PathBuf,
    file: Option<File>,
    len: u64,
}

impl Log {
    /// A new log.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Log(Arc::new(Mutex::new(Writer {
            path: path.to_owned(),
            file: Some(create(path)?),
            len: 0,
        }))))
    }

    /// A log's sink for a stream, which passes everything on.
    pub fn tee(&self, stream: u8, target: Box<dyn Write + Send>) -> Box<dyn Write + Send> {
        Box::new(Tee {
            log: self.clone(),
            stream,
            target,
        })
    }

    /// A log that cannot be written ends; what it is about goes on.
    fn write(&self, stream: u8, data: &[u8]) {
        let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for piece in data.chunks(PIECE_MAX) {
            if let Err(error) = writer.write(stream, piece) {
                if writer.file.take().is_some() {
                    log::warn!("{}: {error}; no more is kept", writer.path.display());
                }
                return;
            }
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path)
}

/// The one before.
fn earlier(path: &Path) -> PathBuf {
    path.with_extension("1")
}

impl Writer {
    fn write(&mut self, stream: u8, data: &[u8]) -> io::Result<()> {
        if self.file.is_some() && self.len >= SIZE_MAX {
            fs::rename(&self.path, earlier(&self.path))?;
            self.file = Some(create(&self.path)?);
            self.len = 0;
        }
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let len = u32::try_from(data.len()).map_err(io::Error::other)?;
        let mut piece = Vec::with_capacity(HEADER + data.len());
        piece.push(stream);
        piece.extend_from_slice(&now_ms().to_le_bytes());
        piece.extend_from_slice(&len.to_le_bytes());
        piece.extend_from_slice(data);
        file.write_all(&piece)?;
        self.len += piece.len() as u64;
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

/// A piece of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// 1 for output, 2 for errors.
    pub stream: u8,
    /// When: milliseconds since 1970.
    pub time_ms: u64,
    /// What.
    pub data: Vec<u8>,
}

/// Reads a log, also one that is being written.
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    /// There is one before this, and this is it.
    earlier: bool,
    /// The beginning of a piece whose end is not there yet.
    begun: Vec<u8>,
}

impl Reader {
    /// From its beginning.
    pub fn open(path: &Path) -> io::Result<Self> {
        let (file, earlier) = match File::open(earlier(path)) {
            Ok(file) => (file, true),
            Err(_) => (File::open(path)?, false),
        };
        Ok(Reader {
            path: path.to_owned(),
            file: BufReader::new(file),
            earlier,
            begun: Vec::new(),
        })
    }

    /// The next piece; none if there is no more yet.
    pub fn piece(&mut self) -> io::Result<Option<Piece>> {
        loop {
            if self.fill(HEADER)? {
                let length = self.begun.get(9..HEADER).and_then(|it| it.try_into().ok());
                let len = u32::from_le_bytes(length.unwrap_or_default()) as usize;
                if len > PIECE_MAX {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                if self.fill(HEADER + len)? {
                    let all = std::mem::take(&mut self.begun);
                    let (header, data) = all.split_at(HEADER);
                    let time = header.get(1..9).and_then(|it| it.try_into().ok());
                    return Ok(Some(Piece {
                        stream: header.first().copied().unwrap_or(1),
                        time_ms: u64::from_le_bytes(time.unwrap_or_default()),
                        data: data.to_vec(),
                    }));
                }
            }
            // The file before ends when it got its name.
            if !std::mem::take(&mut self.earlier) {
                return Ok(None);
            }
            self.file = BufReader::new(File::open(&self.path)?);
            self.begun.clear();
        }
    }

    /// Reads until so much of a piece is there; false if it is not, yet.
    fn fill(&mut self, len: usize) -> io::Result<bool> {
        let missing = len.saturating_sub(self.begun.len()) as u64;
        (&mut self.file)
            .take(missing)
            .read_to_end(&mut self.begun)?;
        Ok(self.begun.len() >= len)
    }

    /// The next piece of a log that is being written, whose file may get another
    /// name meanwhile.
    pub fn follow(&mut self) -> io::Result<Option<Piece>> {
        loop {
            if let Some(piece) = self.piece()? {
                return Ok(Some(piece));
            }
            let (ours, theirs) = (self.file.get_ref().metadata()?, fs::metadata(&self.path)?);
            if ours.ino() == theirs.ino() {
                return Ok(None);
            }
            // Nobody writes to ours any more: now it is whole.
            if let Some(piece) = self.piece()? {
                return Ok(Some(piece));
            }
            self.file = BufReader::new(File::open(&self.path)?);
            self.begun.clear();
        }
    }
}

/// The last lines of a log.
pub struct Tail {
    max: usize,
    /// A line each; of the last one of a stream, what there is of it.
    lines: VecDeque<Piece>,
    /// How many lines came before them.
    dropped: usize,
    /// The numbers of lines without an end, of each stream.
    open: [Option<usize>; 2],
}

impl Tail {
    /// So many.
    pub fn new(max: usize) -> Self {
        Tail {
            max,
            lines: VecDeque::new(),
            dropped: 0,
            open: [None; 2],
        }
    }

    /// Adds what comes next.
    pub fn push(&mut self, piece: Piece) {
        let [out, err] = &mut self.open;
        let open = if piece.stream == 2 { err } else { out };
        for part in piece.data.split_inclusive(|&byte| byte == b'\n') {
            let begun = open.and_then(|number| number.checked_sub(self.dropped));
            match begun.and_then(|index| self.lines.get_mut(index)) {
                Some(line) => line.data.extend_from_slice(part),
                None => {
                    *open = Some(self.dropped + self.lines.len());
                    self.lines.push_back(Piece {
                        data: part.to_vec(),
                        ..piece
                    });
                }
            }
            if part.ends_with(b"\n") {
                *open = None;
            }
            if self.lines.len() > self.max {
                self.lines.pop_front();
                self.dropped += 1;
            }
        }
    }

    /// What there is.
    pub fn into_lines(self) -> impl Iterator<Item = Piece> {
        self.lines.into_iter()
    }
}

/// Puts before each line when it began.
#[derive(Default)]
pub struct Stamps {
    /// In the middle of a line, of each stream.
    inside: [bool; 2],
}

impl Stamps {
    /// A piece with its times.
    pub fn put(&mut self, piece: &Piece) -> Vec<u8> {
        let [out, err] = &mut self.inside;
        let inside = if piece.stream == 2 { err } else { out };
        let mut text = Vec::with_capacity(piece.data.len());
        for part in piece.data.split_inclusive(|&byte| byte == b'\n') {
            if !*inside {
                text.extend_from_slice(date(piece.time_ms).as_bytes());
                text.push(b' ');
            }
            text.extend_from_slice(part);
            *inside = !part.ends_with(b"\n");
        }
        text
    }
}

/// A time as RFC 3339 has it.
pub(crate) fn date(time_ms: u64) -> String {
    let (seconds, ms) = (time_ms / 1000, time_ms % 1000);
    let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
    // The calendar is the same every 400 years.
    const PERIOD: u64 = 146_097;
    let mut year = 1970 + 400 * (days / PERIOD);
    days %= PERIOD;
    let every = |year: u64, count| year.is_multiple_of(count);
    let leap = |year| every(year, 4) && (!every(year, 100) || every(year, 400));
    let len = |year| 365 + u64::from(leap(year));
    while days >= len(year) {
        days -= len(year);
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for len in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < len {
            break;
        }
        days -= len;
        month += 1;
    }
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    let day = days + 1;
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(stream: u8, data: &str) -> Piece {
        Piece {
            stream,
            time_ms: 1000,
            data: data.into(),
        }
    }

    #[test]
    fn the_last_lines_are_whole() {
        let tail = |max| {
            let mut tail = Tail::new(max);
            for (stream, data) in [(1, "a\nb"), (2, "x\ny"), (1, "c\nd\n"), (2, "z")] {
                tail.push(piece(stream, data));
            }
            let lines = tail.into_lines();
            let lines = lines.map(|it| (it.stream, String::from_utf8(it.data).unwrap()));
            lines.collect::<Vec<_>>()
        };
        let all = [(1, "a\n"), (1, "bc\n"), (2, "x\n"), (2, "yz"), (1, "d\n")];
        let all = all.map(|(stream, data)| (stream, data.to_owned()));
        for max in 3..7 {
            assert_eq!(tail(max), all[5_usize.saturating_sub(max)..], "{max}");
        }
        assert_eq!(tail(0), []);
    }

    #[test]
    fn lines_have_the_times_of_their_beginnings() {
        let mut stamps = Stamps::default();
        let mut put = |stream, data| String::from_utf8(stamps.put(&piece(stream, data))).unwrap();
        let time = "1970-01-01T00:00:01.000Z";
        assert_eq!(put(1, "a\nb"), format!("{time} a\n{time} b"));
        assert_eq!(put(2, "x"), format!("{time} x"));
        assert_eq!(put(1, "c\n\n"), format!("c\n{time} \n"));
        for (time_ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (1_798_761_599_000, "2026-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(date(time_ms), text);
        }
        // A log may say anything.
        date(u64::MAX);
    }

    fn all(reader: &mut Reader) -> Vec<(u8, Vec<u8>)> {
        let pieces = std::iter::from_fn(|| reader.piece().unwrap());
        pieces.map(|piece| (piece.stream, piece.data)).collect()
    }

    #[test]
    fn streams_are_kept_apart_and_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let log = Log::create(&path).unwrap();
        let mut out = log.tee(1, Box::new(io::sink()));
        let mut err = log.tee(2, Box::new(io::sink()));
        out.write_all(b"a\n").unwrap();
        err.write_all(b"").unwrap();
        err.write_all(b"b").unwrap();
        let mut reader = Reader::open(&path).unwrap();
        assert_eq!(all(&mut reader), [(1, b"a\n".to_vec()), (2, b"b".to_vec())]);
        out.write_all(b"c").unwrap();
        assert_eq!(all(&mut reader), [(1, b"c".to_vec())]);
        assert_eq!(reader.follow().unwrap(), None);
    }

    #[test]
    fn only_the_last_bytes_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let log = Log::create(&path).unwrap();
        let mut out = log.tee(1, Box::new(io::sink()));
        let mut follower = Reader::open(&path).unwrap();
        let mut followed = 0u32;
        for number in 0..5 * SIZE_MAX as u32 / (64 << 10) {
            let mut data = vec![0; 64 << 10];
            data[..4].copy_from_slice(&number.to_le_bytes());
            out.write_all(&data).unwrap();
            while let Some(piece) = follower.follow().unwrap() {
                assert_eq!(piece.data[..4], followed.to_le_bytes());
                followed += 1;
            }
        }
        let len = |path: &Path| fs::metadata(path).unwrap().len();
        assert!(len(&path) + len(&earlier(&path)) <= 2 * SIZE_MAX + (128 << 10));
        let kept = all(&mut Reader::open(&path).unwrap());
        assert!(kept.len() as u64 * (64 << 10) > SIZE_MAX);
        assert_eq!(followed, 5 * SIZE_MAX as u32 / (64 << 10));
    }

    #[test]
    fn a_log_that_is_none_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, [0xff; 100]).unwrap();
        assert!(Reader::open(&path).unwrap().piece().is_err());
        fs::write(&path, [1, 0]).unwrap();
        assert_eq!(Reader::open(&path).unwrap().piece().unwrap(), None);
    }
}
