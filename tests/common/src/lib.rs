//! What tests share: users with stores, guests of real kernels and of a few instructions,
//! processes of the host, and waiting.
//!
//! Whatever is wrong here fails the test: functions panic, and say why.

#![allow(clippy::unwrap_used)]

pub mod guest;
pub mod net;
pub mod processes;
pub mod tiny;
pub mod tools;
pub mod user;

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

/// What is waited for comes by then, or never. Everything is many times slower in the lab
/// than on a CPU.
pub const TIMEOUT: Duration = Duration::from_secs(600);
/// Between two looks at what is waited for, at first and at most.
const LOOKS: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(100)];

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set: run scripts/test, which prepares guests"))
        .into()
}

/// The binary under test: `MAYFLY_BIN`, or what cargo built beside the test.
pub fn mayfly() -> PathBuf {
    std::env::var_os("MAYFLY_BIN").map_or_else(
        || {
            let test = std::env::current_exe().unwrap();
            test.ancestors().nth(2).unwrap().join("mayfly")
        },
        PathBuf::from,
    )
}

/// A file of a fetched kernel: `vmlinux`, `vmlinuz`, `release`.
pub fn kernel(name: &str, file: &str) -> PathBuf {
    variable("MAYFLY_KERNELS").join(name).join(file)
}

/// A file that scripts/test has made.
pub fn test_data(name: &str) -> PathBuf {
    variable("MAYFLY_TEST_DATA").join(name)
}

/// A file of the cache, where the guests are that VMs boot by default.
pub fn cache(name: &str) -> PathBuf {
    variable("MAYFLY_CACHE").join(name)
}

/// A file of the Debian that scripts/distro has made.
pub fn distro(name: &str) -> PathBuf {
    variable("MAYFLY_DISTRO").join(name)
}

/// Bytes that a program printed.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Waits until there is something.
///
/// # Panics
///
/// After [`TIMEOUT`], with what was waited for.
pub fn eventually<T>(what: &str, get: impl FnMut() -> Option<T>) -> T {
    eventually_within(TIMEOUT, what, get)
}

/// The time in which all that is like something that `took` its time has happened, on a CPU
/// as in the lab: a test that waits for it in vain fails that soon.
pub fn many_times(took: Duration) -> Duration {
    (Duration::from_secs(30) + took * 50).min(TIMEOUT)
}

/// Waits until there is something, but not for as long as [`eventually`].
///
/// # Panics
///
/// After `timeout`, with what was waited for.
pub fn eventually_within<T>(
    timeout: Duration,
    what: &str,
    mut get: impl FnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + timeout;
    let [mut pause, longest] = LOOKS;
    loop {
        if let Some(got) = get() {
            return got;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(pause);
        pause = longest.min(pause * 2);
    }
}

/// Waits until something is so.
///
/// # Panics
///
/// After [`TIMEOUT`], with what was waited for.
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    eventually(what, || is().then_some(()));
}
