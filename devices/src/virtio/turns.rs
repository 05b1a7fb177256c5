//! Which of several queues is next, so that none starves when a device has
//! room or budget for only some chains.

/// The most queues that take turns.
pub const TURNS_MAX: usize = u64::BITS as usize;

/// The queues that may have chains, and whose turn it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turns {
    /// A bit for each.
    waiting: u64,
    last: u32,
}

impl Turns {
    /// A queue may have chains.
    pub fn add(&mut self, queue: usize) {
        if queue < TURNS_MAX {
            self.waiting |= 1 << queue;
        }
    }

    /// A queue has no more, or will tell.
    pub fn remove(&mut self, queue: usize) {
        if queue < TURNS_MAX {
            self.waiting &= !(1 << queue);
        }
    }

    /// The next queue in turn.
    pub fn next(&mut self) -> Option<usize> {
        if self.waiting == 0 {
            return None;
        }
        // The lowest bit above the last one, or the lowest of all.
        let from = self.last + 1;
        let ahead = self.waiting.rotate_right(from).trailing_zeros();
        self.last = (from + ahead) % u64::BITS;
        Some(self.last as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_have_their_turn() {
        let mut turns = Turns::default();
        assert_eq!(turns.next(), None);
        for queue in [0, 3, 63, 64, 1000] {
            turns.add(queue);
        }
        let order: Vec<_> = (0..7).map_while(|_| turns.next()).collect();
        assert_eq!(order, [3, 63, 0, 3, 63, 0, 3]);
        turns.remove(63);
        turns.remove(64);
        assert_eq!((turns.next(), turns.next()), (Some(0), Some(3)));
        turns.remove(0);
        turns.remove(3);
        assert_eq!(turns.next(), None);
    }
}
