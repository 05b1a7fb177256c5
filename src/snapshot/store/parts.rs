//! The files of a snapshot as blocks, without those that are all zeroes: so they are
//! exported, and so their digests are made. Where a file has holes makes no difference.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use mayfly_image::{Digest, Hasher};

use super::super::memory::data_ranges;

/// The length of a block in bytes; a file's last one may be shorter.
pub const BLOCK: u64 = 64 << 10;
/// The same, as a size in memory.
pub const BLOCK_SIZE: usize = 64 << 10;

/// Makes the digest of a file: SHA-256 of each block that is not all zeroes, with its
/// offset before it, and then of the file's length.
pub struct PartHasher(Hasher);

impl PartHasher {
    /// Of a file without blocks yet.
    pub fn new() -> Self {
        PartHasher(Hasher::new())
    }

    /// Adds the next block.
    pub fn block(&mut self, offset: u64, content: &[u8]) {
        self.0.update(&offset.to_le_bytes());
        self.0.update(content);
    }

    /// The digest of a file of a length in bytes.
    pub fn finish(mut self, len: u64) -> Digest {
        self.0.update(&len.to_le_bytes());
        self.0.finish()
    }
}

/// Calls a function with each block of a file that is not all zeroes, and its offset.
pub fn each_block<E: From<io::Error>>(
    file: &File,
    len: u64,
    mut called: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; BLOCK_SIZE];
    let mut next = 0;
    for data in data_ranges(file, 0..len) {
        let data = data?;
        // A block that the range before ends in has been there already.
        let mut offset = (data.start / BLOCK * BLOCK).max(next);
        while offset < data.end {
            let size = usize::try_from(BLOCK.min(len - offset)).unwrap_or(BLOCK_SIZE);
            let block = buffer.get_mut(..size).unwrap_or_default();
            file.read_exact_at(block, offset)?;
            if !is_zero(block) {
                called(offset, block)?;
            }
            offset += BLOCK;
        }
        next = offset;
    }
    Ok(())
}

/// The digest of a file's first bytes, up to a length.
pub fn digest(file: &File, len: u64) -> io::Result<Digest> {
    let mut hasher = PartHasher::new();
    each_block(file, len, |offset, block| {
        hasher.block(offset, block);
        io::Result::Ok(())
    })?;
    Ok(hasher.finish(len))
}

/// Whether a block is all zeroes.
pub fn is_zero(block: &[u8]) -> bool {
    static ZEROES: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
    // As the C library compares: many bytes at a time.
    ZEROES.get(..block.len()) == Some(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(file: &File, len: u64) -> Vec<(u64, usize)> {
        let mut found = Vec::new();
        each_block(file, len, |offset, block| {
            found.push((offset, block.len()));
            io::Result::Ok(())
        })
        .unwrap();
        found
    }

    #[test]
    fn holes_make_no_difference() {
        let len = 5 * BLOCK + 100;
        let sparse = tempfile::tempfile().unwrap();
        sparse.set_len(len).unwrap();
        let dense = tempfile::tempfile().unwrap();
        dense.write_all_at(&vec![0; len as usize], 0).unwrap();
        for file in [&sparse, &dense] {
            // Two pages of one block, the end of a block and the start of the next, the end.
            for at in [0, 0x8000, 3 * BLOCK - 1, 3 * BLOCK, len - 1] {
                file.write_all_at(&[1], at).unwrap();
            }
            let expected = [
                (0, BLOCK),
                (2 * BLOCK, BLOCK),
                (3 * BLOCK, BLOCK),
                (5 * BLOCK, 100),
            ];
            let expected = expected.map(|(at, size)| (at, size as usize));
            assert_eq!(blocks(file, len), expected);
        }
        let one = digest(&sparse, len).unwrap();
        assert_eq!(digest(&dense, len).unwrap(), one);
        dense.write_all_at(&[2], 4 * BLOCK).unwrap();
        assert_ne!(digest(&dense, len).unwrap(), one);
        assert_ne!(digest(&sparse, len - 1).unwrap(), one);
        sparse.set_len(len + 1).unwrap();
        assert_ne!(digest(&sparse, len + 1).unwrap(), one);
    }
}
