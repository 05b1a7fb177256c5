//! A blob on its way: the file that gets longer, and how long that may take.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::digest::Hasher;
use crate::section::Section;

/// A connection that brings less in such a time does not bring an image.
const PACE_TIME: Duration = Duration::from_secs(60);
/// The bytes that must come in that time.
pub const PACE_MIN: u64 = 60 << 10;

/// When something must be done, and how long there was for it.
#[derive(Clone, Copy)]
pub struct Deadline {
    end: Option<Instant>,
    time: Duration,
}

impl Deadline {
    /// A deadline this long from now on.
    pub fn after(time: Duration) -> Self {
        let end = Instant::now().checked_add(time);
        Deadline { end, time }
    }

    /// Says that it has passed.
    pub fn passed(&self) -> Option<String> {
        let passed = self.end.is_some_and(|end| Instant::now() >= end);
        passed.then(|| {
            format!(
                "took more than {} s (--timeout of mayfly image pull); what has come is kept for \
                 the next pull",
                self.time.as_secs()
            )
        })
    }
}

/// The pace at which bytes come.
pub struct Pace {
    since: Instant,
    bytes: u64,
}

impl Pace {
    /// From now on.
    pub fn new(now: Instant) -> Self {
        Pace {
            since: now,
            bytes: 0,
        }
    }

    /// Counts bytes that came; false if too few come.
    pub fn goes_on(&mut self, bytes: u64, now: Instant) -> bool {
        self.bytes = self.bytes.saturating_add(bytes);
        if now.saturating_duration_since(self.since) < PACE_TIME {
            return true;
        }
        let enough = self.bytes >= PACE_MIN;
        *self = Pace::new(now);
        enough
    }
}

/// A file that gets longer, and its digest.
pub struct Target {
    file: File,
    path: PathBuf,
    /// The digest of what came.
    pub hasher: Hasher,
    /// The number of bytes that came.
    pub have: u64,
}

impl Target {
    /// Reads what is there.
    pub fn resume(file: File, path: &Path, size: u64) -> io::Result<Self> {
        let mut target = Target {
            file,
            path: path.to_owned(),
            hasher: Hasher::new(),
            have: 0,
        };
        let there = target.file.metadata()?.len();
        if there > size {
            target.restart()?;
            return Ok(target);
        }
        let mut buffer = vec![0; 256 << 10];
        loop {
            let count = target.file.read_at(&mut buffer, target.have)?;
            if count == 0 {
                return Ok(target);
            }
            target
                .hasher
                .update(buffer.get(..count).unwrap_or_default());
            target.have = target.have.saturating_add(count as u64);
        }
    }

    /// Begins anew, in another file: others may read this one, which was whole to them.
    pub fn restart(&mut self) -> io::Result<()> {
        let file = tempfile::NamedTempFile::new_in(self.path.parent().unwrap_or(Path::new(".")))?;
        file.as_file().lock()?;
        self.file = file.persist(&self.path).map_err(|error| error.error)?;
        self.hasher = Hasher::new();
        self.have = 0;
        Ok(())
    }

    /// All that came. Others may have it too: who holds a blob must not wait for another.
    pub fn finish(self) -> io::Result<Section> {
        self.file.sync_data()?;
        self.file.unlock()?;
        Section::whole(self.file)
    }

    pub fn write(&mut self, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.have)?;
        self.hasher.update(data);
        self.have = self.have.saturating_add(data.len() as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// A second pull, of a manifest that lies about the length, begins the blob anew.
    #[test]
    fn who_reads_a_blob_keeps_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("blob");
        std::fs::write(&path, "genuine").unwrap();
        let open = || {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            file.lock().unwrap();
            file
        };
        let read = |section: &Section| {
            let mut text = String::new();
            section.reader().read_to_string(&mut text).unwrap();
            text
        };
        let whole = Target::resume(open(), &path, 7).unwrap();
        assert_eq!(whole.have, 7);
        let reader = whole.finish().unwrap();
        let mut other = Target::resume(open(), &path, 3).unwrap();
        assert_eq!(other.have, 0);
        other.write(b"bad").unwrap();
        assert_eq!(read(&reader), "genuine");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "bad");
        // Nobody else begins with it meanwhile.
        assert!(File::open(&path).unwrap().try_lock().is_err());
        assert_eq!(read(&other.finish().unwrap()), "bad");
        assert!(File::open(&path).unwrap().try_lock().is_ok());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_comes_too_slowly_is_told() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut pace = Pace::new(start);
        assert!(pace.goes_on(1, after(59)));
        assert!(pace.goes_on(PACE_MIN, after(60)));
        assert!(pace.goes_on(PACE_MIN - 1, after(119)));
        assert!(!pace.goes_on(0, after(120)));
        let deadline = Deadline::after(Duration::ZERO);
        assert!(deadline.passed().unwrap().contains("--timeout"));
        assert!(Deadline::after(Duration::MAX).passed().is_none());
    }
}
