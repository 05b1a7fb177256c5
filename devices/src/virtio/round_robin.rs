//! Which of several queues is next, so that none starves when a device has
//! room or budget for only some chains.

/// The most queues of one.
pub const ROUND_ROBIN_MAX: usize = u64::BITS as usize;

/// The queues that may have chains, and whose turn it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundRobin {
    /// A bit for each.
    waiting: u64,
    last: u32,
}

impl RoundRobin {
    /// A queue may have chains.
    pub fn add(&mut self, queue: usize) {
        if queue < ROUND_ROBIN_MAX {
            self.waiting |= 1 << queue;
        }
    }

    /// A queue has no more, or will tell.
    pub fn remove(&mut self, queue: usize) {
        if queue < ROUND_ROBIN_MAX {
            self.waiting &= !(1 << queue);
        }
    }

    /// No queue waits.
    pub fn is_empty(&self) -> bool {
        self.waiting == 0
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
        let mut queues = RoundRobin::default();
        assert_eq!(queues.next(), None);
        for queue in [0, 3, 63, 64, 1000] {
            queues.add(queue);
        }
        let order: Vec<_> = (0..7).map_while(|_| queues.next()).collect();
        assert_eq!(order, [3, 63, 0, 3, 63, 0, 3]);
        queues.remove(63);
        queues.remove(64);
        assert_eq!((queues.next(), queues.next()), (Some(0), Some(3)));
        queues.remove(0);
        queues.remove(3);
        assert_eq!(queues.next(), None);
    }
}
