//! What a log consists of.

use std::path::{Path, PathBuf};

/// A log's name in its folder.
pub const NAME: &str = "log";
/// How large a piece's header is.
pub const HEADER: usize = 21;
/// No writer makes longer ones.
pub const PIECE_MAX: usize = 1 << 20;
/// A piece's first byte has this if its data are in the middle of a line.
pub const CONTINUES: u8 = 0x80;

/// A piece of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// 1 for output, 2 for errors.
    pub stream: u8,
    /// When it was written: milliseconds since 1970.
    pub time_ms: u64,
    /// What was written.
    pub data: Vec<u8>,
}

/// The one before.
pub fn earlier(path: &Path) -> PathBuf {
    path.with_extension("1")
}
