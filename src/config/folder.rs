//! A folder of the host's, for `mayfly run`.

use std::path::PathBuf;

/// A folder that the guest shares with the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderConfig {
    /// Where it is: absolute, without links.
    pub path: PathBuf,
    /// What the guest finds it by.
    pub tag: String,
    /// The guest may not write.
    pub read_only: bool,
    /// What the user wrote, for messages.
    pub flag: String,
}
