//! How the host provides a guest's memory.

use crate::common::Guest;

const POOL: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

fn number(path: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap();
    text.trim().parse().unwrap()
}

/// A field of a process' status, in KiB.
pub fn status(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    let digits = line.chars().filter(char::is_ascii_digit);
    digits.collect::<String>().parse().unwrap()
}

#[test]
fn huge_pages_come_from_the_pool_or_are_refused() {
    let before = number(POOL);
    std::fs::write(POOL, (before + 140).to_string()).unwrap();
    let free = number(FREE);
    assert!(free >= 128, "the host gave {free} huge pages");
    let guest = Guest::new("echo up; sleep 1000").args(["--memory", "256M,hugepages=2M,prefault"]);
    let mut running = guest.start();
    running.expect("up");
    assert_eq!(number(FREE), free - 128);
    assert_eq!(status(running.child.id(), "HugetlbPages:"), 256 << 10);

    let second = Guest::new("").args(["--memory", "256M,hugepages=2M"]);
    let refused = second.start().wait();
    assert_eq!(refused.code(), Some(2), "{refused:?}");
    assert!(refused.stderr.contains("needs 128 free huge pages of 2M"));
    running.signal(15);
    assert_eq!(running.wait().code(), Some(128 + 15));
    assert_eq!(number(FREE), free);
    std::fs::write(POOL, before.to_string()).unwrap();
}
