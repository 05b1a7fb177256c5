//! The guests that VMs boot where the user names no kernel: each a kernel, its initial
//! RAM disks, and mayfly's programs in them. One of them is the default.
//!
//! This is the only module that knows where their files are and what they are called.

mod make;
mod sources;
mod store;

pub use self::make::{MakeOptions, ensure_default};
pub use self::store::{Guest, Guests, cache_folder};
