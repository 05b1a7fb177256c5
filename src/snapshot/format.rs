//! The state file: named sections, each with a version, a length and a digest.
//!
//! | offset | length | holds |
//! | --- | --- | --- |
//! | 0 | 8 | [`MAGIC`] |
//! | 8 | 2 | the version of this layout |
//! | 10 | 2 | how many sections there are |
//! | 12 | 4 | 0 |
//! | 16 | 64 each | the sections: name (24, ends with NULs), version (2), 0 (2), length (4), SHA-256 of the content (32) |
//! | then | 32 | SHA-256 of all before it |
//! | then | | the sections' contents, one after the other, to the file's end |
//!
//! Numbers are little-endian. A section's content is a plain struct in the form of
//! [postcard](https://postcard.jamesmunns.com/wire-format).
//!
//! Such a file is as hostile as a guest. It is read once into memory, no further than
//! [`FILE_MAX`]; nothing in it is a path, or a size to allocate; and what is in it is used,
//! or the file is refused. The digests find damage, no forgery.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The first bytes of a state file.
pub const MAGIC: [u8; 8] = *b"mayflyST";
/// The version of the layout.
const LAYOUT: u16 = 1;
/// The longest state file, in bytes.
pub const FILE_MAX: usize = 16 << 20;
/// The longest section, in bytes.
pub const SECTION_MAX: usize = 4 << 20;
/// The most sections of a file.
pub const SECTIONS_MAX: usize = 64;

const NAME_MAX: usize = 24;
const HEADER: usize = 16;
const ENTRY: usize = 64;

/// A part of a machine's state, with a section of its own.
pub trait Section: Serialize + DeserializeOwned {
    /// The section's name: at most 24 small letters, digits, `-` and `.`.
    const NAME: &'static str;
    /// The version that is written.
    const VERSION: u16;

    /// Reads what an earlier version of mayfly wrote. `None` if this version was never one,
    /// or is not read any more.
    fn upgrade(version: u16, content: &[u8]) -> Result<Option<Self>, FormatError> {
        let _ = (version, content);
        Ok(None)
    }
}

