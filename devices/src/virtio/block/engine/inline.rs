//! When transfers from and to the page cache are made at once, by the caller.
//!
//! What the page cache has is read without blocking (`RWF_NOWAIT`), by the caller itself. Several
//! file systems (ext4 among them) refuse buffered writes that must not block, and so a ring
//! hands each of them to a thread of the kernel's: two wake-ups for a copy that takes
//! microseconds. Here such a write is made by the caller. It may block, when the host has too
//! many dirty pages or must read the rest of one; so a turn whose transfers took long together
//! is followed by a pause, in which they are the ring's again. A caller thus spends a hundredth
//! of its time in writes that block, at most.

use std::io;
use std::time::{Duration, Instant};

use super::operation::{Kind, Operation};

/// How much is moved at once in a turn of the device, so that others have theirs.
const TURN_MAX: usize = 1 << 20;
/// The transfers of a turn that take longer together have blocked.
const LONG: Duration = Duration::from_millis(2);
/// The pause after it, in times of what it took.
const PAUSE: u32 = 100;

/// Decides which transfers are made at once.
#[derive(Debug, Default)]
pub struct Inline {
    /// How much may still be moved in this turn.
    left: usize,
    /// How long the transfers of this turn took.
    spent: Duration,
    /// The end of the pause after transfers that blocked.
    paused: Option<Instant>,
}

impl Inline {
    /// A turn begins.
    pub fn begin(&mut self) {
        self.left = TURN_MAX;
        self.spent = Duration::ZERO;
    }

    /// Makes a transfer, if it is one to make at once, and if that can be.
    pub fn run(
        &mut self,
        operation: &Operation,
        transfer: impl FnOnce() -> Option<io::Result<usize>>,
    ) -> Option<io::Result<usize>> {
        if !matches!(operation.kind, Kind::Read | Kind::Write { durable: false }) {
            return None;
        }
        let len = operation.len();
        if len > self.left {
            return None;
        }
        let start = Instant::now();
        if self.paused.is_some_and(|end| start < end) {
            return None;
        }
        let moved = transfer();
        self.took(start, start.elapsed());
        self.left = match &moved {
            Some(Ok(count)) => self.left.saturating_sub(*count),
            // What follows is probably as this one.
            _ => 0,
        };
        match moved {
            Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => None,
            moved => moved,
        }
    }

    /// A transfer began, and took a time.
    fn took(&mut self, start: Instant, time: Duration) {
        self.spent = self.spent.saturating_add(time);
        let pause = self.spent.saturating_mul(PAUSE);
        self.paused = (self.spent > LONG)
            .then(|| start.checked_add(pause))
            .flatten();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inline() -> Inline {
        let mut inline = Inline::default();
        inline.begin();
        inline
    }

    fn moves(inline: &mut Inline, kind: Kind, data: &mut [u8]) -> bool {
        let operation = Operation {
            kind,
            offset: 0,
            iovecs: vec![libc::iovec {
                iov_base: data.as_mut_ptr().cast(),
                iov_len: data.len(),
            }],
        };
        let done = inline.run(&operation, || Some(Ok(data.len())));
        done.is_some_and(|moved| moved.unwrap() == data.len())
    }

    const PIECE: usize = 64 << 10;
    const WRITE: Kind = Kind::Write { durable: false };

    #[test]
    fn a_turn_moves_so_much_at_once() {
        let mut inline = inline();
        let mut large = vec![1; PIECE];
        for _ in 0..TURN_MAX / PIECE {
            assert!(moves(&mut inline, WRITE, &mut large));
        }
        assert!(!moves(&mut inline, WRITE, &mut large[..512]));
        inline.begin();
        assert!(moves(&mut inline, Kind::Read, &mut large[..512]));
        // What cannot be done at once is the last that is tried in its turn.
        let read = Operation {
            kind: Kind::Read,
            offset: 0,
            iovecs: Vec::new(),
        };
        assert!(inline.run(&read, || None).is_none());
        assert!(!moves(&mut inline, Kind::Read, &mut large[..512]));
    }

    #[test]
    fn only_transfers_are_made_at_once() {
        let mut inline = inline();
        let durable = Kind::Write { durable: true };
        for kind in [durable, Kind::Flush, Kind::Discard { len: 512 }] {
            assert!(!moves(&mut inline, kind, &mut [1; 512]), "{kind:?}");
        }
        assert!(moves(&mut inline, WRITE, &mut [1; 512]));
    }

    #[test]
    fn after_a_write_that_blocked_there_is_a_pause() {
        let mut inline = inline();
        let now = Instant::now();
        inline.took(now, Duration::from_secs(1));
        assert!(!moves(&mut inline, WRITE, &mut [1; 512]));
        assert_eq!(inline.paused, Some(now + Duration::from_secs(100)));
        inline.begin();
        inline.took(now, LONG);
        assert!(moves(&mut inline, WRITE, &mut [1; 512]));
    }

    #[test]
    fn many_quick_writes_of_a_turn_are_a_long_one() {
        let mut inline = inline();
        let now = Instant::now();
        for _ in 0..3 {
            assert!(inline.paused.is_none());
            inline.took(now, LONG / 2);
        }
        assert!(!moves(&mut inline, WRITE, &mut [1; 512]));
        assert_eq!(inline.paused, Some(now + LONG / 2 * 3 * PAUSE));
    }
}
