//! Figures of samples, as pure functions.

use serde::{Deserialize, Serialize};

/// What a set of times has in common, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The number of samples.
    pub count: u32,
    /// The middle one, or the mean of both.
    pub median: u64,
    /// The arithmetic mean.
    pub mean: f64,
    /// The sample standard deviation; 0 of one.
    pub deviation: f64,
    /// The least.
    pub min: u64,
    /// The greatest.
    pub max: u64,
    /// 95 of 100 are not greater (nearest rank).
    pub p95: u64,
    /// 99 of 100 are not greater (nearest rank).
    pub p99: u64,
    /// How many lie further from the median than 3.5 times the median of such distances,
    /// in units of a normal distribution's standard deviation.
    pub outliers: u32,
}

/// A normal distribution's standard deviation, by the median of distances from its median.
const SIGMA_BY_MAD: f64 = 1.4826;
/// Outliers begin there, in standard deviations (Iglewicz and Hoaglin's figure).
const FAR: f64 = 3.5;

impl Summary {
    /// Of all of them; nothing of none.
    pub fn of(times: &[u64]) -> Option<Summary> {
        let mut sorted = times.to_vec();
        sorted.sort_unstable();
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let count = sorted.len();

        let median = middle(&sorted)?;
        let sum: u128 = sorted.iter().copied().map(u128::from).sum();
        let mean = sum as f64 / count as f64;
        let squares: f64 = sorted.iter().map(|&it| square(it as f64 - mean)).sum();
        let deviation = match count {
            1 => 0.0,
            _ => (squares / (count - 1) as f64).sqrt(),
        };
        let far = FAR * spread(&sorted);
        let outliers = sorted
            .iter()
            .filter(|it| it.abs_diff(median) as f64 > far)
            .count();

        Some(Summary {
            count: count.try_into().unwrap_or(u32::MAX),
            median,
            mean,
            deviation,
            min,
            max,
            p95: rank(&sorted, 95)?,
            p99: rank(&sorted, 99)?,
            outliers: outliers.try_into().unwrap_or(u32::MAX),
        })
    }
}

fn square(it: f64) -> f64 {
    it * it
}

/// The median of what is sorted.
fn middle(sorted: &[u64]) -> Option<u64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    match sorted.len() % 2 {
        1 => Some(upper),
        _ => Some(u64::midpoint(*sorted.get(sorted.len() / 2 - 1)?, upper)),
    }
}

/// The standard deviation as far as a few outliers do not matter to it.
fn spread(sorted: &[u64]) -> f64 {
    let Some(median) = middle(sorted) else {
        return 0.0;
    };
    let mut distances: Vec<u64> = sorted.iter().map(|it| it.abs_diff(median)).collect();
    distances.sort_unstable();
    SIGMA_BY_MAD * middle(&distances).unwrap_or(0) as f64
}

/// What `percent` of 100 are not greater than, by the nearest rank.
fn rank(sorted: &[u64], percent: usize) -> Option<u64> {
    let rank = (sorted.len() as u128 * percent as u128).div_ceil(100);
    sorted
        .get(usize::try_from(rank).ok()?.checked_sub(1)?)
        .copied()
}

/// Fewer times say nothing of how noisy the machine was.
const ENOUGH: usize = 5;
/// More outliers than one in this number of samples are many.
const MANY_OUTLIERS: u32 = 10;
/// A deviation is large from this part of the median on.
const LARGE_DEVIATION: f64 = 0.25;
/// A drift is reported from this part of the median on,
const LARGE_DRIFT: f64 = 0.1;
/// and only if chance would rarely bring it about, in standard errors.
const SURE: f64 = 4.0;
/// The least samples on each side whose error can be estimated.
const ENOUGH_FOR_ERRORS: usize = 8;
/// With this number of samples, all of one side must be beyond all of the other: by chance,
/// as rarely as 2 in 252.
const ENOUGH_TO_PART: usize = 5;
/// The standard error of a median, by that of a mean.
const MEDIAN_BY_MEAN: f64 = 1.2533;