/// Why a state file is refused, or cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It cannot be read.
    #[error("reading the state file")]
    Read(#[source] io::Error),
    /// It is something else.
    #[error("it is no state file of mayfly's")]
    Magic,
    /// Another version of mayfly wrote it.
    #[error("the state file has layout {0}; this mayfly reads {LAYOUT}")]
    Layout(u16),
    /// It is larger than any.
    #[error("the state file is larger than {} MiB", FILE_MAX >> 20)]
    TooLong,
    /// It is cut off, or goes on behind its end.
    #[error("the state file is incomplete, or too long")]
    Length,
    /// It was not written so.
    #[error("the state file is damaged: {0}")]
    Damaged(&'static str),
    /// A digest differs.
    #[error("the section {0:?} of the state file is damaged: its SHA-256 is another")]
    Digest(String),
    /// There is no such section.
    #[error("the state file has no section {0:?}")]
    Missing(&'static str),
    /// A section that this version of mayfly does not know.
    #[error("the state file has a section {0:?}, which this mayfly does not know")]
    Unknown(String),
    /// A section of another version.
    #[error("the section {name:?} has version {version}, which this mayfly does not read")]
    Version {
        /// The section's name.
        name: &'static str,
        /// Its version.
        version: u16,
    },
    /// A section's content makes no sense.
    #[error("the section {name:?} does not hold what it should")]
    Content {
        /// The section's name.
        name: &'static str,
        /// The cause.
        #[source]
        source: postcard::Error,
    },
    /// A section's content goes on behind its end.
    #[error("the section {0:?} is longer than what it holds")]
    Trailing(&'static str),
    /// What is to be written does not fit.
    #[error("the section {0:?} cannot be written: it is too large, or one too many")]
    TooLarge(String),
}

type Digest = [u8; SHA256_OUTPUT_LEN];

fn sha256(bytes: &[u8]) -> Digest {
    let mut sum = [0; SHA256_OUTPUT_LEN];
    let digest = digest(&SHA256, bytes);
    sum.iter_mut()
        .zip(digest.as_ref())
        .for_each(|(to, from)| *to = *from);
    sum
}

fn is_name(name: &str) -> bool {
    let allowed = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.');
    (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(allowed)
}

/// Makes a state file.
#[derive(Debug, Default)]
pub struct Writer {
    entries: Vec<u8>,
    contents: Vec<u8>,
    names: Vec<String>,
}

impl Writer {
    /// One without sections.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a section.
    pub fn add<S: Section>(&mut self, section: &S) -> Result<(), FormatError> {
        let name = S::NAME;
        let content =
            postcard::to_stdvec(section).map_err(|source| FormatError::Content { name, source })?;
        self.add_content(name, S::VERSION, &content)
    }

    /// Adds a section whose content is ready.
    pub fn add_content(
        &mut self,
        name: &str,
        version: u16,
        content: &[u8],
    ) -> Result<(), FormatError> {
        let refused = || FormatError::TooLarge(name.to_owned());
        let fits = is_name(name)
            && !self.names.iter().any(|known| known == name)
            && self.names.len() < SECTIONS_MAX
            && content.len() <= SECTION_MAX
            && self.contents.len() + content.len() <= FILE_MAX - end_of_table(SECTIONS_MAX);
        if !fits {
            return Err(refused());
        }
        let len = u32::try_from(content.len()).map_err(|_| refused())?;
        let mut padded = [0; NAME_MAX];
        padded
            .iter_mut()
            .zip(name.bytes())
            .for_each(|(to, from)| *to = from);
        self.entries.extend(padded);
        self.entries.extend(version.to_le_bytes());
        self.entries.extend([0; 2]);
        self.entries.extend(len.to_le_bytes());
        self.entries.extend(sha256(content));
        self.contents.extend(content);
        self.names.push(name.to_owned());
        Ok(())
    }

    /// The file's bytes.
    pub fn finish(self) -> Vec<u8> {
        // `add_content` lets no more in than `SECTIONS_MAX`.
        let count = u16::try_from(self.names.len()).unwrap_or(u16::MAX);
        let mut file = MAGIC.to_vec();
        file.extend(LAYOUT.to_le_bytes());
        file.extend(count.to_le_bytes());
        file.extend([0; 4]);
        file.extend(self.entries);
        file.extend(sha256(&file));
        file.extend(self.contents);
        file
    }
}

/// Where the contents of a file with this number of sections begin.
const fn end_of_table(sections: usize) -> usize {
    HEADER + sections * ENTRY + SHA256_OUTPUT_LEN
}

/// A state file whose digests are right. Its sections are taken out one by one.
#[derive(Debug)]
pub struct Reader {
    sections: Vec<Stored>,
}

#[derive(Debug)]
struct Stored {
    name: String,
    version: u16,
    content: Vec<u8>,
}

impl Reader {
    /// Reads a file from its beginning. Whoever changes it meanwhile changes a copy.
    pub fn read(file: &File) -> Result<Self, FormatError> {
        let mut bytes = Vec::new();
        let mut chunk = [0; 64 << 10];
        loop {
            let at = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            match file.read_at(&mut chunk, at) {
                Ok(0) => return Self::parse(&bytes),
                Ok(count) => bytes.extend(chunk.iter().take(count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(FormatError::Read(error)),
            }
            if bytes.len() > FILE_MAX {
                return Err(FormatError::TooLong);
            }
        }
    }

    /// Takes a file's bytes apart.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > FILE_MAX {
            return Err(FormatError::TooLong);
        }
        let mut rest = Input(bytes);
        if rest.array() != Some(MAGIC) {
            return Err(FormatError::Magic);
        }
        let layout = rest.number()?;
        if layout != LAYOUT {
            return Err(FormatError::Layout(layout));
        }
        let count = usize::from(rest.number()?);
        if count > SECTIONS_MAX {
            return Err(FormatError::Damaged("it has too many sections"));
        }
        if rest.array() != Some([0; 4]) {
            return Err(FormatError::Damaged("its header is another"));
        }
        let mut entries = rest;
        rest.take(count * ENTRY)?;
        let table = bytes.len() - rest.0.len();
        let sum = rest.array().ok_or(FormatError::Length)?;
        if bytes.get(..table).map(sha256) != Some(sum) {
            return Err(FormatError::Damaged("the SHA-256 of its table is another"));
        }
        let mut sections: Vec<Stored> = Vec::new();
        for _ in 0..count {
            let section = Stored::read(&mut entries, &mut rest)?;
            if sections.iter().any(|other| other.name == section.name) {
                return Err(FormatError::Damaged("it has a section twice"));
            }
            sections.push(section);
        }
        match rest.0 {
            [] => Ok(Reader { sections }),
            _ => Err(FormatError::Length),
        }
    }

    /// Takes a section that must be there.
    pub fn take<S: Section>(&mut self) -> Result<S, FormatError> {
        self.take_if_there()?.ok_or(FormatError::Missing(S::NAME))
    }

    /// Takes a section that earlier versions did not write, or not always.
    pub fn take_if_there<S: Section>(&mut self) -> Result<Option<S>, FormatError> {
        let name = S::NAME;
        let Some(at) = self.sections.iter().position(|stored| stored.name == name) else {
            return Ok(None);
        };
        let Stored {
            version, content, ..
        } = self.sections.swap_remove(at);
        if version != S::VERSION {
            let read = S::upgrade(version, &content)?;
            return match read {
                Some(section) => Ok(Some(section)),
                None => Err(FormatError::Version { name, version }),
            };
        }
        decode(name, &content).map(Some)
    }

    /// The end of reading: all sections must have been taken.
    pub fn finish(self) -> Result<(), FormatError> {
        match self.sections.into_iter().next() {
            None => Ok(()),
            Some(stored) => Err(FormatError::Unknown(stored.name)),
        }
    }
}

/// What a section holds: all of it, and nothing more. For [`Section::upgrade`], too.
pub fn decode<T: DeserializeOwned>(name: &'static str, content: &[u8]) -> Result<T, FormatError> {
    let read = postcard::take_from_bytes(content);
    match read.map_err(|source| FormatError::Content { name, source })? {
        (value, []) => Ok(value),
        _ => Err(FormatError::Trailing(name)),
    }
}

impl Stored {
    /// Reads a section from its entry, and from where its content is next.
    fn read(entries: &mut Input, contents: &mut Input) -> Result<Self, FormatError> {
        let name: [u8; NAME_MAX] = entries.array().ok_or(FormatError::Length)?;
        let end = name
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        let name = name.get(..end).unwrap_or_default();
        let name = str::from_utf8(name).ok().filter(|name| is_name(name));
        let name = name.ok_or(FormatError::Damaged("a section has an impossible name"))?;
        let version = entries.number()?;
        if entries.number()? != 0 {
            return Err(FormatError::Damaged("its table is another"));
        }
        let len = entries.array().map(u32::from_le_bytes).unwrap_or(u32::MAX);
        let sum: Digest = entries.array().ok_or(FormatError::Length)?;
        let content = match usize::try_from(len) {
            Ok(len @ ..=SECTION_MAX) => contents.take(len)?,
            _ => return Err(FormatError::Damaged("a section is too long")),
        };
        if sha256(content) != sum {
            return Err(FormatError::Digest(name.to_owned()));
        }
        Ok(Stored {
            name: name.to_owned(),
            version,
            content: content.to_vec(),
        })
    }
}

/// Bytes that are not read yet.
#[derive(Clone, Copy)]
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(FormatError::Length)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn number(&mut self) -> Result<u16, FormatError> {
        self.array()
            .map(u16::from_le_bytes)
            .ok_or(FormatError::Length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Clock {
        now: u64,
        zone: String,
    }

    impl Section for Clock {
        const NAME: &'static str = "clock";
        const VERSION: u16 = 2;

        /// Version 1 had seconds and no zone.
        fn upgrade(version: u16, content: &[u8]) -> Result<Option<Self>, FormatError> {
            if version != 1 {
                return Ok(None);
            }
            let seconds: u32 = decode(Self::NAME, content)?;
            Ok(Some(Clock {
                now: u64::from(seconds) * 1_000_000_000,
                zone: "UTC".into(),
            }))
        }
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Names(Vec<String>);

    impl Section for Names {
        const NAME: &'static str = "names";
        const VERSION: u16 = 1;
    }

    fn clock() -> Clock {
        Clock {
            now: 7,
            zone: "UTC".into(),
        }
    }

    fn file() -> Vec<u8> {
        let mut writer = Writer::new();
        writer.add(&clock()).unwrap();
        writer.add(&Names(vec!["one".into()])).unwrap();
        writer.finish()
    }

    /// Reads all that [`file`] has.
    fn read(bytes: &[u8]) -> Result<(Clock, Names), FormatError> {
        let mut reader = Reader::parse(bytes)?;
        let read = (reader.take()?, reader.take()?);
        reader.finish()?;
        Ok(read)
    }

    fn with_clock(version: u16, content: &[u8]) -> Result<Clock, FormatError> {
        let mut writer = Writer::new();
        writer.add_content("clock", version, content).unwrap();
        Reader::parse(&writer.finish()).unwrap().take()
    }

    #[test]
    fn sections_come_back_in_any_order() {
        let mut reader = Reader::parse(&file()).unwrap();
        assert_eq!(reader.take::<Names>().unwrap(), Names(vec!["one".into()]));
        assert_eq!(reader.take::<Clock>().unwrap(), clock());
        reader.finish().unwrap();
    }

    #[test]
    fn each_byte_counts() {
        let good = file();
        read(&good).unwrap();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(read(&bad).is_err(), "bit {bit} of byte {at}");
            }
            assert!(read(&good[..at]).is_err(), "cut off at {at}");
        }
        assert!(matches!(
            read(&[&good[..], &[0]].concat()),
            Err(FormatError::Length)
        ));
    }

    #[test]
    fn what_is_not_known_is_refused_and_what_is_missing_is_named() {
        let mut reader = Reader::parse(&file()).unwrap();
        reader.take::<Clock>().unwrap();
        let again = reader.take::<Clock>().unwrap_err();
        assert!(matches!(again, FormatError::Missing("clock")), "{again}");
        assert_eq!(reader.take_if_there::<Clock>().unwrap(), None);
        let rest = reader.finish().unwrap_err();
        assert!(rest.to_string().contains("\"names\""), "{rest}");
    }

    #[test]
    fn earlier_versions_are_read_and_later_ones_refused() {
        let first = with_clock(1, &postcard::to_stdvec(&3u32).unwrap()).unwrap();
        assert_eq!(first.now, 3_000_000_000);
        for version in [0, 3, u16::MAX] {
            let error = with_clock(version, &[0, 0]).unwrap_err();
            assert!(matches!(error, FormatError::Version { .. }), "{error}");
        }
    }

    #[test]
    fn contents_are_whole() {
        let content = postcard::to_stdvec(&clock()).unwrap();
        with_clock(2, &content).unwrap();
        let short = with_clock(2, &content[..content.len() - 1]).unwrap_err();
        assert!(matches!(short, FormatError::Content { .. }), "{short}");
        let long = with_clock(2, &[&content[..], &[0]].concat()).unwrap_err();
        assert!(matches!(long, FormatError::Trailing("clock")), "{long}");
        // A text of 2^63 bytes.
        let huge = [&[7][..], &[0xff; 8], &[0x7f]].concat();
        let huge = with_clock(2, &huge).unwrap_err();
        assert!(matches!(huge, FormatError::Content { .. }), "{huge}");
    }

    #[test]
    fn nothing_grows_without_bounds() {
        let mut writer = Writer::new();
        let long = vec![0; SECTION_MAX + 1];
        assert!(writer.add_content("a", 1, &long).is_err());
        for name in ["", "A", "a/b", "a b", "ä", &"a".repeat(NAME_MAX + 1)] {
            assert!(writer.add_content(name, 1, &[]).is_err(), "{name}");
        }
        writer.add_content("a", 1, &long[1..]).unwrap();
        writer.add_content("b", 1, &long[1..]).unwrap();
        writer.add_content("c", 1, &long[1..]).unwrap();
        assert!(writer.add_content("d", 1, &long[1..]).is_err());
        assert!(writer.add_content("a", 1, &[]).is_err());
        let bytes = writer.finish();
        Reader::parse(&bytes).unwrap();
        let mut writer = Writer::new();
        for number in 0..SECTIONS_MAX {
            writer.add_content(&format!("s{number}"), 1, &[]).unwrap();
        }
        assert!(writer.add_content("more", 1, &[]).is_err());
        Reader::parse(&writer.finish()).unwrap();

        let endless = File::open("/dev/zero").unwrap();
        assert!(matches!(Reader::read(&endless), Err(FormatError::TooLong)));
    }

    #[test]
    fn a_file_is_read_from_its_beginning() {
        use std::io::Write;
        let mut on_disk = tempfile::tempfile().unwrap();
        on_disk.write_all(&file()).unwrap();
        let mut reader = Reader::read(&on_disk).unwrap();
        assert_eq!(reader.take::<Clock>().unwrap(), clock());
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(
            contents in prop::collection::vec((any::<u16>(), any::<Vec<u8>>()), 0..20),
        ) {
            let mut writer = Writer::new();
            for (number, (version, content)) in contents.iter().enumerate() {
                writer.add_content(&format!("section-{number}"), *version, content).unwrap();
            }
            let reader = Reader::parse(&writer.finish()).unwrap();
            let read: Vec<_> = reader.sections.into_iter().map(|stored| {
                (stored.version, stored.content)
            }).collect();
            prop_assert_eq!(read, contents);
        }

        #[test]
        fn clocks_and_names_come_back(
            now: u64, zone in ".*", names in prop::collection::vec(".*", 0..9),
        ) {
            let (clock, names) = (Clock { now, zone }, Names(names));
            let mut writer = Writer::new();
            writer.add(&clock).unwrap();
            writer.add(&names).unwrap();
            prop_assert_eq!(read(&writer.finish()).unwrap(), (clock, names));
        }

        #[test]
        fn foreign_bytes_are_an_error(bytes: Vec<u8>) {
            let _ = read(&bytes);
            let _ = read(&[&MAGIC[..], &[1, 0], &bytes].concat());
            let _ = with_clock(1, &bytes);
            let _ = with_clock(2, &bytes);
        }
    }
}
