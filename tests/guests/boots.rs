//! Kernels, formats, CPUs, memory.

use std::fs;

use mayfly_testing::guest::Guest;
use mayfly_testing::kernel;

fn boots(name: &str, file: &str, args: &[&str]) {
    let release = fs::read_to_string(kernel(name, "release")).unwrap();
    let console = Guest::with_kernel(name, file, "echo release: $(uname -r)")
        .args(args)
        .run();
    let expected = format!("release: {}", release.trim());
    assert!(
        console.contains(&expected),
        "{expected} is not in {console}"
    );
}

#[test]
fn cloud_6_12_elf() {
    boots("cloud-6.12", "vmlinux", &[]);
}

#[test]
fn cloud_6_12_bzimage() {
    boots("cloud-6.12", "vmlinuz", &[]);
}

#[test]
fn cloud_6_12_elf_by_pvh() {
    boots("cloud-6.12", "vmlinux", &["--boot-protocol", "pvh"]);
}

#[test]
fn generic_6_12_elf() {
    boots("generic-6.12", "vmlinux", &[]);
}

#[test]
fn generic_6_12_bzimage() {
    boots("generic-6.12", "vmlinuz", &[]);
}

#[test]
fn cloud_6_1_elf() {
    boots("cloud-6.1", "vmlinux", &[]);
}

#[test]
fn cloud_6_1_bzimage() {
    boots("cloud-6.1", "vmlinuz", &[]);
}

#[test]
fn generic_6_1_elf() {
    boots("generic-6.1", "vmlinux", &[]);
}

#[test]
fn generic_6_1_bzimage() {
    boots("generic-6.1", "vmlinuz", &[]);
}

#[test]
fn generic_6_1_elf_by_pvh() {
    boots("generic-6.1", "vmlinux", &["--boot-protocol", "pvh"]);
}

/// All CPUs are up, each a core of one package.
fn has_cpus(count: usize) {
    let script = "echo cpus: $(nproc); cat /sys/devices/system/cpu/cpu*/topology/core_cpus_list; \
                  cat /sys/devices/system/cpu/cpu0/topology/package_cpus_list; \
                  cat /sys/devices/system/clocksource/clocksource0/current_clocksource";
    let console = Guest::new(script)
        .args(["--cpus", &count.to_string()])
        .run();
    assert!(console.contains(&format!("cpus: {count}\n")), "{console}");
    for cpu in 0..count {
        assert!(console.contains(&format!("\n{cpu}\n")), "{console}");
    }
    let package = if count > 1 {
        format!("0-{}", count - 1)
    } else {
        "0".to_owned()
    };
    assert!(console.contains(&format!("\n{package}\n")), "{console}");
    assert!(
        console.contains("kvm-clock") || console.contains("tsc"),
        "{console}"
    );
}

#[test]
fn one_cpu() {
    has_cpus(1);
}

#[test]
fn two_cpus() {
    has_cpus(2);
}

#[test]
fn eight_cpus() {
    has_cpus(8);
}

#[test]
fn memory_beyond_the_hole() {
    let script = "echo total: $(sed -n 's/MemTotal: *//p' /proc/meminfo)";
    let console = Guest::new(script).args(["--memory", "6G"]).run();
    let total = kib(&console, "total: ") >> 10;
    assert!((5800..6144).contains(&total), "{total}");
}

/// Our init alone, and a kernel without its tracing, which takes 8 MiB: what is
/// left of 64 MiB by a kernel that ends at 62.
#[test]
fn little_memory() {
    let words = "initcall_blacklist=tracer_init_tracefs -- demo";
    let console = Guest::bare("cloud-6.1")
        .args(["--memory", "64M", "--cmdline", words])
        .run();
    let total = kib(&console, "memory   ") >> 10;
    assert!((16..64).contains(&total), "{total}");
}

fn kib(console: &str, before: &str) -> u64 {
    let number = console
        .split(before)
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    number
        .unwrap_or_else(|| panic!("{console}"))
        .parse()
        .unwrap()
}

#[test]
fn clock_entropy_and_acpi_devices_are_there() {
    let console = Guest::new(
        "echo now: $(date +%s); cat /sys/class/rtc/rtc0/name; \
         echo random: $(head -c 16 /dev/hwrng | md5sum); \
         cat /sys/devices/virtual/misc/hw_random/rng_current",
    )
    .run();
    let now: u64 = console
        .split("now: ")
        .nth(1)
        .and_then(|rest| rest.lines().next())
        .unwrap()
        .parse()
        .unwrap();
    let host = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(host.abs_diff(now) < 300, "{host} {now}");
    assert!(console.contains("rtc_cmos"), "{console}");
    assert!(console.contains("virtio_rng"), "{console}");
}

#[test]
fn init_has_all_words_whatever_linux_makes_of_them() {
    let many: Vec<String> = (0..40).map(|it| it.to_string()).collect();
    let cmdline = format!("-- -- run /bin/busybox echo {} -- \"a b\"", many.join(" "));
    let console = Guest::plain().args(["--cmdline", &cmdline]).run();
    let expected = format!("{} -- a b\n", many.join(" "));
    assert!(console.contains(&expected), "{console}");
}
