//! What the guest's agent shares with the host: the words they use, and the
//! copying of files.

#![forbid(unsafe_code)]

pub mod copy;
pub mod protocol;
