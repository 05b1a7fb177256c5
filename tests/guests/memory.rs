//! How the host provides a guest's memory.

use mayfly_testing::guest::Guest;
use mayfly_testing::processes::children;

const POOL: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

fn number(path: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap();
    text.trim().parse().unwrap()
}

/// A field of the status of a VMM process, whose supervisor has a number; in KiB.
pub fn status(supervisor: u32, field: &str) -> u64 {
    let machine = machine(supervisor);
    let text = std::fs::read_to_string(format!("/proc/{machine}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    let digits = line.chars().filter(char::is_ascii_digit);
    digits.collect::<String>().parse().unwrap()
}

/// The VMM process, whose supervisor has a number.
pub fn machine(supervisor: u32) -> u32 {
    let is_mayfly = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|it| it == "mayfly-vmm\n")
    };
    children(supervisor).into_iter().find(is_mayfly).unwrap()
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
