//! What archives are compressed by, told by their first bytes.

use std::io::{self, BufRead, BufReader, Read};

use bzip2::bufread::BzDecoder;
use flate2::bufread::GzDecoder;
use lzma_rust2::XzReader;

use super::limits::Limits;
use super::section::Section;
use super::tarball::ArchiveError;

/// The largest window of zstd, which is its own tool's limit too, and the largest
/// dictionary of xz: all that decoding ever holds in memory.
const WINDOW_LOG_MAX: u32 = 27;
const WINDOW_TOO_LARGE: &str = "needs a window of more than 128 MiB to be unpacked";
/// What a dictionary of xz of 128 MiB costs, and what is held beside it.
const XZ_MEMORY_KIB: u32 = (1 << (WINDOW_LOG_MAX - 10)) + 1024;
/// How many first bytes tell the format.
const START: usize = 10;

/// The compression of an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Plain,
    Gzip,
    Zstd,
    Bzip2,
    Xz,
    /// One that is not read: its name, and what unpacks it.
    Other(&'static str, &'static str),
}

impl Format {
    fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Format::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Format::Zstd,
            // A file's name may begin so too: more must be right.
            [
                b'B',
                b'Z',
                b'h',
                b'1'..=b'9',
                0x31,
                0x41,
                0x59,
                0x26,
                0x53,
                0x59,
            ]
            | [
                b'B',
                b'Z',
                b'h',
                b'1'..=b'9',
                0x17,
                0x72,
                0x45,
                0x38,
                0x50,
                0x90,
            ] => Format::Bzip2,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Format::Xz,
            [0x5d, 0, 0, ..] => Format::Other("lzma", "unlzma"),
            [0x04, 0x22, 0x4d, 0x18, ..] => Format::Other("lz4", "lz4 -d"),
            [b'L', b'Z', b'I', b'P', 1, ..] => Format::Other("lzip", "lzip -d"),
            [0x1f, 0x9d, ..] => Format::Other("compress", "uncompress"),
            [b'P', b'K', 3, 4, ..] => Format::Other("zip", "unzip"),
            [b'7', b'z', 0xbc, 0xaf, 0x27, 0x1c, ..] => Format::Other("7-Zip", "7z x"),
            _ => Format::Plain,
        }
    }
}

impl Section {
    fn format(&self) -> io::Result<Format> {
        let mut start = Vec::new();
        self.reader().take(START as u64).read_to_end(&mut start)?;
        Ok(Format::of(&start))
    }

    /// Reads what is in it, uncompressed. More than an honest archive of this
    /// size could hold is refused.
    pub fn unpacked(&self, limits: &Limits) -> Result<Box<dyn Read + Send>, ArchiveError> {
        let input = BufReader::with_capacity(128 << 10, self.reader());
        let inner: Box<dyn Read + Send> = match self.format()? {
            Format::Plain => Box::new(input),
            Format::Gzip => Box::new(Members::new(input, |input| Ok(GzDecoder::new(input)))),
            Format::Bzip2 => Box::new(Members::new(input, |input| Ok(BzDecoder::new(input)))),
            Format::Zstd => Box::new(Members::new(input, frame)),
            Format::Xz => Box::new(Windowed(XzReader::new_mem_limit(
                input,
                true,
                XZ_MEMORY_KIB,
            ))),
            Format::Other(name, tool) => {
                return Err(ArchiveError::Io(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "compressed by {name}; unpack it first ({tool}): only gzip, zstd, xz and \
                         bzip2 are read"
                    ),
                )));
            }
        };
        Ok(Box::new(limits.bounded(inner, self.len())))
    }

    /// True if reading it unpacked is reading it as it is.
    pub fn is_plain(&self) -> io::Result<bool> {
        Ok(self.format()? == Format::Plain)
    }
}

/// A decoder of one member, that stops behind it.
trait Decoder<R>: Read {
    /// The input behind the member.
    fn into_input(self) -> io::Result<R>;
}

