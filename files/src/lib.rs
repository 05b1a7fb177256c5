//! Folders of a user's whose files come whole or not at all, and locks on them.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod directory;
pub mod lock;

pub use directory::{Directory, Work, sync_parent};
