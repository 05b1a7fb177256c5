//! The balloon and reports: the host really gets its memory back.

use std::io::Write;
use std::process::Stdio;

use mayfly_testing::guest::{Controlled, Guest, Running};
use mayfly_testing::until;

use crate::memory::status;

const MIB: u64 = 1 << 20;

/// Fills most of the guest's memory when it is told to, and frees it again.
const SCRIPT: &str = "mount -o remount,size=100% /tmp; stty -echo
    while echo ready; read size; do
        rm -f /tmp/fill
        [ $size = 0 ] || dd if=/dev/zero of=/tmp/fill bs=1M count=$size 2>/dev/null || echo failed
    done";

/// Starts a VM of 256 MiB that takes its orders from a pipe.
fn start(balloon: &str) -> Controlled {
    let mut guest = Guest::new(SCRIPT).args(["--memory", "256M", "--balloon", balloon]);
    guest.command.stdin(Stdio::piped());
    Controlled::start(guest, Guest::start)
}

fn fill(running: &mut Running, mib: u64) {
    let fills = |running: &Running| running.console().matches("ready").count();
    let before = fills(running);
    let orders = running.child.stdin.as_mut().unwrap();
    writeln!(orders, "{mib}").unwrap();
    until("filled", || fills(running) > before);
    assert!(
        !running.console().contains("failed"),
        "{}",
        running.console()
    );
}

/// The VMM's memory in bytes.
fn resident(vm: &Controlled) -> u64 {
    status(vm.running.child.id(), "VmRSS:") << 10
}

fn inflate(vm: &Controlled, mib: u64) {
    vm.ctl(&["balloon", &format!("{mib}M")]);
    until("inflated", || vm.info()["balloon"]["actual"] == mib * MIB);
}

#[test]
fn a_balloon_gives_memory_to_the_host_and_back() {
    let mut vm = start("0,deflate-on-oom");
    vm.running.expect("ready");
    fill(&mut vm.running, 150);
    fill(&mut vm.running, 0);
    let full = resident(&vm);
    assert!(full > 150 * MIB, "{full}");

    // Free pages that the guest never touched are not the host's to get.
    inflate(&vm, 120);
    let (inflated, least) = (resident(&vm), 60 * MIB);
    assert!(inflated < full - least, "{full} {inflated}");

    let statistics = |vm: &Controlled| vm.info()["balloon"]["statistics"].clone();
    until("counted", || {
        let free = statistics(&vm)["free_bytes"].as_u64();
        free.is_some_and(|free| free < 110 * MIB)
    });
    let statistics = statistics(&vm);
    assert!(statistics["total_bytes"].as_u64().unwrap() > 150 * MIB);
    assert!(
        vm.ctl(&["metrics"])
            .contains("mayfly_balloon_actual_bytes 125829120")
    );

    inflate(&vm, 0);
    fill(&mut vm.running, 150);
    assert!(resident(&vm) > inflated + least, "{}", resident(&vm));
    fill(&mut vm.running, 0);

    // More than is left: the guest helps itself.
    inflate(&vm, 150);
    fill(&mut vm.running, 70);
    let actual = vm.info()["balloon"]["actual"].as_u64().unwrap();
    assert!(actual < 150 * MIB, "{actual}");

    let refused = vm.refused(&["balloon", "256M"]);
    assert!(refused.contains("not smaller"), "{refused}");
}

#[test]
fn reported_pages_go_back_by_themselves() {
    let mut vm = start("0,reporting");
    vm.running.expect("ready");
    fill(&mut vm.running, 150);
    let full = resident(&vm);
    assert!(full > 150 * MIB, "{full}");
    fill(&mut vm.running, 0);
    until("reported", || resident(&vm) < full - 110 * MIB);
    // And can be used again.
    fill(&mut vm.running, 150);
    assert!(resident(&vm) > 150 * MIB);
}
