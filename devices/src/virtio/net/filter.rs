//! What may stand between a guest and its network.

use std::time::Instant;

/// What becomes of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Pass,
    /// It is lost.
    Drop,
    /// It is lost, and who sent it gets this frame.
    Answer(Vec<u8>),
}

/// Judges Ethernet frames. Those that it sees are copies: the guest cannot
/// change them any more.
pub trait FrameFilter: Send {
    /// The guest sends a frame.
    fn outgoing(&mut self, frame: &[u8], now: Instant) -> Verdict;

    /// The network sends one to the guest; false if it is lost.
    fn incoming(&mut self, frame: &[u8], now: Instant) -> bool;

    /// When [`take_due`](Self::take_due) returns the next frame, if there will be one.
    fn next_due(&self) -> Option<Instant> {
        None
    }

    /// Takes a frame of its own for the guest, of those that are due.
    fn take_due(&mut self, _now: Instant) -> Option<Vec<u8>> {
        None
    }

    /// What it has counted, by name.
    fn counters(&self) -> Vec<(&'static str, u64)>;
}
