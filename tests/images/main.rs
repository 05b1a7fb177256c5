//! Images made, pushed and packed by other programs, and what mayfly makes of them.
//! Run by scripts/test, as root: file systems are mounted, in namespaces of our own.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod archives;
mod common;
mod fake;
mod foreign;
mod output;
mod pulls;
mod stores;
