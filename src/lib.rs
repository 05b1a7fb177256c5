//! mayfly: a hosted virtual machine monitor on KVM for x86-64 Linux.
//!
//! `ARCHITECTURE.md` has the map.

#![cfg_attr(
    not(test),
    deny(
        clippy::cast_lossless,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss
    )
)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod arguments;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod data_folder;
pub mod disk_lock;
pub mod doctor;
pub mod failure;
pub mod guests;
pub mod helper;
pub mod kvm;
pub mod link;
pub mod logging;
pub mod metrics;
pub mod net;
pub mod progress_bars;
pub mod run;
pub mod signals;
pub mod snapshot;
pub mod spec;
pub mod supervisor;
pub mod timing;
pub mod unix_socket;
pub mod virtiofsd;
pub mod vmm;
pub mod volume;
pub mod vsock;
