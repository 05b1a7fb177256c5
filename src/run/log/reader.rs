//! Reading a log, also one that is being written.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::piece::{CONTINUES, HEADER, PIECE_MAX, Piece, earlier};

/// What there is in a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// What was written.
    Piece(Piece),
    /// The number of bytes that were written here and are not kept.
    Missing(u64),
}

/// A piece as it is in a file.
struct Stored {
    piece: Piece,
    /// Its data are in the middle of a line.
    continues: bool,
    /// How many bytes were written before it.
    position: u64,
}

/// A file of a log.
struct Part {
    file: BufReader<File>,
    id: (u64, u64),
    /// How much of it was read.
    offset: u64,
}

impl Part {
    fn open(path: &Path) -> io::Result<Option<Self>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let metadata = file.metadata()?;
        Ok(Some(Part {
            file: BufReader::new(file),
            id: (metadata.dev(), metadata.ino()),
            offset: 0,
        }))
    }
}

/// Reads a log.
pub struct Reader {
    path: PathBuf,
    part: Option<Part>,
    /// The beginning of a piece whose end is not there yet.
    begun: Vec<u8>,
    /// How many bytes there were before what comes next, if nothing is missing.
    position: u64,
    /// A piece that comes behind what is missing.
    held: Option<Stored>,
    /// Of each stream, what comes next may be the rest of a line that is missing.
    cut: [bool; 2],
    /// Where one that is only read to its end of now stops: a file, and how much of it.
    end: Option<((u64, u64), u64)>,
}

impl Reader {
    /// Reads from the beginning of what is kept; to what is its end now, or on and on.
    pub fn open(path: &Path, follow: bool) -> io::Result<Self> {
        let end = match Part::open(path)? {
            Some(part) if !follow => {
                let len = part.file.get_ref().metadata()?.len();
                Some((part.id, len))
            }
            _ => None,
        };
        Ok(Reader {
            path: path.to_owned(),
            part: None,
            begun: Vec::new(),
            position: 0,
            held: None,
            cut: [false; 2],
            end,
        })
    }

    /// What comes next; none if there is no more, yet.
    pub fn item(&mut self) -> io::Result<Option<Item>> {
        loop {
            let held = self.held.take();
            let stored = match held {
                Some(stored) => stored,
                None => match self.stored()? {
                    Some(stored) => stored,
                    None => return Ok(None),
                },
            };
            let len = stored.piece.data.len() as u64;
            // Files can change their names while they are looked for.
            if stored.position < self.position {
                continue;
            }
            let missing = stored.position - self.position;
            if missing > 0 {
                self.position = stored.position;
                self.held = Some(stored);
                self.cut = [true; 2];
                return Ok(Some(Item::Missing(missing)));
            }
            self.position = stored.position.saturating_add(len);
            if let Some(piece) = self.uncut(stored) {
                return Ok(Some(Item::Piece(piece)));
            }
        }
    }

    /// A piece without the rest of a line whose beginning is missing. Output that has no
    /// lines is left as it is.
    fn uncut(&mut self, stored: Stored) -> Option<Piece> {
        let Stored {
            mut piece,
            continues,
            ..
        } = stored;
        let [out, err] = &mut self.cut;
        let cut = if piece.stream == 2 { err } else { out };
        if std::mem::replace(cut, false) && continues {
            let end = piece.data.iter().position(|&byte| byte == b'\n');
            piece.data.drain(..end.map_or(0, |end| end + 1));
        }
        (!piece.data.is_empty()).then_some(piece)
    }

    /// The next piece of the files, in order.
    fn stored(&mut self) -> io::Result<Option<Stored>> {
        loop {
            if let Some(stored) = self.of_part()? {
                return Ok(Some(stored));
            }
            if self.is_at_end() || !self.is_complete()? {
                return Ok(None);
            }
            // Nobody writes to this file any more: now it is whole.
            if let Some(stored) = self.of_part()? {
                return Ok(Some(stored));
            }
            if !self.advance()? {
                return Ok(None);
            }
        }
    }

    fn is_at_end(&self) -> bool {
        match (&self.part, self.end) {
            (Some(part), Some((id, len))) => part.id == id && part.offset >= len,
            _ => false,
        }
    }

