//! How all figures of the steady state are taken: a task is repeated for a while, in rounds.

use std::time::{Duration, Instant};

/// How many times a figure is taken.
pub const ROUNDS: usize = 5;
/// How long a task is repeated in a round.
pub const WHILE: Duration = Duration::from_millis(100);
/// Bytes of a MiB.
pub const MIB: f64 = 1_048_576.0;

/// Repeats a task for [`WHILE`], and returns how often, and for how long.
pub fn repeated(mut task: impl FnMut()) -> (f64, Duration) {
    let start = Instant::now();
    let mut count = 0.0;
    loop {
        task();
        count += 1.0;
        let elapsed = start.elapsed();
        if elapsed >= WHILE {
            return (count, elapsed);
        }
    }
}

/// Nanoseconds for one of `count` that took `time`.
pub fn nanoseconds(count: f64, time: Duration) -> f64 {
    time.as_secs_f64() * 1e9 / count
}