impl<R: BufRead> Decoder<R> for GzDecoder<R> {
    fn into_input(self) -> io::Result<R> {
        Ok(self.into_inner())
    }
}

impl<R: BufRead> Decoder<R> for BzDecoder<R> {
    fn into_input(self) -> io::Result<R> {
        Ok(self.into_inner())
    }
}

type Frame<R> = Windowed<zstd::stream::read::Decoder<'static, R>>;

impl<R: BufRead> Decoder<R> for Frame<R> {
    fn into_input(mut self) -> io::Result<R> {
        self.0.finish_frame()?;
        Ok(self.0.into_inner())
    }
}

fn frame<R: BufRead>(input: R) -> io::Result<Frame<R>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?.single_frame();
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    Ok(Windowed(decoder))
}

/// Says in plain words that a window is too large.
struct Windowed<D>(D);

impl<D: Read> Read for Windowed<D> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| {
            let large = error.kind() == io::ErrorKind::OutOfMemory
                || error.to_string().contains("too much memory");
            match large {
                true => io::Error::new(io::ErrorKind::InvalidData, WINDOW_TOO_LARGE),
                false => error,
            }
        })
    }
}

/// All members of a file, one behind the other: gzip's, or zstd's frames. Zeroes
/// between and behind them fill up blocks of tapes and disks.
struct Members<R, D> {
    decoder: Option<D>,
    /// What comes behind the last member, where none is being read.
    input: Option<R>,
    make: fn(R) -> io::Result<D>,
}

impl<R: BufRead, D: Decoder<R>> Members<R, D> {
    fn new(input: R, make: fn(R) -> io::Result<D>) -> Self {
        Members {
            decoder: None,
            input: Some(input),
            make,
        }
    }

    /// Begins with the next member; false at the end.
    fn enter(&mut self) -> io::Result<bool> {
        let Some(mut input) = self.input.take() else {
            return Ok(false);
        };
        loop {
            let there = input.fill_buf()?;
            if there.is_empty() {
                return Ok(false);
            }
            let zeroes = there.iter().take_while(|byte| **byte == 0).count();
            let end = zeroes < there.len();
            input.consume(zeroes);
            if end {
                break;
            }
        }
        self.decoder = Some((self.make)(input)?);
        Ok(true)
    }
}

