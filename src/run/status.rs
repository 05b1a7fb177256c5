//! Statuses that `mayfly run` exits with where the command's own is not known.

/// mayfly itself failed, or the command could not be started.
pub const STATUS_FAILED: u8 = 125;
/// The time was over.
pub const STATUS_TIMEOUT: u8 = 124;
/// What is added to the number of a signal.
pub const SIGNALLED: u8 = 128;

/// The status of what a signal ended.
pub fn signalled(signal: i32) -> u8 {
    u8::try_from(signal).map_or(u8::MAX, |signal| SIGNALLED.saturating_add(signal))
}
