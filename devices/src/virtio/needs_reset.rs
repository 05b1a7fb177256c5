//! Why a device cannot go on.

/// The guest broke the rules, or a backend failed, in a way that the device cannot
/// go on: it needs to be reset (virtio 1.2, 2.1.1, `DEVICE_NEEDS_RESET`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("needs a reset: {0}")]
pub struct NeedsReset(pub &'static str);
