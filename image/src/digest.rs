//! The names of things that are named by what they hold.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

const ALGORITHM: &str = "sha256:";

/// A SHA-256 digest; `sha256:` and 64 hexadecimal digits as text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// A text that is no digest, or one of another algorithm.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a digest (sha256: and 64 hexadecimal digits)")]
pub struct NotADigest(String);

impl Digest {
    /// The digest of some bytes.
    pub fn of(data: &[u8]) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(data);
        hasher.finish()
    }

    /// Its 32 bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The hexadecimal digits alone: a harmless name for a file.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// From hexadecimal digits alone; small letters, as digests are compared as text.
    pub fn from_hex(text: &str) -> Option<Self> {
        let small = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
        if text.len() != 64 || !text.as_bytes().iter().all(small) {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some(Digest(bytes))
    }
}

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, NotADigest> {
        text.strip_prefix(ALGORITHM)
            .and_then(Digest::from_hex)
            .ok_or_else(|| NotADigest(text.chars().take(100).collect()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{ALGORITHM}{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Makes a digest of what comes in pieces.
#[derive(Clone)]
pub struct Hasher(Context);

impl Hasher {
    /// A hasher without data yet.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Hasher(Context::new(&SHA256))
    }

    /// Adds some bytes.
    pub fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    /// The digest of it all.
    pub fn finish(self) -> Digest {
        let mut bytes = [0; 32];
        for (byte, source) in bytes.iter_mut().zip(self.0.finish().as_ref()) {
            *byte = *source;
        }
        Digest(bytes)
    }
}

/// Makes a digest of what passes through.
pub struct Hashing<R> {
    inner: R,
    hasher: Hasher,
    len: u64,
}

impl<R: Read> Hashing<R> {
    /// Around a reader.
    pub fn new(inner: R) -> Self {
        let hasher = Hasher::new();
        Hashing {
            inner,
            hasher,
            len: 0,
        }
    }

    /// Reads what is left, and tells the digest and the length of it all.
    pub fn finish(mut self) -> io::Result<(Digest, u64)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((self.hasher.finish(), self.len))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(buffer.get(..count).unwrap_or_default());
        self.len = self.len.saturating_add(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_text_and_back() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), empty);
        assert_eq!(empty.parse::<Digest>().unwrap(), Digest::of(b""));
        for bad in [
            "",
            "sha256:",
            &empty[..70],
            &empty[7..],
            "sha512:00",
            &empty.to_uppercase(),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
        let odd = format!("sha256:{}", "é".repeat(32));
        assert!(odd.parse::<Digest>().is_err());
        assert!(
            format!("sha256:{}", "+1".repeat(32))
                .parse::<Digest>()
                .is_err()
        );
    }

    #[test]
    fn what_passes_is_hashed_to_its_end() {
        let mut reader = Hashing::new(&b"hello world"[..]);
        reader.read_exact(&mut [0; 5]).unwrap();
        let (digest, len) = reader.finish().unwrap();
        assert_eq!((digest, len), (Digest::of(b"hello world"), 11));
    }
}
