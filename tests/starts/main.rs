//! Starts of VMs: those that fail, at every step, and very many at once. Guests are kernels of
//! a few instructions, so any KVM will do. Needs root, for namespaces and other users.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
mod helpers;
mod limits;
mod many;
mod processes;
mod refusals;