/// What makes an engine's times doubtful, in words. They are in the order in which they
/// were taken.
pub fn noise(engine: &str, times: &[u64]) -> Vec<String> {
    let mut warnings = Vec::new();
    let Some(all) = Summary::of(times).filter(|_| times.len() >= ENOUGH) else {
        return warnings;
    };
    let part = |of: f64| of / (all.median as f64).max(1.0);

    let many = all.count / MANY_OUTLIERS;
    if all.outliers > many.max(1) {
        warnings.push(format!(
            "{engine}: {} of {} runs lie far from the others. Something else was busy on this \
             machine; close it, or take more runs.",
            all.outliers, all.count
        ));
    }
    if part(all.deviation) > LARGE_DEVIATION {
        warnings.push(format!(
            "{engine}: times vary by {:.0} % of their median. Small differences to other \
             engines mean nothing.",
            100.0 * part(all.deviation)
        ));
    }

    let (early, late) = times.split_at(times.len() / 2);
    let [early, late] = [early, late].map(|half| {
        let mut half = half.to_vec();
        half.sort_unstable();
        half
    });
    if let (Some(before), Some(after)) = (middle(&early), middle(&late)) {
        let drift = before.abs_diff(after) as f64;
        if part(drift) > LARGE_DRIFT && drifted(&early, &late, drift) {
            let slower = if after > before { "slower" } else { "faster" };
            warnings.push(format!(
                "{engine}: the second half of the runs was {:.0} % {slower} than the first. The \
                 machine changed while it was measured (its clock rate, its heat, other work).",
                100.0 * drift / (before as f64).max(1.0)
            ));
        }
    }
    warnings
}

