//! Every way in which a VM ends: exit code, record, and nothing left behind.

use std::time::Duration;

use mayfly_testing::guest::Guest;
use mayfly_testing::processes::{children, kill};
use mayfly_testing::user::User;
use mayfly_testing::{kernel, text, until};

#[test]
fn a_power_off_is_told_in_the_record() {
    let ended = Guest::new("exit 42")
        .args(["--json", "--timing"])
        .start()
        .wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    let record = ended.record();
    assert_eq!(record["outcome"], "power-off");
    assert_eq!(record["exit_code"], 0);
    assert_eq!(record["guest_status"], 42);
    let times: Vec<u64> = [
        "kvm_ready",
        "memory_mapped",
        "kernel_loaded",
        "vcpus_started",
        "guest_init",
        "exit",
    ]
    .iter()
    .map(|phase| {
        record["timing_us"][phase]
            .as_u64()
            .unwrap_or_else(|| panic!("{record}"))
    })
    .collect();
    assert!(times.is_sorted(), "{times:?}");
    for phase in ["KVM ready", "guest init reached", "exit"] {
        assert!(ended.stderr.contains(phase), "{ended:?}");
    }
}

#[test]
fn a_root_that_is_not_there_is_told_and_ends_the_vm() {
    let ended = Guest::plain()
        .args(["--json", "--cmdline", "root=/dev/vdb"])
        .start()
        .wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    assert_eq!(ended.record()["guest_status"], 125);
    let message = "mayfly-init: root=/dev/vdb: no such disk; there are: none";
    assert!(ended.stdout.contains(message), "{ended:?}");
}

#[test]
fn a_reboot_ends_the_vm() {
    let ended = Guest::new("")
        .args(["--json", "--cmdline", "-- reboot"])
        .start()
        .wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    assert_eq!(ended.record()["outcome"], "reset");
}

#[test]
fn a_reboot_by_the_keyboard_controller_ends_the_vm() {
    let ended = Guest::new("")
        .args(["--json", "--cmdline", "reboot=k -- reboot"])
        .start()
        .wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    assert_eq!(ended.record()["outcome"], "reset");
}

/// Linux' choice where it is not told: it jumps to where firmware would be.
#[test]
fn a_reboot_by_firmware_ends_the_vm() {
    let words = "console=ttyS0 -- reboot";
    let ended = Guest::new("")
        .args(["--json", "--no-default-cmdline", "--cmdline", words])
        .start()
        .wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    assert_eq!(ended.record()["outcome"], "reset");
}

#[test]
fn a_triple_fault_is_a_crash() {
    let ended = Guest::new("")
        .args(["--json", "--cmdline", "reboot=t -- reboot"])
        .start()
        .wait();
    assert_eq!(ended.code(), Some(4), "{ended:?}");
    assert_eq!(ended.record()["outcome"], "crash");
    assert!(
        ended.stderr.contains("the guest crashed: triple fault"),
        "{ended:?}"
    );
}

#[test]
fn a_panic_ends_the_vm() {
    let guest = Guest::new("");
    let console = guest.path("console");
    let where_to = format!("file={}", console.display());
    let ended = guest
        .args(["--json", "--cmdline", "-- panic", "--console", &where_to])
        .start()
        .wait();
    assert_eq!(ended.code(), Some(5), "{ended:?}");
    assert_eq!(ended.record()["outcome"], "panic");
    // The panic's text, from its beginning, though the console is elsewhere.
    let (message, lines) = ended
        .stderr
        .split_once("the guest's last lines:\n")
        .unwrap_or_else(|| panic!("{ended:?}"));
    assert!(message.contains("the guest's kernel panicked"));
    for part in [
        "Kernel panic - not syncing: Attempted to kill init!",
        "Call Trace:",
    ] {
        assert!(lines.contains(part), "{ended:?}");
    }
    assert!(lines.lines().count() <= 50);
}

