//! What the guest touches while it runs.
//!
//! The crate knows neither KVM nor any path: a device is given its host
//! resources opened, and event descriptors to interrupt by. Each keeps its
//! guest-visible state in one plain serialisable struct.

#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::string_slice))]
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

pub mod bus;
pub mod char_device;
pub mod cmos;
pub mod ged;
pub mod i8042;
pub mod mailbox;
mod number;
pub mod platform;
pub mod poll;
pub mod pvpanic;
pub mod rate_limiter;
pub mod serial;
pub mod snapshot_port;
pub mod virtio;
pub mod vmgenid;
pub mod watchdog;
