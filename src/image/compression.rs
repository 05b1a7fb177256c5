//! What archives are compressed by, told by their first bytes.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::tarball::ArchiveError;

/// No archive unpacks to more.
pub const TOTAL_MAX: u64 = 64 << 30;
/// What any archive may unpack to.
const TOTAL_MIN: u64 = 1 << 30;
/// What larger ones may, for each byte.
const RATIO_MAX: u64 = 200;

/// Part of a file, that several may read at once.
#[derive(Clone, Debug)]
pub struct Section {
    file: Arc<File>,
    offset: u64,
    len: u64,
}

impl Section {
    /// A whole file.
    pub fn whole(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        let file = Arc::new(file);
        Ok(Section {
            file,
            offset: 0,
            len,
        })
    }

    /// Part of this one.
    pub fn part(&self, offset: u64, len: u64) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then(|| Section {
            file: Arc::clone(&self.file),
            offset: self.offset.saturating_add(offset),
            len,
        })
    }

    /// How many bytes it has.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads it from its start.
    pub fn reader(&self) -> SectionReader {
        SectionReader {
            section: self.clone(),
            position: 0,
        }
    }

    /// Reads what is in it, uncompressed. More than an honest archive of this
    /// size could hold is refused.
    pub fn unpacked(&self) -> Result<Box<dyn Read + Send>, ArchiveError> {
        let mut input = BufReader::with_capacity(128 << 10, self.reader());
        let start = input.fill_buf()?;
        let inner: Box<dyn Read + Send> = match start {
            [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(input)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                Box::new(Frames::new(input))
            }
            [b'B', b'Z', b'h', ..] => return Err(unread("bzip2")),
            [0xfd, b'7', b'z', b'X', b'Z', ..] => return Err(unread("xz")),
            _ => Box::new(input),
        };
        Ok(Box::new(Bounded {
            inner,
            left: limit(self.len),
        }))
    }

    /// True if reading it unpacked is reading it as it is.
    pub fn is_plain(&self) -> io::Result<bool> {
        let mut start = [0; 4];
        let count = self.reader().read(&mut start)?;
        Ok(!matches!(
            start.get(..count).unwrap_or_default(),
            [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18]
        ))
    }
}

/// What an archive of a length may unpack to.
fn limit(len: u64) -> u64 {
    len.saturating_mul(RATIO_MAX).clamp(TOTAL_MIN, TOTAL_MAX)
}

fn unread(name: &str) -> ArchiveError {
    ArchiveError::Io(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("compressed by {name}; unpack it first ({name} -d): only gzip and zstd are read"),
    ))
}

/// Reads a [`Section`].
pub struct SectionReader {
    section: Section,
    position: u64,
}

impl SectionReader {
    /// How many bytes were read.
    pub fn position(&self) -> u64 {
        self.position
    }
}

impl Read for SectionReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.section.len.saturating_sub(self.position);
        let most = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let at = self.section.offset.saturating_add(self.position);
        let buffer = buffer.get_mut(..most).unwrap_or_default();
        let count = self.section.file.read_at(buffer, at)?;
        self.position = self.position.saturating_add(count as u64);
        Ok(count)
    }
}

/// Fails where more comes than may.
struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(count as u64).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "unpacks to far more than an archive of its size should",
            )
        })?;
        Ok(count)
    }
}

/// All frames of zstd in a file; those without data are skipped.
struct Frames<R> {
    input: R,
    decoder: FrameDecoder,
    inside: bool,
}

impl<R: BufRead> Frames<R> {
    fn new(input: R) -> Self {
        Frames {
            input,
            decoder: FrameDecoder::new(),
            inside: false,
        }
    }

    /// False at the end.
    fn enter(&mut self) -> io::Result<bool> {
        while !self.input.fill_buf()?.is_empty() {
            match self.decoder.init(&mut self.input) {
                Ok(()) => {
                    self.inside = true;
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut (&mut self.input).take(length), &mut io::sink())? != length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(invalid(error)),
            }
        }
        Ok(false)
    }
}

fn invalid(error: FrameDecoderError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.inside && !self.enter()? {
                return Ok(0);
            }
            while self.decoder.can_collect() < buffer.len() && !self.decoder.is_finished() {
                let wanted = buffer.len().saturating_sub(self.decoder.can_collect());
                self.decoder
                    .decode_blocks(&mut self.input, BlockDecodingStrategy::UptoBytes(wanted))
                    .map_err(invalid)?;
            }
            match self.decoder.read(buffer)? {
                0 => self.inside = false,
                count => return Ok(count),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn section(data: &[u8]) -> Section {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(data).unwrap();
        Section::whole(file).unwrap()
    }

    fn unpacked(data: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        let mut reader = section(data).unpacked().map_err(io::Error::other)?;
        reader.read_to_end(&mut out).map(|_| out)
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        use ruzstd::encoding::{CompressionLevel, compress_to_vec};
        compress_to_vec(data, CompressionLevel::Fastest)
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn all_members_and_frames_are_read_and_skippable_ones_skipped() {
        let text = b"some text ".repeat(50_000);
        let skipped = [&[0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0], &b"xyz"[..]].concat();
        let two = [text.clone(), b"end".to_vec()].concat();
        assert_eq!(unpacked(&text).unwrap(), text);
        assert_eq!(
            unpacked(&[gzip(&text), gzip(b"end")].concat()).unwrap(),
            two
        );
        let frames = [
            skipped.clone(),
            zstd(&text),
            skipped.clone(),
            zstd(b"end"),
            skipped,
        ];
        assert_eq!(unpacked(&frames.concat()).unwrap(), two);
        assert_eq!(unpacked(b"").unwrap(), b"");
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        let text = b"some text, and more".repeat(1000);
        for packed in [gzip(&text), zstd(&text)] {
            for len in [3, 4, 5, 10, packed.len() / 2, packed.len() - 1] {
                let cut = &packed[..len];
                assert!(
                    unpacked(cut).is_err() || len == 3,
                    "{len} of {}",
                    packed.len()
                );
            }
        }
        assert!(
            unpacked(b"BZh91AY")
                .unwrap_err()
                .to_string()
                .contains("bzip2 -d")
        );
    }

    #[test]
    fn a_bomb_is_refused() {
        assert_eq!(limit(0), TOTAL_MIN);
        assert_eq!(limit(100 << 20), 200 * (100 << 20));
        assert_eq!(limit(u64::MAX), TOTAL_MAX);
        let inner = io::repeat(0);
        let mut reader = Bounded {
            inner,
            left: 1 << 20,
        };
        let error = io::copy(&mut reader, &mut io::sink()).unwrap_err();
        assert!(error.to_string().contains("far more"), "{error}");
    }

    #[test]
    fn a_part_ends_where_it_ends() {
        let whole = section(b"0123456789");
        let mut text = String::new();
        let part = whole.part(2, 3).unwrap();
        part.part(1, 2)
            .unwrap()
            .reader()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "34");
        assert!(part.part(1, 3).is_none() && part.part(u64::MAX, 1).is_none());
    }
}