impl<R: BufRead, D: Decoder<R>> Read for Members<R, D> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(decoder) = &mut self.decoder {
                match decoder.read(buffer)? {
                    0 => {}
                    count => return Ok(count),
                }
            }
            if let Some(decoder) = self.decoder.take() {
                self.input = Some(decoder.into_input()?);
            }
            if !self.enter()? {
                return Ok(0);
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
        let reader = section(data).unpacked(&Limits::default());
        let mut reader = reader.map_err(io::Error::other)?;
        reader.read_to_end(&mut out).map(|_| out)
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        zstd::encode_all(data, 1).unwrap()
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn bzip2(data: &[u8]) -> Vec<u8> {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn xz(data: &[u8]) -> Vec<u8> {
        let options = lzma_rust2::XzOptions::with_preset(0);
        let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        writer.write_all(data).unwrap();
        writer.finish().unwrap()
    }

    const SKIPPED: &[u8] = b"\x53\x2a\x4d\x18\x03\0\0\0xyz";

    /// A frame of uncompressed blocks, with a byte that declares its window.
    fn frame(window: u8, blocks: &[(u32, &[u8])]) -> Vec<u8> {
        let mut out = vec![0x28, 0xb5, 0x2f, 0xfd, 0, window];
        for (index, (header, data)) in blocks.iter().enumerate() {
            let last = u32::from(index + 1 == blocks.len());
            out.extend_from_slice(&(header | last).to_le_bytes()[..3]);
            out.extend_from_slice(data);
        }
        out
    }

    fn raw(window: u8, data: &[u8]) -> Vec<u8> {
        frame(window, &[((data.len() as u32) << 3, data)])
    }

    #[test]
    fn all_members_and_frames_are_read_and_skippable_ones_skipped() {
        let text = b"some text ".repeat(50_000);
        let two = [text.clone(), b"end".to_vec()].concat();
        assert_eq!(unpacked(&text).unwrap(), text);
        for pack in [gzip, zstd, bzip2, xz] {
            assert_eq!(unpacked(&pack(&text)).unwrap(), text);
            assert_eq!(
                unpacked(&[pack(&text), pack(b"end")].concat()).unwrap(),
                two
            );
        }
        let frames = [SKIPPED, &zstd(&text), SKIPPED, &zstd(b"end"), SKIPPED];
        assert_eq!(unpacked(&frames.concat()).unwrap(), two);
        // One that is empty, and thousands of small ones.
        let many = [zstd(b""), zstd(b"x").repeat(5000)].concat();
        assert_eq!(unpacked(&many).unwrap(), b"x".repeat(5000));
        assert_eq!(unpacked(b"").unwrap(), b"");
    }

    #[test]
    fn zeroes_that_fill_up_a_block_are_passed_over() {
        for pack in [gzip, zstd, bzip2, xz] {
            let padding = vec![0; 300_000];
            let padded = [pack(b"one "), padding.clone(), pack(b"two"), padding].concat();
            assert_eq!(unpacked(&padded).unwrap(), b"one two");
            let garbage = [pack(b"one "), b"garbage".to_vec()].concat();
            assert!(unpacked(&garbage).is_err());
        }
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        let text = b"some text, and more".repeat(1000);
        for pack in [gzip, zstd, bzip2, xz] {
            let packed = pack(&text);
            for len in [12, 20, packed.len() / 2, packed.len() - 1] {
                assert!(
                    unpacked(&packed[..len]).is_err(),
                    "{len} of {}",
                    packed.len()
                );
            }
        }
    }

    #[test]
    fn a_window_is_at_most_128_mib_in_any_frame() {
        let fine = raw(0x88, b"fine");
        assert_eq!(unpacked(&fine).unwrap(), b"fine");
        assert_eq!(
            unpacked(&[fine.clone(), fine.clone()].concat()).unwrap(),
            b"finefine"
        );
        // Of 144 MiB, and of 1 TiB, with blocks of 128 KiB of zeroes: few, so that they are
        // soon unpacked where the window is not what is refused.
        let zero = ((128 << 10) << 3 | 1 << 1, &b"\0"[..]);
        for window in [0x89, 0xf0] {
            let bomb = frame(window, &[zero; 16]);
            for archive in [bomb.clone(), [fine.clone(), bomb].concat()] {
                let error = unpacked(&archive).err().map(|error| error.to_string());
                assert_eq!(error.as_deref(), Some(WINDOW_TOO_LARGE));
            }
        }
        let mut large = xz(b"text");
        // The dictionary's size, and the sum of the header that has it.
        large[12 + 4] = 40;
        let sum = flate2::Crc::new();
        let sum = {
            let mut sum = sum;
            sum.update(&large[12..20]);
            sum.sum()
        };
        large[20..24].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(unpacked(&large).unwrap_err().to_string(), WINDOW_TOO_LARGE);
    }

    #[test]
    fn other_formats_are_named_and_names_of_files_are_not_taken_for_them() {
        let starts: [(&[u8], &str); 6] = [
            (&[0x5d, 0, 0, 0x80, 0], "unlzma"),
            (&[0x04, 0x22, 0x4d, 0x18], "lz4 -d"),
            (b"LZIP\x01", "lzip -d"),
            (&[0x1f, 0x9d, 0x90], "uncompress"),
            (b"PK\x03\x04", "unzip"),
            (b"7z\xbc\xaf\x27\x1c", "7z x"),
        ];
        for (start, tool) in starts {
            let error = unpacked(start).unwrap_err().to_string();
            assert!(error.contains(tool), "{error}");
        }
        assert_eq!(unpacked(b"BZhello-world").unwrap(), b"BZhello-world");
    }
}
