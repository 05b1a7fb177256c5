//! Who is next: a seeded, random order, so that a drift of the machine hits all alike.

/// Steele, Lea and Flood's SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number below `bound`, all equally likely as far as 64 bits go.
    fn below(&mut self, bound: usize) -> usize {
        let product = u128::from(self.next()) * bound as u128;
        usize::try_from(product >> 64).unwrap_or(0)
    }
}

/// Rounds in which each of `count` comes once, in an order of its own.
pub fn rounds(seed: u64, count: usize, rounds: u32) -> Vec<Vec<usize>> {
    let mut random = Random(seed);
    let round = |_| {
        let mut order: Vec<usize> = (0..count).collect();
        for last in (1..count).rev() {
            order.swap(last, random.below(last + 1));
        }
        order
    };
    (0..rounds).map(round).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_order() {
        assert_eq!(rounds(7, 5, 20), rounds(7, 5, 20));
        assert_ne!(rounds(7, 5, 20), rounds(8, 5, 20));
    }

    #[test]
    fn each_comes_once_a_round_and_everywhere_alike() {
        const COUNT: usize = 4;
        let mut firsts = [0; COUNT];
        for mut round in rounds(1, COUNT, 4000) {
            firsts[round[0]] += 1;
            round.sort_unstable();
            assert_eq!(round, [0, 1, 2, 3]);
        }
        // A thousand each, with a deviation of 27.
        assert!(
            firsts.iter().all(|it| (850..1150).contains(it)),
            "{firsts:?}"
        );
    }
}
