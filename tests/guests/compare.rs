//! `mayfly compare` with VMs beside containers: everything that Debian has.

use std::fs;
use std::os::unix::fs::{chown, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mayfly_compare::model::{EngineReport, Mark, Report, Way};
use mayfly_testing::user::{NOBODY, User};
use mayfly_testing::{kernel, mayfly, test_data, text, until};

use crate::user_nets::loopback;

const ENGINES: [&str; 8] = [
    "process",
    "container",
    "mayfly",
    "mayfly-cold",
    "runc",
    "crun",
    "podman",
    "qemu",
];

/// A word that no other process has.
const LONG: &str = "86429";

fn compare(flags: &[&str]) -> (Report, String) {
    compare_by(Command::new(mayfly()), flags)
}

fn compare_by(mut command: Command, flags: &[&str]) -> (Report, String) {
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("record.json");
    let output = command
        .args(["compare", "--json"])
        .arg(&record)
        .args(flags)
        .env("XDG_DATA_HOME", test_data("share"))
        .output()
        .unwrap();
    (report(&record, &output), text(&output.stdout))
}

fn report(record: &Path, output: &Output) -> Report {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&fs::read(record).unwrap()).unwrap()
}

/// Lets the lab load what its kernel needs for bridges and rules of a firewall. Root's
/// networks are not told apart from another comparison's, and so come one at a time.
fn networks() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let modules = Path::new("/lib/modules").join(release.trim());
    if !modules.exists() {
        fs::create_dir_all("/lib/modules").unwrap();
        symlink(kernel("generic-6.12", "modules"), &modules).unwrap();
    }
    guard
}

/// What Podman would leave on the host: its network's bridge, rules and addresses, and what
/// all comparisons would.
fn leftovers() -> String {
    let script = "ls -d /run/mayfly-compare-* /var/tmp/mayfly-compare-* /run/netns/* \
            /run/crun/* /run/libpod /var/lib/cni/networks/mayfly-* /var/lib/cni/results/mayfly-*
        ls /sys/fs/cgroup | grep -e ^libpod -e ^podman -e ^mayfly-compare
        ip -br link | grep podman
        iptables-save | grep -e CNI -e NETAVARK
        pgrep -af '^slee[p] 86429|^[^ ]*conmo[n] '";
    let output = Command::new("sh").args(["-c", script]).output().unwrap();
    text(&output.stdout)
}

fn nothing_is_left() {
    // What other tests have goes, too.
    until("nothing is left", || leftovers().is_empty());
}

fn engine<'a>(report: &'a Report, name: &str) -> &'a EngineReport {
    let found = report.engines.iter().find(|engine| engine.name == name);
    let found = found.unwrap_or_else(|| panic!("{name} is not in the record"));
    assert_eq!(found.missing, None, "{name}");
    found
}

