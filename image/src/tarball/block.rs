//! Archives are blocks.

/// The size of a block.
pub const BLOCK: usize = 512;

/// How many bytes follow `len` bytes to the end of a block.
pub fn padding(len: u64) -> u64 {
    len.wrapping_neg() % BLOCK as u64
}
