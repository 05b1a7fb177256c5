//! The sandbox of real VMs, seen from outside (`tests/breakout` sees it from inside).

use std::fs;
use std::path::{Path, PathBuf};

use mayfly_testing::guest::{Controlled, Guest};
use mayfly_testing::processes::kill;
use mayfly_testing::user::User;
use mayfly_testing::{text, until};
use serde_json::Value;

use crate::memory::machine;

const FIRST_UID: u32 = 0x7100_0000;

fn proc(pid: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A field of a status.
fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim_start_matches(':').trim().to_owned()
}

/// What is said of each layer.
fn layers(info: &Value) -> Vec<(String, String)> {
    let all = info["sandbox"].as_array().unwrap().iter();
    all.map(|layer| (layer[0].as_str().unwrap().into(), layer[1].to_string()))
        .collect()
}

fn start(mode: &str) -> Controlled {
    let guest = Guest::new("echo up; sleep 1000").args(["--sandbox", mode]);
    let mut vm = Controlled::start(guest, Guest::start);
    vm.running.expect("up");
    vm
}

#[test]
fn every_layer_surrounds_a_vm_that_requires_it() {
    let vm = start("require");
    let layers = layers(&vm.info());
    assert_eq!(layers.len(), 16, "{layers:?}");
    for (layer, status) in &layers {
        assert_eq!(status, "\"active\"", "{layer}");
    }

    let supervisor = vm.running.child.id();
    let machine = machine(supervisor);
    let status = read(&proc(machine, "status"));
    let uid = field(&status, "Uid");
    for id in uid.split_whitespace() {
        assert!(id.parse::<u32>().unwrap() > FIRST_UID, "{uid}");
    }
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, set), "0000000000000000", "{set}");
    }
    assert_eq!(field(&status, "NoNewPrivs"), "1");
    let mut threads = 0;
    for thread in fs::read_dir(proc(machine, "task")).unwrap() {
        let status = read(&thread.unwrap().path().join("status"));
        assert_eq!(field(&status, "Seccomp"), "2", "{status}");
        threads += 1;
    }
    assert!(threads >= 2, "{threads}");
    for space in [
        "user",
        "mnt",
        "pid_for_children",
        "ipc",
        "uts",
        "cgroup",
        "net",
    ] {
        let link = |pid| fs::read_link(proc(pid, &format!("ns/{space}"))).unwrap();
        assert_ne!(link(machine), link(supervisor), "{space}");
    }
    let root = fs::read_dir(proc(machine, "root")).unwrap();
    assert_eq!(root.count(), 0);
    for fd in fs::read_dir(proc(machine, "fd")).unwrap() {
        let to = fs::read_link(fd.unwrap().path()).unwrap();
        assert!(!to.is_dir(), "{}", to.display());
    }

    // The group goes with the VM.
    let group = read(&proc(machine, "cgroup"));
    let group = group.trim().strip_prefix("0::/").unwrap();
    assert!(group.ends_with(&format!("mayfly-{supervisor}")), "{group}");
    let group = Path::new("/sys/fs/cgroup").join(group);
    assert_eq!(read(&group.join("cpu.max")), "100000 100000\n");
    let memory: u64 = read(&group.join("memory.max")).trim().parse().unwrap();
    assert!((512 << 20..640 << 20).contains(&memory), "{memory}");
    vm.running.signal(15);
    assert_eq!(vm.running.wait().code(), Some(128 + 15));
    assert!(!group.exists());
}

#[test]
fn without_a_sandbox_that_is_told_loudly() {
    let vm = start("off");
    for (layer, status) in layers(&vm.info()) {
        assert_eq!(status, "\"off\"", "{layer}");
    }
    vm.running.signal(15);
    let ended = vm.running.wait();
    assert!(ended.stderr.contains("--sandbox=off"), "{ended:?}");
}

#[test]
fn either_process_ends_with_the_other() {
    let vm = start("on");
    let machine = machine(vm.running.child.id());
    kill(machine, 9);
    let ended = vm.running.wait();
    assert_eq!(ended.code(), Some(1), "{ended:?}");
    assert!(ended.stderr.contains("ended by signal 9"), "{ended:?}");

    let vm = start("on");
    let machine = self::machine(vm.running.child.id());
    vm.running.signal(9);
    let _ = vm.running.wait();
    until("ended", || !proc(machine, "status").exists());
}

#[test]
fn an_ordinary_user_is_told_what_is_missing() {
    let user = User::plain();
    let refused = user.output(&["run", "--sandbox", "require", "demo", "true"]);
    assert_eq!(refused.status.code(), Some(125), "{refused:?}");
    let said = text(&refused.stderr);
    assert!(
        said.contains("--sandbox=require: cgroup: no limit of"),
        "{said}"
    );
    assert!(said.contains("systemd-run --user"), "{said}");

    user.text(&[
        "run",
        "-d",
        "--name",
        "v",
        "-e",
        "KEY=hunter2",
        "demo",
        "sleep",
        "1000",
    ]);
    let inspect: Value = serde_json::from_str(&user.text(&["inspect", "v"])).unwrap();
    let layers = layers(&inspect[0]["machine"]);
    let missing: Vec<_> = layers.iter().filter(|(_, it)| it != "\"active\"").collect();
    assert_eq!(missing.len(), 1, "{layers:?}");
    assert_eq!(missing[0].0, "cgroup");
    assert!(missing[0].1.contains("absent"), "{missing:?}");

    // Secrets are the guest's alone.
    assert_eq!(
        user.text(&["exec", "v", "sh", "-c", "echo $KEY"]),
        "hunter2\n"
    );
    let supervisor = u32::try_from(inspect[0]["pid"].as_u64().unwrap()).unwrap();
    let words = |pid| String::from_utf8(fs::read(proc(pid, "cmdline")).unwrap()).unwrap();
    let supervisors = words(supervisor);
    assert!(supervisors.contains("KEY=*******"), "{supervisors}");
    assert!(!supervisors.contains("hunter2"), "{supervisors}");
    assert_eq!(words(machine(supervisor)), "mayfly-vmm\0");
    user.text(&["kill", "v"]);
}
