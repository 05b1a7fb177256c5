//! Devices that ACPI describes: power button, generation ID, watchdog.

use std::time::Duration;

use mayfly_testing::guest::{Controlled, Guest};

#[test]
fn the_power_button_turns_the_guest_off_in_order() {
    let guest = Guest::new(
        "trap 'echo main: done; exit 7' TERM
         (trap 'sleep 1; echo daemon: done; exit' TERM
          echo daemon: up; while :; do sleep 1; done) &
         [ -e /sys/firmware/acpi/tables/WDAT ] && echo a watchdog
         grep -qwE 'vmx|svm' /proc/cpuinfo && echo VMs of its own
         echo bound: $(ls -d /sys/bus/*/drivers/vmgenid/MFLY*)
         echo main: up; while :; do sleep 1; done",
    );
    let guest = guest.args(["--json", "--memory", "256M"]);
    let mut vm = Controlled::start(guest, Guest::start);
    vm.running.expect("main: up");
    vm.running.expect("daemon: up");
    vm.ctl(&["shutdown", "--deadline", "500"]);
    let ended = vm.running.wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    let record = ended.record();
    assert_eq!(record["outcome"], "power-off");
    assert_eq!(record["guest_status"], 7);
    let place = |text: &str| {
        ended
            .stdout
            .find(text)
            .unwrap_or_else(|| panic!("{ended:?}"))
    };
    assert!(place("main: done") < place("daemon: done"));
    assert!(ended.stdout.contains("/vmgenid/MFLY0001:00"), "{ended:?}");
    assert!(!ended.stdout.contains("a watchdog"), "{ended:?}");
    // The CPU's means for that are kept from it, unless it is asked for.
    assert!(!ended.stdout.contains("VMs of its own"), "{ended:?}");
}

/// Feeds a watchdog for some seconds, then stops feeding it.
fn watched(seconds: u32) -> Guest {
    let script = format!(
        "watchdog -F -T 5 -t 1 /dev/watchdog & dog=$!
         until grep -qx active /sys/class/watchdog/watchdog0/state; do sleep 0.1; done
         i=0; while [ $i -lt {seconds} ]; do sleep 1; i=$((i + 1)); echo tick $i; done
         kill -STOP $dog; echo hangs; sleep 1000"
    );
    Guest::with_archives("cloud-6.12", "vmlinux", &script, &["watchdog.cpio"])
}

#[test]
fn a_guest_that_hangs_is_ended_by_its_watchdog_but_not_one_that_is_paused() {
    let guest = watched(7).args(["--json", "--watchdog"]);
    let mut vm = Controlled::start(guest, Guest::start);
    vm.running.expect("tick 1");
    vm.ctl(&["pause"]);
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(vm.info()["state"], "paused");
    vm.ctl(&["resume"]);
    let ended = vm.running.wait();
    assert_eq!(ended.code(), Some(4), "{ended:?}");
    assert_eq!(ended.record()["outcome"], "hung");
    assert!(ended.stdout.contains("hangs"), "{ended:?}");
    let message = "the guest hung: its watchdog was not fed for 5 s";
    assert!(ended.stderr.contains(message), "{ended:?}");
}

#[test]
fn a_guest_that_hangs_can_be_made_to_tell_where() {
    let ended = watched(0)
        .args(["--json", "--watchdog", "action=nmi"])
        .args(["--cmdline", "unknown_nmi_panic"])
        .start()
        .wait();
    assert_eq!(ended.code(), Some(5), "{ended:?}");
    assert_eq!(ended.record()["outcome"], "panic");
    assert!(ended.stdout.contains("NMI: Not continuing"), "{ended:?}");
}
