//! A table of bounded size whose entries end by themselves.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Of a full table, this part is emptied at least.
const SHARE: usize = 16;

/// Entries, and when they end.
pub struct Table<K> {
    entries: HashMap<K, Instant>,
    max: usize,
}

impl<K: Copy + Eq + Hash> Table<K> {
    /// A table of at most `max` entries.
    pub fn new(max: usize) -> Self {
        Table {
            entries: HashMap::new(),
            max,
        }
    }

    /// The entry is there.
    pub fn has(&self, key: &K, now: Instant) -> bool {
        self.entries.get(key).is_some_and(|&end| now < end)
    }

    /// Adds an entry, or lets one that is there last longer. In a full table
    /// those that end next make room: several at once, as a guest can fill it
    /// again and again.
    pub fn keep(&mut self, key: K, now: Instant, time: Duration) {
        let end = now + time;
        if let Some(known) = self.entries.get_mut(&key) {
            *known = end.max(*known);
            return;
        }
        if self.entries.len() >= self.max {
            let mut ends: Vec<Instant> = self.entries.values().copied().collect();
            let (_, last, _) = ends.select_nth_unstable(self.max / SHARE);
            let last = now.max(*last);
            self.entries.retain(|_, end| *end > last);
        }
        self.entries.insert(key, end);
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_end_and_make_room() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut table = Table::new(3);
        for key in 0..3 {
            table.keep(key, now, second * (key + 1));
        }
        assert!(table.has(&0, now) && !table.has(&0, now + second));
        table.keep(0, now, second * 9);
        table.keep(3, now, second * 4);
        // 1 was the next to end.
        assert_eq!(
            [0, 1, 2, 3].map(|key| table.has(&key, now)),
            [true, false, true, true]
        );
        table.keep(4, now + second * 5, second);
        assert_eq!(table.len(), 2);
        // A shorter time does not shorten.
        table.keep(0, now, second);
        assert!(table.has(&0, now + second * 8));
    }
}
