//! What KVM refuses.

/// An ioctl that failed.
#[derive(Debug, thiserror::Error)]
#[error("KVM: {operation}")]
pub struct KvmError {
    pub(super) operation: &'static str,
    #[source]
    pub(super) source: kvm_ioctls::Error,
}

/// Names the operation that failed.
pub fn doing(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError { operation, source }
}
