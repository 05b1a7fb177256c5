//! Part of a file, that several readers may have at once, and how a stream becomes one.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::limits::is_zero;
use super::progress::Task;

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
        Section::from_offset(file, 0)
    }

    /// What a file has from an offset on.
    pub fn from_offset(file: File, offset: u64) -> io::Result<Self> {
        let len = file.metadata()?.len().saturating_sub(offset);
        let file = Arc::new(file);
        Ok(Section { file, offset, len })
    }

    /// Keeps a stream in a nameless file of a directory. Zeroes become holes there.
    pub fn spooled(mut input: impl Read, directory: &Path, task: &dyn Task) -> io::Result<Self> {
        let mut out = HoleWriter::new(tempfile::tempfile_in(directory)?);
        let mut buffer = vec![0; 256 << 10];
        loop {
            let count = match input.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                count => count?,
            };
            if count == 0 {
                break;
            }
            out.write_all(buffer.get(..count).unwrap_or_default())?;
            task.advance(count as u64);
        }
        Section::whole(out.finish()?)
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

    /// The length in bytes.
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
}

/// Reads a [`Section`].
pub struct SectionReader {
    section: Section,
    position: u64,
}

impl SectionReader {
    /// The number of bytes that were read.
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

/// Writes a file in which zeroes are holes.
struct HoleWriter {
    file: File,
    len: u64,
}

/// Smaller holes save nothing.
const HOLE_MIN: usize = 4096;

impl HoleWriter {
    fn new(file: File) -> Self {
        HoleWriter { file, len: 0 }
    }

    fn finish(mut self) -> io::Result<File> {
        self.file.set_len(self.len)?;
        self.file.rewind()?;
        Ok(self.file)
    }
}

impl Write for HoleWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        // Pieces that are all zeroes, or all others: one of them at a time.
        let mut chunks = data.chunks(HOLE_MIN);
        let hole = chunks.next().is_some_and(is_zero);
        let more = chunks.take_while(|chunk| is_zero(chunk) == hole);
        let count = more.fold(data.len().min(HOLE_MIN), |sum, chunk| {
            sum.saturating_add(chunk.len())
        });
        let end = self.len.saturating_add(count as u64);
        match hole {
            true => drop(self.file.seek(SeekFrom::Start(end))?),
            false => self.file.write_all(data.get(..count).unwrap_or_default())?,
        }
        self.len = end;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::progress::Quiet;

    #[test]
    fn a_part_ends_where_it_ends() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let whole = Section::whole(file).unwrap();
        let mut text = String::new();
        let part = whole.part(2, 3).unwrap();
        let inner = part.part(1, 2).unwrap();
        inner.reader().read_to_string(&mut text).unwrap();
        assert_eq!(text, "34");
        assert!(part.part(1, 3).is_none() && part.part(u64::MAX, 1).is_none());
    }

    #[test]
    fn zeroes_of_a_stream_take_no_disk() {
        let directory = tempfile::tempdir().unwrap();
        let parts = [
            b"start".to_vec(),
            vec![0; 20 << 20],
            b"middle".repeat(5000),
            vec![0; 1 << 20],
        ];
        let data = parts.concat();
        let section = Section::spooled(data.as_slice(), directory.path(), &Quiet).unwrap();
        let mut found = Vec::new();
        section.reader().read_to_end(&mut found).unwrap();
        assert_eq!(found, data);
        let used = section.file.metadata().unwrap().blocks() * 512;
        assert!(used < 1 << 20, "{used} bytes");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