#[test]
fn all_that_debian_has_is_compared() {
    let _one = networks();
    let engines = ENGINES.join(",");
    let flags = [
        "--engines",
        &engines,
        "--runs",
        "3",
        "--memory",
        "256M",
        "--measure",
        "start,isolation",
    ];
    let (report, table) = compare(&flags);
    for name in ENGINES {
        let engine = engine(&report, name);
        assert_eq!(engine.samples.len(), 3, "{name}");
        for sample in &engine.samples {
            assert_eq!((sample.status, &sample.error), (Some(0), &None), "{name}");
            let sum: u64 = sample.phases().iter().map(|(_, time)| time).sum();
            assert_eq!(sum, sample.marks_ns[&Mark::Gone], "{name}");
        }
        assert!(table.contains(name), "{table}");
        let facts = engine
            .isolation
            .as_ref()
            .unwrap_or_else(|| panic!("{name}: {:?}", engine.notes));
        let vm = ["mayfly", "mayfly-cold", "qemu"].contains(&name);
        assert_eq!(facts.host_kernel, !vm, "{name}: {facts:?}");
        assert_eq!(facts.sees_of_host.is_empty(), vm, "{name}: {facts:?}");
    }
    // Every mark of mayfly is seen; one that starts warm has none of a boot.
    let marks = &engine(&report, "mayfly-cold").samples[0].marks_ns;
    assert!(marks.keys().eq(&Mark::ALL), "{marks:?}");
    let marks = &engine(&report, "mayfly").samples[0].marks_ns;
    let booting = [Mark::Built, Mark::Init];
    let expected = Mark::ALL.iter().filter(|mark| !booting.contains(mark));
    assert!(marks.keys().eq(expected), "{marks:?}");
    let facts = engine(&report, "mayfly").isolation.clone().unwrap();
    assert_eq!(
        (facts.host_syscalls, facts.monitor_syscalls),
        (Some(0), Some(34))
    );
    assert!(
        engine(&report, "qemu").samples[0]
            .marks_ns
            .contains_key(&Mark::Init)
    );
    assert!(
        engine(&report, "podman").samples[0]
            .marks_ns
            .contains_key(&Mark::Built)
    );
    let podman = engine(&report, "podman");
    assert_eq!(podman.network, "a bridge as its default one (cni)");
    assert_eq!(podman.notes, Vec::<String>::new());
    nothing_is_left();
}

#[test]
fn memory_and_load_of_vms_are_measured() {
    let flags = [
        "--engines",
        "mayfly,container",
        "--runs",
        "1",
        "--memory",
        "256M",
        "--parallel",
        "2",
        "--measure",
        "memory,load",
    ];
    let (report, _) = compare(&flags);
    for name in ["mayfly", "container"] {
        let engine = engine(&report, name);
        let points: Vec<u32> = engine.memory.iter().map(|point| point.instances).collect();
        assert_eq!(points, [1, 2, 5, 10], "{name}: {:?}", engine.notes);
        let load = engine.load.as_ref().unwrap();
        assert_eq!((load.failed, load.starts_ns.len()), (0, 2), "{name}");
    }
    // A guest has its kernel in memory, a container does not.
    let first = |name| engine(&report, name).memory[0].pss_kib;
    assert!(first("mayfly") > 4 * first("container"));
}

/// On a host whose addresses nobody else sees.
#[test]
fn all_are_put_to_work_and_tcp_goes_through_their_networks() {
    let _one = networks();
    let namespace = loopback("compare");
    let mut command = Command::new("nsenter");
    // Unlike `ip netns exec`, it leaves control groups where they are.
    command.arg(format!("--net=/run/netns/{}", namespace.name()));
    command.arg(mayfly());
    let flags = [
        "--engines",
        "process,container,mayfly,podman,qemu",
        "--runs",
        "1",
        "--memory",
        "256M",
        "--measure",
        "steady",
    ];
    let (report, table) = compare_by(command, &flags);
    for (name, expected) in [
        ("process", Way::Loopback),
        ("container", Way::None),
        ("mayfly", Way::Network),
        ("qemu", Way::Network),
        // It has a network where its helpers are installed.
        ("podman", Way::Network),
    ] {
        let engine = engine(&report, name);
        let expected = match engine.network.as_str() {
            "none" if name == "podman" => Way::None,
            _ => expected,
        };
        assert_eq!(
            engine.tcp.as_ref(),
            Some(&expected),
            "{name}: {:?}",
            engine.notes
        );
        let figures = engine
            .steady
            .iter()
            .filter(|it| it.name.starts_with("tcp_"));
        let values: Vec<f64> = figures.map(|it| it.value).collect();
        let count = if expected == Way::None { 0 } else { 3 };
        assert_eq!(values.len(), count, "{name}: {:?}", engine.steady);
        assert!(values.iter().all(|&it| it > 0.0), "{name}: {values:?}");
    }
    for words in [
        "tcp send",
        "mayfly by user network (passt",
        "qemu by user network (slirp)",
    ] {
        let text = table.replace('\n', " ");
        assert!(text.contains(words), "{words}: {table}");
    }
    for name in ["mayfly", "container"] {
        let engine = engine(&report, name);
        let figures: Vec<&str> = engine.steady.iter().map(|it| it.name.as_str()).collect();
        for figure in ["cpu", "syscall", "fault", "root_write", "volume_read"] {
            assert!(
                figures.contains(&figure),
                "{name}: {figures:?} {:?}",
                engine.notes
            );
        }
    }
}

