//! The only users of KVM's ioctls.

pub mod accept;
pub mod base;
pub mod cpuid;
pub mod gate;
pub mod memory;
pub mod msr;
mod open;
pub mod probe;
pub mod reclaim;
pub mod state;
pub mod vcpu;
pub mod vm;

pub use self::open::open;

/// An ioctl that failed.
#[derive(Debug, thiserror::Error)]
#[error("KVM: {operation}")]
pub struct KvmError {
    operation: &'static str,
    #[source]
    source: kvm_ioctls::Error,
}

/// Names the operation that failed.
fn doing(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError { operation, source }
}
