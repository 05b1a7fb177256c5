//! Where clusters of a qcow2 image lie that have their data in the file as they are, and that
//! may be written to there. They are remembered from requests that had to ask the image's
//! tables, so that the next ones need not.

use std::sync::{Mutex, PoisonError};

/// How many clusters are remembered: 1 GiB of those of 64 KiB.
const SLOTS: usize = 16 << 10;

/// Clusters, each in the slot that its number names.
#[derive(Debug)]
pub struct PlainClusters {
    /// The size of a cluster, a power of two.
    cluster: u64,
    /// The number of the disk's cluster and its offset in the file; none before the first.
    slots: Mutex<Vec<Option<(u64, u64)>>>,
}

impl PlainClusters {
    pub fn new(cluster: u64) -> Self {
        PlainClusters {
            cluster,
            slots: Mutex::default(),
        }
    }

    fn slot(number: u64) -> usize {
        usize::try_from(number % SLOTS as u64).unwrap_or(0)
    }

    /// Remembers the clusters of `len` bytes of the disk, which lie in one piece in a file of
    /// `size` bytes; what ends behind the file's end is none.
    pub fn add(&self, at: u64, offset: u64, len: u64, size: u64) {
        let inside = at % self.cluster;
        let (Some(offset), Some(end)) = (offset.checked_sub(inside), at.checked_add(len)) else {
            return;
        };
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.resize(SLOTS, None);
        let first = at / self.cluster;
        for number in first..end.div_ceil(self.cluster) {
            let start = (number - first)
                .checked_mul(self.cluster)
                .and_then(|behind| offset.checked_add(behind));
            let Some(start) = start else { return };
            let whole = start
                .checked_add(self.cluster)
                .is_some_and(|end| end <= size);
            if let Some(slot) = slots.get_mut(Self::slot(number)).filter(|_| whole) {
                *slot = Some((number, start));
            }
        }
    }

    /// Where `len` bytes of the disk lie, if they are remembered and lie in one piece.
    pub fn find(&self, at: u64, len: u64) -> Option<u64> {
        let (first, inside) = (at / self.cluster, at % self.cluster);
        let end = at.checked_add(len)?;
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let start_of = |number: u64| {
            let (known, start) = (*slots.get(Self::slot(number))?)?;
            (known == number).then_some(start)
        };
        let start = start_of(first)?;
        let in_one_piece = (first + 1..end.div_ceil(self.cluster))
            .all(|number| start_of(number) == Some(start + (number - first) * self.cluster));
        in_one_piece.then_some(start + inside)
    }

    /// Forgets all.
    pub fn clear(&self) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u64 = 1 << 16;

    #[test]
    fn ranges_are_found_that_lie_in_one_piece() {
        let clusters = PlainClusters::new(CLUSTER);
        assert_eq!(clusters.find(0, 512), None);
        // Two clusters and a part of a third, in one piece; and one elsewhere.
        clusters.add(CLUSTER + 512, 10 * CLUSTER + 512, 2 * CLUSTER, 1 << 30);
        clusters.add(4 * CLUSTER, 20 * CLUSTER, 512, 1 << 30);
        for (at, len, found) in [
            (CLUSTER, 512, Some(10 * CLUSTER)),
            (CLUSTER + 512, 3 * CLUSTER - 512, Some(10 * CLUSTER + 512)),
            (3 * CLUSTER, CLUSTER, Some(12 * CLUSTER)),
            (4 * CLUSTER + 1024, 512, Some(20 * CLUSTER + 1024)),
            // Into a cluster that is not known, or that lies elsewhere.
            (3 * CLUSTER, CLUSTER + 512, None),
            (4 * CLUSTER, CLUSTER + 512, None),
            (CLUSTER - 512, 1024, None),
            (u64::MAX, 512, None),
        ] {
            assert_eq!(clusters.find(at, len), found, "{at:#x} {len:#x}");
        }
        // Another takes the slot.
        let far = CLUSTER * (1 + SLOTS as u64);
        clusters.add(far, 30 * CLUSTER, 512, 1 << 30);
        assert_eq!(clusters.find(CLUSTER, 512), None);
        assert_eq!(clusters.find(far, 512), Some(30 * CLUSTER));
        clusters.clear();
        assert_eq!(clusters.find(far, 512), None);
    }

    #[test]
    fn what_does_not_lie_in_the_file_is_not_remembered() {
        let clusters = PlainClusters::new(CLUSTER);
        clusters.add(0, 2 * CLUSTER, 2 * CLUSTER, 4 * CLUSTER - 1);
        assert_eq!(clusters.find(0, CLUSTER), Some(2 * CLUSTER));
        assert_eq!(clusters.find(CLUSTER, 512), None);
        // Nor what lies nowhere.
        let far = 9 * CLUSTER;
        for (at, offset) in [(far + 512, 0), (u64::MAX, 0), (far, u64::MAX)] {
            clusters.add(at, offset, 512, u64::MAX);
            assert_eq!(clusters.find(at, 512), None, "{at:#x} {offset:#x}");
        }
    }
}
