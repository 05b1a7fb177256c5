//! What the guest's agent shares with the host: the words they use.

#![forbid(unsafe_code)]

pub mod protocol;
