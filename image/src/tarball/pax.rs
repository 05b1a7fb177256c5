//! Extended headers of POSIX: records of `LENGTH KEY=VALUE`.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;

use super::decimal::decimal;
use super::error::ArchiveError;
use super::sparse::Hints;

const XATTR: &[u8] = b"SCHILY.xattr.";
const XATTR_OF_LIBARCHIVE: &[u8] = b"LIBARCHIVE.xattr.";
/// Linux' own limit.
const XATTR_NAME_MAX: usize = 255;

/// What the headers before an entry say of it.
#[derive(Debug, Default)]
pub struct Extensions {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mtime: Option<u32>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub sparse: Hints,
}

impl Extensions {
    /// Reads the records of a header.
    pub fn parse(&mut self, mut data: &[u8]) -> Result<(), ArchiveError> {
        const BAD: ArchiveError = ArchiveError::Malformed("an extended header has no records");
        while !data.is_empty() {
            // Some writers pad with zeroes.
            if data.iter().all(|byte| *byte == 0) {
                break;
            }
            let space = data
                .iter()
                .take(20)
                .position(|byte| *byte == b' ')
                .ok_or(BAD)?;
            let (digits, _) = data.split_at_checked(space).ok_or(BAD)?;
            let len: usize = decimal(digits).ok_or(BAD)?;
            let (record, rest) = data.split_at_checked(len).ok_or(BAD)?;
            let record = record.get(space.saturating_add(1)..).ok_or(BAD)?;
            let record = record.strip_suffix(b"\n").ok_or(BAD)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(BAD)?;
            let (key, value) = record.split_at_checked(equals).ok_or(BAD)?;
            self.record(key, value.get(1..).unwrap_or_default())?;
            data = rest;
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), ArchiveError> {
        const BAD: ArchiveError = ArchiveError::Malformed("a number in an extended header");
        match key {
            // An empty value takes the record back.
            b"path" => self.path = (!value.is_empty()).then(|| value.to_vec()),
            b"linkpath" => self.link = (!value.is_empty()).then(|| value.to_vec()),
            b"size" if value.is_empty() => self.size = None,
            b"uid" if value.is_empty() => self.uid = None,
            b"gid" if value.is_empty() => self.gid = None,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"size" => self.size = Some(decimal(value).ok_or(BAD)?),
            b"uid" => self.uid = Some(decimal(value).ok_or(BAD)?),
            b"gid" => self.gid = Some(decimal(value).ok_or(BAD)?),
            b"mtime" => self.mtime = Some(seconds(value).ok_or(BAD)?),
            _ if key.starts_with(b"GNU.sparse.") => self.sparse.record(key, value)?,
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    self.xattr(name.to_vec(), value.to_vec())?;
                } else if let Some(name) = key.strip_prefix(XATTR_OF_LIBARCHIVE) {
                    let name = percent_decoded(name);
                    if !self.xattrs.contains_key(&name) {
                        let value = value.strip_suffix(b"=").unwrap_or(value);
                        let value = value.strip_suffix(b"=").unwrap_or(value);
                        let value = STANDARD_NO_PAD.decode(value).map_err(|_| {
                            ArchiveError::Malformed("an extended attribute is not base64")
                        })?;
                        self.xattr(name, value)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn xattr(&mut self, name: Vec<u8>, value: Vec<u8>) -> Result<(), ArchiveError> {
        // One with = could come encoded, and be told apart no more where it is written.
        let strange = name.contains(&0) || name.contains(&b'=');
        if name.is_empty() || name.len() > XATTR_NAME_MAX || strange {
            return Err(ArchiveError::Malformed("an extended attribute's name"));
        }
        self.xattrs.insert(name, value);
        Ok(())
    }
}

/// A time as a file system keeps it: no fractions, nothing before 1970.
fn seconds(text: &[u8]) -> Option<u32> {
    let whole = text.split(|byte| *byte == b'.').next()?;
    if let Some(negative) = whole.strip_prefix(b"-") {
        return decimal::<u64>(negative).map(|_| 0);
    }
    decimal::<u64>(whole).map(|number| u32::try_from(number).unwrap_or(u32::MAX))
}

/// `%` and two hexadecimal digits stand for a byte.
pub fn percent_decoded(text: &[u8]) -> Vec<u8> {
    let digit = |byte: Option<&u8>| char::from(*byte?).to_digit(16);
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, after @ ..] = rest {
        let code = match (first, digit(after.first()), digit(after.get(1))) {
            (b'%', Some(high), Some(low)) => u8::try_from(high * 16 + low).ok(),
            _ => None,
        };
        out.push(code.unwrap_or(*first));
        rest = match code {
            Some(_) => after.get(2..).unwrap_or_default(),
            None => after,
        };
    }
    out
}
