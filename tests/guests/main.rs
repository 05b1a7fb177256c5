//! Real Debian kernels in real VMs. `scripts/test` runs this where KVM can run
//! Linux: on the host, or in the software lab. It needs root, for namespaces.

#![allow(unsafe_code, clippy::unwrap_used, missing_docs)]

mod balloon;
mod boots;
mod compare;
mod consoles;
mod control;
mod copies;
mod disks;
mod distro;
mod endings;
mod examples;
mod flags;
mod hostile;
mod installed;
mod limits;
mod memory;
mod nets;
mod platform;
mod readme;
mod real;
mod refusals;
mod run;
mod sandbox;
mod system;
mod user_nets;
mod volumes;
mod vsock;
mod warm;