    /// True if the file that is read is not the one that is written.
    fn is_complete(&self) -> io::Result<bool> {
        let Some(part) = &self.part else {
            return Ok(true);
        };
        let written = Part::open(&self.path)?;
        Ok(written.is_some_and(|written| written.id != part.id))
    }

    /// Goes on to the next file; false if there is none.
    fn advance(&mut self) -> io::Result<bool> {
        let ours = self.part.as_ref().map(|part| part.id);
        let next = match Part::open(&earlier(&self.path))? {
            Some(part) if Some(part.id) != ours => Some(part),
            _ => Part::open(&self.path)?,
        };
        self.begun.clear();
        match next {
            Some(part) if Some(part.id) != ours => {
                self.part = Some(part);
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// The next piece of the file that is read.
    fn of_part(&mut self) -> io::Result<Option<Stored>> {
        if self.is_at_end() || !self.fill(HEADER)? {
            return Ok(None);
        }
        let bytes = |at: usize| self.begun.get(at..)?.first_chunk::<8>().copied();
        let number = |at| bytes(at).map(u64::from_le_bytes).unwrap_or_default();
        let len = self.begun.get(17..HEADER).and_then(|it| it.try_into().ok());
        let len = u32::from_le_bytes(len.unwrap_or_default()) as usize;
        let (time_ms, position) = (number(1), number(9));
        if len > PIECE_MAX {
            return Err(ErrorKind::InvalidData.into());
        }
        if !self.fill(HEADER + len)? {
            return Ok(None);
        }
        let all = std::mem::take(&mut self.begun);
        let first = all.first().copied().unwrap_or(1);
        Ok(Some(Stored {
            piece: Piece {
                stream: first & !CONTINUES,
                time_ms,
                data: all.get(HEADER..).unwrap_or_default().to_vec(),
            },
            continues: first & CONTINUES != 0,
            position,
        }))
    }

    /// Reads until this much of a piece is there; false if it is not, yet.
    fn fill(&mut self, len: usize) -> io::Result<bool> {
        let Some(part) = &mut self.part else {
            return Ok(false);
        };
        let missing = len.saturating_sub(self.begun.len()) as u64;
        let got = (&mut part.file)
            .take(missing)
            .read_to_end(&mut self.begun)?;
        part.offset += got as u64;
        Ok(self.begun.len() >= len)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::super::Log;
    use super::*;

    const SIZE: u64 = 64 << 10;

    /// A log of a size, what is written to its output, and where it is.
    fn log() -> (tempfile::TempDir, PathBuf, Box<dyn Write + Send>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let log = Log::create(&path, SIZE).unwrap();
        (folder, path, log.tee(1, Box::new(io::sink())))
    }

    fn all(reader: &mut Reader) -> Vec<Item> {
        std::iter::from_fn(|| reader.item().unwrap()).collect()
    }

    fn texts(reader: &mut Reader) -> Vec<(u8, String)> {
        let text = |item| match item {
            Item::Piece(piece) => (piece.stream, String::from_utf8(piece.data).unwrap()),
            Item::Missing(bytes) => (0, bytes.to_string()),
        };
        all(reader).into_iter().map(text).collect()
    }

    #[test]
    fn streams_are_kept_apart_and_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut follower = Reader::open(&path, true).unwrap();
        assert_eq!(follower.item().unwrap(), None);
        let log = Log::create(&path, SIZE).unwrap();
        let mut out = log.tee(1, Box::new(io::sink()));
        let mut err = log.tee(2, Box::new(io::sink()));
        out.write_all(b"a\n").unwrap();
        err.write_all(b"").unwrap();
        err.write_all(b"b").unwrap();
        let expected = [(1, "a\n".to_owned()), (2, "b".to_owned())];
        let mut reader = Reader::open(&path, false).unwrap();
        assert_eq!(texts(&mut reader), expected);
        assert_eq!(texts(&mut follower), expected);
        out.write_all(b"c").unwrap();
        assert_eq!(texts(&mut follower), [(1, "c".to_owned())]);
        // What is only read ends where the log did then.
        assert_eq!(texts(&mut reader), []);
    }

    #[test]
    fn a_follower_that_keeps_up_misses_nothing() {
        let (_folder, path, mut out) = log();
        let mut follower = Reader::open(&path, true).unwrap();
        let mut seen = String::new();
        let mut expected = String::new();
        for number in 0..20_000 {
            let line = format!("{number}\n");
            out.write_all(line.as_bytes()).unwrap();
            expected += &line;
            // Sometimes a file is renamed meanwhile.
            if number % 700 == 0 {
                seen.extend(texts(&mut follower).into_iter().map(|(_, text)| text));
            }
        }
        seen.extend(texts(&mut follower).into_iter().map(|(_, text)| text));
        assert_eq!(seen, expected);
    }

    #[test]
    fn what_is_not_kept_is_told_and_what_follows_begins_with_a_line() {
        let (_folder, path, mut out) = log();
        let mut follower = Reader::open(&path, true).unwrap();
        let mut written = String::new();
        let mut write = |range: std::ops::Range<u32>| {
            for number in range {
                // In pieces that are no lines.
                let text = format!("{number:0>9}\nand the ");
                out.write_all(text.as_bytes()).unwrap();
                written += &text;
            }
            written.clone()
        };
        let before = write(0..100);
        let seen: String = texts(&mut follower).into_iter().map(|it| it.1).collect();
        assert_eq!(seen, before);
        let written = write(100..10_000);
        for (reader, from) in [
            (&mut follower, before.len()),
            (&mut Reader::open(&path, false).unwrap(), 0),
        ] {
            let mut items = all(reader).into_iter();
            // The file that was being read is read to its end.
            let mut got = from;
            let mut item = items.next();
            while let Some(Item::Piece(piece)) = &item {
                assert!(written.as_bytes()[got..].starts_with(&piece.data));
                got += piece.data.len();
                item = items.next();
            }
            let Some(Item::Missing(missing)) = item else {
                panic!("nothing is missing");
            };
            let rest = &written[got + missing as usize..];
            let (_, rest) = rest.split_once('\n').unwrap();
            let kept: Vec<u8> = items
                .flat_map(|item| match item {
                    Item::Piece(piece) => piece.data,
                    Item::Missing(_) => panic!("more is missing"),
                })
                .collect();
            assert!(kept == rest.as_bytes(), "{from}");
        }
        let len = |path: &Path| fs::metadata(path).unwrap().len();
        let kept = len(&path) + len(&earlier(&path));
        assert!((SIZE / 2..=SIZE).contains(&kept), "{kept}");
    }

    #[test]
    fn output_without_lines_is_kept_too() {
        let (_folder, path, mut out) = log();
        for _ in 0..100 {
            out.write_all(&[b'x'; 1000]).unwrap();
        }
        let items = all(&mut Reader::open(&path, false).unwrap());
        assert!(matches!(items[0], Item::Missing(_)), "{:?}", items[0]);
        assert!(items.len() > 32, "{}", items.len());
    }

    #[test]
    fn a_log_that_cannot_be_written_says_so_once_and_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let log = Log::create(&path, 100).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        log.on_failure(move |problem| tell.send(problem.to_owned()).unwrap());
        let mut out = log.tee(1, Box::new(io::sink()));
        out.write_all(b"one\n").unwrap();
        // A file cannot take a folder's name.
        fs::create_dir(earlier(&path)).unwrap();
        for _ in 0..3 {
            out.write_all(&[b'x'; 90]).unwrap();
        }
        fs::remove_dir(earlier(&path)).unwrap();
        out.write_all(b"y\ntwo\n").unwrap();
        drop((log, out));
        let told: Vec<String> = told.iter().collect();
        assert!(
            told.len() == 1 && told[0].contains("is missing"),
            "{told:?}"
        );
        let texts = texts(&mut Reader::open(&path, false).unwrap());
        assert_eq!(texts.last().unwrap(), &(1, "two\n".to_owned()), "{texts:?}");
        assert!(texts.contains(&(0, "270".to_owned())), "{texts:?}");
    }

    #[test]
    fn a_log_that_is_none_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, [0xff; 100]).unwrap();
        assert!(Reader::open(&path, false).unwrap().item().is_err());
        fs::write(&path, [1, 0]).unwrap();
        assert_eq!(Reader::open(&path, false).unwrap().item().unwrap(), None);
    }
}
