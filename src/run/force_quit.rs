//! Repeated signals force the end.

use std::time::{Duration, Instant};

/// How soon after the other signals of a row come.
const SOON: Duration = Duration::from_secs(2);
/// How many of them force the end.
const ENOUGH: u32 = 3;

/// Counts those that ask for the end, each soon after the other: a user who asks
/// three times does not want to wait for the command.
#[derive(Default)]
pub struct ForceQuit(Option<(Instant, u32)>);

impl ForceQuit {
    /// True if it is enough.
    pub fn heard(&mut self, signal: i32) -> bool {
        if ![libc::SIGINT, libc::SIGTERM].contains(&signal) {
            return false;
        }
        let now = Instant::now();
        let before = self.0.filter(|(last, _)| now.duration_since(*last) < SOON);
        let count = before.map_or(1, |(_, count)| count + 1);
        self.0 = Some((now, count));
        count >= ENOUGH
    }
}