/// Signals end a guest that is busy on all CPUs, at once and in order.
fn ends_by_signal(signal: i32) {
    let guest = Guest::new("while :; do :; done & echo up; while :; do :; done");
    let (pidfile, socket) = (guest.path("pid"), guest.path("console"));
    let console = format!("unix={}", socket.display());
    let mut running = guest
        .args(["--cpus", "2", "--json", "--console", &console, "--pidfile"])
        .args([&pidfile])
        .start();
    let deadline = std::time::Instant::now() + mayfly_testing::TIMEOUT;
    let mut client = loop {
        match std::os::unix::net::UnixStream::connect(&socket) {
            Ok(client) => break client,
            Err(_) => assert!(std::time::Instant::now() < deadline),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut seen = Vec::new();
    client
        .set_read_timeout(Some(mayfly_testing::TIMEOUT))
        .unwrap();
    while !String::from_utf8_lossy(&seen).contains("up") {
        let mut chunk = [0; 256];
        let len = std::io::Read::read(&mut client, &mut chunk).unwrap();
        assert_ne!(len, 0, "{}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&chunk[..len]);
    }
    let pid: u32 = std::fs::read_to_string(&pidfile)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert_eq!(pid, running.child.id());
    running.signal(signal);
    let folder = std::mem::replace(&mut running.folder, tempfile::tempdir().unwrap());
    let ended = running.wait();
    assert_eq!(ended.code(), Some(128 + signal), "{ended:?}");
    assert_eq!(ended.record()["outcome"], "signal");
    assert!(!pidfile.exists() && !socket.exists());
    drop(folder);
}

#[test]
fn sigterm_ends_it_in_order() {
    ends_by_signal(15);
}

#[test]
fn sigint_ends_it_in_order() {
    ends_by_signal(2);
}

#[test]
fn a_guest_without_init_ends_too() {
    let output = std::process::Command::new(mayfly_testing::mayfly())
        .args(["boot", "--json", "--kernel"])
        .arg(kernel("cloud-6.12", "vmlinux"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("Unable to mount root fs"), "{text}");
}

/// What `inspect` tells of a VM.
fn inspect(user: &User, name: &str) -> serde_json::Value {
    let all: serde_json::Value = serde_json::from_str(&user.text(&["inspect", name])).unwrap();
    all[0].clone()
}

/// The VMM process of a VM without helpers: its supervisor's only child.
fn vmm(user: &User, name: &str) -> u32 {
    let supervisor = inspect(user, name)["pid"].as_u64().unwrap();
    match children(u32::try_from(supervisor).unwrap())[..] {
        [vmm] => vmm,
        ref others => panic!("{others:?}"),
    }
}

#[test]
fn a_vm_in_the_background_is_told_of_whatever_becomes_of_it() {
    let user = User::root();
    let run = |name: &str, script: &str| {
        let words = [
            "run", "-d", "--name", name, "--net", "none", "demo", "sh", "-c",
        ];
        user.text(&[&words[..], &[script]].concat());
    };
    run("killed", "echo hello; sleep 1000");
    until("it says hello", || {
        user.text(&["logs", "killed"]) == "hello\n"
    });
    user.text(&["ctl", "killed", "pause"]);
    assert!(user.text(&["ps"]).contains("(paused)"));
    let refused = user.output(&["exec", "killed", "true"]);
    let said = text(&refused.stderr);
    assert!(
        said.contains("is paused; let it go on with mayfly ctl killed resume"),
        "{said}"
    );
    user.text(&["ctl", "killed", "resume"]);
    user.text(&["exec", "killed", "true"]);
    kill(vmm(&user, "killed"), 9);
    assert_eq!(user.text(&["wait", "killed"]), "125\n");
    assert_eq!(user.text(&["logs", "killed"]), "hello\n");
    assert!(user.text(&["ps", "-a"]).contains("exited (125)"));
    let ended = inspect(&user, "killed")["ended"].clone();
    assert_eq!(
        ended["reason"],
        "killed: the VMM process was ended by signal 9"
    );

    // A paused VM that is to stop goes on, so that its command hears of it.
    run(
        "stopped",
        "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done",
    );
    until("it is up", || user.text(&["logs", "stopped"]) == "up\n");
    user.text(&["ctl", "stopped", "pause"]);
    user.text(&["stop", "-t", "300", "stopped"]);
    assert_eq!(user.text(&["wait", "stopped"]), "3\n");

    run(
        "panicked",
        "sleep 1; echo c >/proc/sysrq-trigger; sleep 1000",
    );
    assert_eq!(user.text(&["wait", "panicked"]), "125\n");
    let ended = inspect(&user, "panicked")["ended"].clone();
    assert_eq!(ended["reason"], "panicked: the guest's kernel panicked");
    let lines = ended["last_lines"].to_string();
    assert!(lines.contains("Kernel panic - not syncing"), "{ended}");
}
