//! `mayfly compare` without a VM: real processes and containers on this host.
//!
//! Run by scripts/test, as root, one by one. Engines with VMs are compared in
//! `tests/guests/compare.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, unsafe_code)]

mod common;
mod ends;
mod failures;
mod figures;
mod hosts;
