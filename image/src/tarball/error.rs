//! Why an archive is refused.

use std::io;

/// The reason why an archive is refused.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It ends too early.
    #[error("the archive is cut off")]
    Truncated,
    /// It is no tar archive, or a broken one.
    #[error("not a tar archive, or a broken one: {0}")]
    Malformed(&'static str),
    /// Something in it cannot be.
    #[error("{}: {why}", show(.path))]
    Entry {
        /// Its name.
        path: Vec<u8>,
        /// The reason, as the end of a sentence.
        why: String,
    },
    /// It is not what it was when it was checked.
    #[error("the archive changed while it was read")]
    Changed,
    /// It unpacks to too much.
    #[error("the archive holds too much: {0}")]
    TooMuch(String),
}

impl ArchiveError {
    /// What decoders call an end that they did not expect is an archive that is cut off.
    pub fn plainly(self) -> Self {
        match self {
            ArchiveError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                ArchiveError::Truncated
            }
            error => error,
        }
    }

    /// About an entry.
    pub fn entry(path: &[u8], why: impl Into<String>) -> Self {
        ArchiveError::Entry {
            path: path.to_vec(),
            why: why.into(),
        }
    }
}

/// A name of any bytes, for a message.
pub fn show(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    text.chars()
        .take(200)
        .flat_map(char::escape_debug)
        .collect()
}
