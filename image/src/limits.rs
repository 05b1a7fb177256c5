//! What an image may cost: how much it unpacks to, and how long a download takes.

use std::io::{self, Read};
use std::time::Duration;

/// The bytes that an image may unpack to by default.
pub const SIZE: u64 = 64 << 30;
/// What any archive may unpack to, however small it is.
const RATIO_FROM: u64 = 1 << 30;
/// What larger ones may, for each of their bytes.
const RATIO_MAX: u64 = 200;
/// A run of zeroes of this length costs no disk.
const BLOCK: usize = 4096;

/// The limits for images that come.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many bytes the files of an image may have together, holes included.
    size: u64,
    /// How many of them there are by now.
    used: u64,
    /// The user said so, and trusts the archive with it.
    chosen: bool,
    /// The time that a download may take.
    pub(super) time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            size: SIZE,
            used: 0,
            chosen: false,
            time: Duration::from_secs(2 * 60 * 60),
        }
    }
}

impl Limits {
    /// With a size of the user's choice, which also an archive may unpack to that is
    /// much smaller.
    pub fn with_size(self, size: u64) -> Self {
        Limits {
            size,
            chosen: true,
            ..self
        }
    }

    /// With another time for a download.
    pub fn with_time(self, time: Duration) -> Self {
        Limits { time, ..self }
    }

    /// What is left of them for the next layer of an image whose layers have `used`
    /// bytes by now.
    pub fn less(self, used: u64) -> Self {
        Limits { used, ..self }
    }

    /// How many bytes more an image's files may have together.
    pub fn size(&self) -> u64 {
        self.size.saturating_sub(self.used)
    }

    /// Says that an image is larger than it may be.
    pub fn too_large(&self) -> String {
        format!(
            "more than {}, what an image may have (--max-size of mayfly image load, import and \
             pull)",
            words(self.size)
        )
    }

    /// Reads what an archive of this number of bytes unpacks to, and fails where that is more
    /// than an honest one could have.
    pub fn bounded<R: Read>(&self, inner: R, len: u64) -> Bounded<R> {
        let dense = match self.chosen {
            true => u64::MAX,
            false => len.saturating_mul(RATIO_MAX).max(RATIO_FROM),
        };
        // Beside files' data there are headers.
        let total = self.size().saturating_add(self.size() / 4);
        Bounded {
            inner,
            total: total.saturating_add(RATIO_FROM),
            dense,
            limits: *self,
        }
    }
}

/// Bytes as a user would write them.
fn words(size: u64) -> String {
    [(30, "GiB"), (20, "MiB"), (10, "KiB")]
        .iter()
        .find(|(shift, _)| size >> shift > 0 && size & ((1 << shift) - 1) == 0)
        .map_or(format!("{size} bytes"), |(shift, unit)| {
            format!("{} {unit}", size >> shift)
        })
}

/// Fails where more comes than may: at all, or apart from zeroes, which compress a
/// thousandfold in honest archives too and cost no disk.
pub struct Bounded<R> {
    inner: R,
    total: u64,
    dense: u64,
    limits: Limits,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let data = buffer.get(..count).unwrap_or_default();
        let dense = data.chunks(BLOCK).filter(|chunk| !is_zero(chunk));
        let dense = dense.map(|chunk| chunk.len() as u64).sum();
        let refused = |why| io::Error::new(io::ErrorKind::InvalidData, why);
        let left = self.total.checked_sub(count as u64);
        self.total = left.ok_or_else(|| refused(self.limits.too_large()))?;
        self.dense = self.dense.checked_sub(dense).ok_or_else(|| {
            refused(format!(
                "unpacks to far more than an archive of its size should: more than 1 GiB, and \
                 {RATIO_MAX} times its own size; if you trust it, say how much it may be \
                 (--max-size {})",
                words(self.limits.size).replace(" GiB", "G")
            ))
        })?;
        Ok(count)
    }
}

/// True if all bytes are zero.
pub fn is_zero(data: &[u8]) -> bool {
    let (chunks, rest) = data.as_chunks::<16>();
    chunks.iter().all(|chunk| u128::from_ne_bytes(*chunk) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounded(limits: &Limits, byte: u8, count: u64, len: u64) -> Result<u64, String> {
        let mut reader = limits.bounded(io::repeat(byte).take(count), len);
        io::copy(&mut reader, &mut io::sink()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_bomb_is_refused_and_zeroes_are_none() {
        let limits = Limits::default();
        let much = RATIO_FROM + (1 << 20);
        let error = bounded(&limits, 1, much, 1 << 20).unwrap_err();
        assert!(
            error.contains("far more") && error.contains("--max-size 64G"),
            "{error}"
        );
        assert_eq!(bounded(&limits, 1, much, 6 << 20), Ok(much));
        assert_eq!(bounded(&limits, 0, much, 1 << 20), Ok(much));
    }

    #[test]
    fn a_chosen_size_is_what_counts() {
        let limits = Limits::default().with_size(1 << 20);
        assert_eq!(
            bounded(&limits, 1, RATIO_FROM + (1 << 20), 1),
            Ok(RATIO_FROM + (1 << 20))
        );
        let error = bounded(&limits, 0, RATIO_FROM + (2 << 20), 1).unwrap_err();
        assert!(
            error.contains("more than 1 MiB") && error.contains("--max-size"),
            "{error}"
        );
    }

    #[test]
    fn zeroes_are_told_from_others() {
        for len in [0, 1, 15, 16, 17, 4096] {
            let mut data = vec![0; len];
            assert!(is_zero(&data));
            if let Some(last) = data.last_mut() {
                *last = 1;
                assert!(!is_zero(&data), "{len}");
            }
        }
    }
}
