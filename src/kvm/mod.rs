//! The only users of KVM's ioctls.

pub mod accept;
pub mod base;
pub mod cpuid;
mod error;
pub mod features;
pub mod gate;
pub mod memory;
pub mod msr;
mod open;
pub mod probe;
pub mod reclaim;
pub mod state;
pub mod vcpu;
pub mod vm;

pub use self::error::KvmError;
pub use self::open::open;
