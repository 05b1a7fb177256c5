//! `mayfly compare` with VMs beside containers: everything that Debian has.

use std::fs;
use std::process::Command;

use mayfly::compare::model::{EngineReport, Mark, Report, Way};

use crate::common::{mayfly, test_data};
use crate::user_nets::loopback;

const ENGINES: [&str; 7] = [
    "process",
    "container",
    "mayfly",
    "runc",
    "crun",
    "podman",
    "qemu",
];

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
    assert!(output.status.success(), "{output:?}");
    let report = serde_json::from_slice(&fs::read(record).unwrap()).unwrap();
    (report, String::from_utf8(output.stdout).unwrap())
}

fn engine<'a>(report: &'a Report, name: &str) -> &'a EngineReport {
    let found = report.engines.iter().find(|engine| engine.name == name);
    let found = found.unwrap_or_else(|| panic!("{name} is not in the record"));
    assert_eq!(found.missing, None, "{name}");
    found
}

#[test]
fn all_that_debian_has_is_compared() {
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
        let vm = ["mayfly", "qemu"].contains(&name);
        assert_eq!(facts.host_kernel, !vm, "{name}: {facts:?}");
        assert_eq!(facts.sees_of_host.is_empty(), vm, "{name}: {facts:?}");
    }
    // All that can be seen of mayfly is told apart.
    let marks = &engine(&report, "mayfly").samples[0].marks_ns;
    assert!(marks.keys().eq(&Mark::ALL), "{marks:?}");
    let facts = engine(&report, "mayfly").isolation.clone().unwrap();
    assert_eq!(
        (facts.host_syscalls, facts.monitor_syscalls),
        (Some(0), Some(31))
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
    let nothing = fs::read_dir("/run").unwrap().flatten();
    let left = nothing.filter(|it| {
        it.file_name()
            .to_string_lossy()
            .starts_with("mayfly-compare-")
    });
    assert_eq!(left.count(), 0);
}

#[test]
fn vms_are_weighed_and_loaded() {
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
        "mayfly by user network (passt)",
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