/// Whoever is killed: what Podman and its network have made is removed, if by the next
/// comparison.
#[test]
fn a_killed_podman_leaves_nothing() {
    let _one = networks();
    let flags = [
        "--engines",
        "podman",
        "--measure",
        "start",
        "--",
        "sleep",
        LONG,
    ];
    let mut command = Command::new(mayfly());
    command.arg("compare").args(flags);
    command.env("XDG_DATA_HOME", test_data("share"));
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    until("the command runs", || leftovers().contains("sleep"));
    let left = leftovers();
    assert!(
        left.contains("cni-podman") && left.contains("-A CNI-FORWARD"),
        "{left}"
    );
    // Nothing but the next comparison will clean up.
    let both = format!("kill -9 {} $(pgrep -P {0})", child.id());
    Command::new("sh").args(["-c", &both]).status().unwrap();
    child.wait().unwrap();
    compare(&["--engines", "process", "--runs", "1", "--measure", "start"]);
    nothing_is_left();
}

/// Its containers are below a process that stays until the comparison's end.
#[test]
fn an_ordinary_users_containers_are_compared() {
    const ENGINES: [&str; 5] = ["process", "container", "runc", "crun", "podman"];
    let user = User::plain();
    let home = user.home.path();
    // In memory, and not below a folder that only root may enter.
    let run = tempfile::tempdir_in("/run").unwrap();
    chown(run.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let ids = home.join("ids");
    fs::write(&ids, format!("{NOBODY}:300000:65536\n")).unwrap();
    let script = "touch /etc/subuid /etc/subgid
        mount --bind \"$IDS\" /etc/subuid && mount --bind \"$IDS\" /etc/subgid &&
        exec setpriv --reuid \"$ID\" --regid \"$ID\" --clear-groups \"$@\"";
    let record = home.join("record.json");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(home.join("mayfly"))
        .args(["compare", "--engines", &ENGINES.join(","), "--runs", "1"])
        .args(["--warmup", "0", "--measure", "start", "--json"])
        .arg(&record)
        .current_dir(home)
        .env("ID", NOBODY.to_string())
        .env("IDS", &ids)
        .env("HOME", home)
        .env("XDG_DATA_HOME", home.join("share"))
        .env("XDG_RUNTIME_DIR", run.path())
        .env("MAYFLY_CACHE", home)
        .output()
        .unwrap();
    let report = report(&record, &output);
    for name in ENGINES {
        let engine = engine(&report, name);
        assert_eq!(engine.samples[0].error, None, "{name}");
        // The user has no control group.
        let told = engine.notes.iter().any(|note| {
            ["cgroup: no limit", "without limits", "without a cgroup"]
                .iter()
                .any(|words| note.contains(words))
        });
        assert_eq!(told, name != "process", "{name}: {:?}", engine.notes);
    }
    let podman = engine(&report, "podman");
    assert_eq!(podman.network, "its default (slirp4netns)");
    let left = fs::read_dir(run.path()).unwrap().flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
    assert_eq!(left, Vec::<std::ffi::OsString>::new());
    let config = home.join(".config");
    assert!(!config.exists(), "{:?}", fs::read_dir(config));
    let pause = Command::new("pgrep")
        .args(["-fxa", "podman|catatonit -P"])
        .output();
    assert_eq!(text(&pause.unwrap().stdout), "");
}
