//! Folders of a user's whose files come whole or not at all, and locks on them.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod directory;
pub mod lock;
mod new_file;

pub use directory::{Directory, Work, sync_parent};
pub use new_file::NewFile;
