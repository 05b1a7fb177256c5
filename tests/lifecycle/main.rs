//! VMs that end at any moment, and in any way, with guests of a few instructions, so that
//! there can be many. They need /dev/kvm, but none that runs Linux.

#![allow(clippy::unwrap_used, missing_docs)]

mod ends;
mod paths;
mod secrets;
mod snapshots;