/// Whether chance would rarely bring about such a distance of two sorted halves' medians.
fn drifted(early: &[u64], late: &[u64], drift: f64) -> bool {
    let least = early.len().min(late.len());
    if least >= ENOUGH_FOR_ERRORS {
        let error = |half: &[u64]| square(MEDIAN_BY_MEAN * spread(half)) / half.len() as f64;
        return drift > SURE * (error(early) + error(late)).sqrt();
    }
    let beyond = |one: &[u64], other: &[u64]| one.last() < other.first();
    least >= ENOUGH_TO_PART && (beyond(early, late) || beyond(late, early))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn of_none_there_is_nothing_and_of_one_it_is_all() {
        assert_eq!(Summary::of(&[]), None);
        let of_one = Summary::of(&[7]).unwrap();
        let Summary {
            count,
            median,
            mean,
            deviation,
            min,
            max,
            p95,
            p99,
            outliers,
        } = of_one;
        assert_eq!((count, outliers), (1, 0));
        assert_eq!([median, min, max, p95, p99], [7; 5]);
        assert_eq!((mean, deviation), (7.0, 0.0));
    }

    /// The textbook's example of a deviation, in another order.
    #[test]
    fn known_answers() {
        let it = Summary::of(&[9, 4, 2, 5, 7, 4, 5, 4]).unwrap();
        assert_eq!((it.min, it.median, it.max, it.p95, it.p99), (2, 4, 9, 9, 9));
        assert_eq!(it.mean, 5.0);
        assert!((it.deviation - (32.0f64 / 7.0).sqrt()).abs() < 1e-12);

        let hundred: Vec<u64> = (1..=100).rev().collect();
        let it = Summary::of(&hundred).unwrap();
        assert_eq!((it.median, it.p95, it.p99, it.outliers), (50, 95, 99, 0));
        let it = Summary::of(&hundred[..20]).unwrap();
        assert_eq!((it.p95, it.p99), (99, 100));
    }

    /// The median of distances is 10, so that 3.5 deviations are 51.9.
    #[test]
    fn outliers_lie_beyond_three_and_a_half_deviations() {
        let of = |last| Summary::of(&[90, 90, 100, 100, 110, 110, last]).unwrap();
        assert_eq!(of(151).outliers, 0);
        assert_eq!(of(152).outliers, 1);
        // Without any spread, whatever differs does.
        assert_eq!(Summary::of(&[5, 5, 5, 5, 6]).unwrap().outliers, 1);
    }

    #[test]
    fn a_calm_machine_is_no_reason_to_warn() {
        let calm: Vec<u64> = (0..40).map(|it| 1000 + it * 7 % 30).collect();
        assert_eq!(noise("crun", &calm), [""; 0]);
        // One outlier in forty is life.
        let mut once = calm.clone();
        once[7] = 1200;
        assert_eq!(noise("crun", &once), [""; 0]);
        // Too few to tell.
        assert_eq!(noise("crun", &[1, 100, 10_000]), [""; 0]);
        assert_eq!(noise("crun", &[0; 40]), [""; 0]);
    }

    #[test]
    fn each_sort_of_noise_is_told() {
        let one = |times: &[u64]| match noise("crun", times).as_slice() {
            [one] => one.clone(),
            other => panic!("{other:?}"),
        };
        let calm: Vec<u64> = (0..40).map(|it| 1000 + it * 7 % 30).collect();

        let mut far = calm.clone();
        far.iter_mut().step_by(8).for_each(|it| *it = 1300);
        assert!(one(&far).starts_with("crun: 5 of 40 runs lie far"));

        let wild: Vec<u64> = (0..40).map(|it| 1000 + it * 377 % 2000).collect();
        assert!(one(&wild).contains("vary by"), "{}", one(&wild));

        let drifted: Vec<u64> = (0..40).map(|it| 1000 + it % 3 + it / 20 * 200).collect();
        assert!(one(&drifted).contains("second half of the runs was 20 % slower"));
        let hurried: Vec<u64> = drifted.iter().rev().copied().collect();
        assert!(one(&hurried).contains("17 % faster"), "{}", one(&hurried));
    }

    /// As many as there are by default.
    #[test]
    fn ten_runs_show_a_drift_if_the_halves_do_not_overlap() {
        let told = |times: &[u64]| {
            let all = noise("crun", times);
            all.into_iter().find(|it| it.contains("half of the runs"))
        };
        let drifted = [100, 103, 99, 104, 101, 121, 118, 125, 120, 119];
        assert!(told(&drifted).is_some_and(|it| it.contains("19 % slower")));
        let mut overlapping = drifted;
        overlapping[9] = 102;
        assert_eq!(told(&overlapping), None);
        // Four are too few for a half.
        assert_eq!(told(&drifted[1..]), None);
    }

    proptest! {
        #[test]
        fn figures_are_where_they_belong(mut times in proptest::collection::vec(any::<u64>(), 1..200)) {
            let it = Summary::of(&times).unwrap();
            let not_greater = |than| times.iter().filter(|&&it| it <= than).count();

            prop_assert_eq!(it.count as usize, times.len());
            prop_assert!(it.min <= it.median && it.median <= it.max);
            prop_assert!(it.median <= it.p95 && it.p95 <= it.p99 && it.p99 <= it.max);
            prop_assert!(not_greater(it.p95) * 100 >= times.len() * 95);
            prop_assert!(not_greater(it.p99) * 100 >= times.len() * 99);
            // As near as doubles are.
            let about = |it: u64| (it as f64 * (1.0 - 1e-12), it as f64 * (1.0 + 1e-12));
            prop_assert!(about(it.min).0 <= it.mean && it.mean <= about(it.max).1);
            prop_assert!(it.deviation >= 0.0);
            prop_assert!(it.deviation <= (it.max - it.min) as f64 + 1e-12 * it.max as f64);
            // Half of all lie within the median of distances.
            prop_assert!(it.outliers as usize <= times.len() / 2);

            // The order does not matter.
            times.reverse();
            prop_assert_eq!(Summary::of(&times), Some(it));
        }

        #[test]
        fn what_all_have_more_the_figures_have_more(
            times in proptest::collection::vec(0u64..1 << 40, 1..50), more in 0u64..1 << 40,
        ) {
            let [it, moved] = [0, more].map(|more| {
                Summary::of(&times.iter().map(|it| it + more).collect::<Vec<_>>()).unwrap()
            });
            prop_assert_eq!(moved.median, it.median + more);
            prop_assert_eq!(moved.p95, it.p95 + more);
            prop_assert_eq!(moved.outliers, it.outliers);
            prop_assert!((moved.deviation - it.deviation).abs() <= 1e-3 * it.deviation.max(1.0));
        }

        #[test]
        fn whatever_it_is_noise_can_be_asked_for(times in proptest::collection::vec(any::<u64>(), 0..100)) {
            noise("x", &times);
        }
    }
}
