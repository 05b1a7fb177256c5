//! VMs that end at any moment, and in any way, with guests of a few instructions, so that
//! there can be many. They need /dev/kvm, but none that runs Linux.

#![allow(unsafe_code, clippy::unwrap_used, missing_docs)]

#[path = "../processes/mod.rs"]
mod processes;
#[path = "../tiny/mod.rs"]
mod tiny;

mod ends;
