//! Figures are what was measured.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use mayfly_compare::model::{Kind, Mark, Way};
use mayfly_compare::statistics::Summary;

use crate::common::{Comparison, KNOWN, engine, nothing_is_left, script, sleeper};

/// What a known answer may be off by.
const ACCURACY_MS: f64 = 4.0;

/// The middle, found in another way than the product does.
fn median(mut times: Vec<u64>) -> u64 {
    while times.len() > 2 {
        let (min, max) = (*times.iter().min().unwrap(), *times.iter().max().unwrap());
        times.remove(times.iter().position(|it| *it == min).unwrap());
        times.remove(times.iter().position(|it| *it == max).unwrap());
    }
    times.iter().sum::<u64>() / times.len() as u64
}

fn check(summary: &Summary, times: &[u64]) {
    assert_eq!(summary.count as usize, times.len());
    assert_eq!(summary.median, median(times.to_vec()));
    assert_eq!(summary.min, *times.iter().min().unwrap());
    assert_eq!(summary.max, *times.iter().max().unwrap());
    let mean = times.iter().map(|&it| it as f64).sum::<f64>() / times.len() as f64;
    assert!((summary.mean - mean).abs() < 1.0, "{} {mean}", summary.mean);
}

#[test]
fn a_report_adds_up() {
    let mut comparison = Comparison::of(
        "process,container,runc",
        &["--runs", "5", "--seed", "7", "--measure", "start"],
    );
    for kind in ["csv", "html"] {
        let path = comparison.file(kind);
        comparison.command.arg(format!("--{kind}")).arg(path);
    }
    let (output, report) = comparison.run();
    for name in ["process", "container", "runc"] {
        let engine = engine(&report, name);
        assert_eq!((engine.samples.len(), engine.warmups.len()), (5, 1));
        assert!(!engine.command_line.is_empty());
        let mut totals = Vec::new();
        let mut starts = Vec::new();
        let mut phases = BTreeMap::<Mark, Vec<u64>>::new();
        for sample in &engine.samples {
            assert_eq!((sample.status, &sample.error), (Some(0), &None));
            let total = sample.marks_ns[&Mark::Gone];
            let parts = sample.phases();
            assert_eq!(parts.iter().map(|(_, time)| time).sum::<u64>(), total);
            parts
                .iter()
                .for_each(|(mark, time)| phases.entry(*mark).or_default().push(*time));
            totals.push(total);
            starts.push(sample.marks_ns[&Mark::Command]);
        }
        check(&engine.total.unwrap(), &totals);
        check(&engine.start.unwrap(), &starts);
        assert!(engine.phases.keys().eq(phases.keys()));
        engine
            .phases
            .iter()
            .for_each(|(mark, summary)| check(summary, &phases[mark]));
    }
    // A container is more than a process.
    let start = |name| engine(&report, name).start.unwrap().min;
    assert!(start("process") < start("container") && start("process") < start("runc"));
    let marks = &engine(&report, "container").samples[0].marks_ns;
    assert!(marks.contains_key(&Mark::Launched) && marks.contains_key(&Mark::Built));
    let marks = &engine(&report, "runc").samples[0].marks_ns;
    assert!(marks[&Mark::Launched] < marks[&Mark::Built], "{marks:?}");
    // What it was told is in the record, but for what differs from run to run.
    let settings = &engine(&report, "runc").settings["config.json"];
    assert_eq!(
        settings["process"]["args"],
        serde_json::json!(["/.mayfly-probe", "{nonce}", "run"])
    );
    assert_eq!(settings["hostname"], "{id}");
    let settings = &engine(&report, "container").settings["spec.json"];
    assert_eq!(settings["memory"], 512 << 20);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("network: loopback"), "{table}");
    let place = |name: &str| {
        table
            .find(name)
            .unwrap_or_else(|| panic!("{name}: {table}"))
    };
    assert!(place("process") < place("container") && place("process") < place("runc"));
    let rows = fs::read_to_string(comparison.file("csv")).unwrap();
    assert_eq!(rows.lines().count(), 1 + 15);
    let page = fs::read_to_string(comparison.file("html")).unwrap();
    assert!(page.contains("<svg") && page.contains("runc"));
    nothing_is_left();
}

#[test]
fn a_seed_is_an_order() {
    let orders = ["3", "3", "4"].map(|seed| {
        let flags = [
            "--runs",
            "6",
            "--warmup",
            "0",
            "--seed",
            seed,
            "--measure",
            "start",
        ];
        let (_, report) = Comparison::of("process,container,runc", &flags).run();
        let order = report.order.clone();
        for round in order.chunks(3) {
            let mut sorted = round.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2]);
        }
        // What was launched when is what the order says.
        for (position, &index) in (0..).zip(&order) {
            let samples = &report.engines[index as usize].samples;
            let taken = samples.iter().any(|sample| sample.position == position);
            assert!(taken, "{position} in {order:?}");
        }
        order
    });
    assert_eq!(orders[0], orders[1]);
    assert_ne!(orders[0], orders[2]);
}

/// What the script itself needs is known from one that does not sleep.
#[test]
fn a_known_answer_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let engines = [("slow", true), ("quick", false)];
    let engines = engines.map(|(name, slow)| sleeper(folder.path(), name, slow));
    let flags = ["--runs", "20", "--measure", "start"];
    let (_, report) = Comparison::of(&engines.join(","), &flags).run();
    // The shortest of many, as a busy host makes most of them longer.
    let shortest = |name, mark| {
        let summary: Summary = engine(&report, name).phases[&mark];
        summary.min as f64 / 1e6
    };
    for (mark, expected) in KNOWN {
        let found = shortest("slow", mark) - shortest("quick", mark);
        let off = (found - f64::from(expected)).abs();
        assert!(off < ACCURACY_MS, "{mark:?}: {found} ms, not {expected} ms");
    }
}

#[test]
fn what_is_seen_from_inside_is_true() {
    let flags = ["--runs", "1", "--measure", "isolation,steady,memory,load"];
    let folder = tempfile::tempdir().unwrap();
    let own = script(folder.path(), "own", "#!/bin/sh\nexec chroot \"$@\"\n");
    let engines = format!("process,container,runc,{own}");
    let (_, report) = Comparison::of(&engines, &flags).run();
    let facts = |name| engine(&report, name).isolation.clone().unwrap();
    let (process, container, runc) = (facts("process"), facts("container"), facts("runc"));
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    for facts in [&process, &container, &runc] {
        assert_eq!(facts.kernel, release.trim());
        assert!(facts.host_kernel);
    }
    assert_eq!(process.host_namespaces.len(), 7);
    let id = fs::read_link("/proc/self/ns/pid").unwrap();
    assert_eq!(Path::new(&process.namespaces["pid"]), id);
    assert_eq!(report.host.namespaces, process.namespaces);
    assert_ne!(container.namespaces["pid"], process.namespaces["pid"]);
    // Of what shows nothing of itself, nothing is claimed.
    assert_eq!(engine(&report, "own").kind, Kind::Own);
    assert!(facts("own").host_kernel && facts("own").namespaces.is_empty());
    assert!(
        container.host_namespaces.len() <= 1,
        "{:?}",
        container.host_namespaces
    );
    assert!(container.own_user_namespace && container.seccomp == 2);
    assert_eq!(container.capabilities.len(), 14);
    assert_eq!((runc.seccomp, runc.capabilities.len()), (0, 3));
    let syscalls = |facts: &mayfly_compare::model::Isolation| facts.host_syscalls.unwrap();
    assert!(
        syscalls(&container) + 50 < syscalls(&process),
        "{container:?} {process:?}"
    );
    assert_eq!(syscalls(&runc), syscalls(&process));
    assert!(container.devices.len() < 20, "{:?}", container.devices);
    assert!(!container.sees_of_host.contains(&"processes".to_owned()));
    for name in ["process", "container", "runc"] {
        let engine = engine(&report, name);
        let figure = |name: &str| {
            let found = engine.steady.iter().find(|figure| figure.name == name);
            let found = found.unwrap_or_else(|| panic!("{name}: {:?}", engine.steady));
            let mut rounds = found.rounds.clone();
            rounds.sort_by(f64::total_cmp);
            assert_eq!((rounds.len(), rounds[2]), (5, found.value), "{name}");
            found.value
        };
        for name in ["cpu", "syscall", "fault", "volume_read", "volume_write"] {
            assert!(figure(name) > 0.0);
        }
        let points: Vec<u32> = engine.memory.iter().map(|point| point.instances).collect();
        assert_eq!(points, [1, 2, 5, 10]);
        assert!(
            engine
                .memory
                .windows(2)
                .all(|two| two[0].pss_kib < two[1].pss_kib)
        );
        let load = engine.load.as_ref().unwrap();
        assert_eq!((load.failed, load.starts_ns.len()), (0, 4));
        assert!(load.starts_per_second > 0.0);
    }
    nothing_is_left();
}

/// As many as may be asked for, of an engine whose files are watched.
#[test]
fn a_hundred_and_more_can_be_at_once() {
    let flags = ["--parallel", "130", "--measure", "load", "--memory", "64M"];
    let (_, report) = Comparison::of("runc", &flags).run();
    let load = engine(&report, "runc").load.clone().unwrap();
    assert_eq!(
        (load.at_once, load.failed),
        (130, 0),
        "{:?}",
        engine(&report, "runc").notes
    );
    nothing_is_left();
}

/// An engine whose instances have a network of their own, and the host at its other end.
const BRIDGED: &str = "#!/bin/sh -e
root=$1; shift
inside=mayfly-bridged-$$
ip netns add $inside
ip link add mayfly$$ type veth peer name eth0 netns $inside
ip addr add 10.201.7.1/24 dev mayfly$$
ip link set mayfly$$ up
ip -n $inside addr add 10.201.7.2/24 dev eth0
ip -n $inside link set eth0 up
ip -n $inside route add default via 10.201.7.1
status=0
nsenter --net=/run/netns/$inside chroot $root \"$@\" || status=$?
ip netns delete $inside
exit $status
";

/// A network namespace, gone with this.
struct Network(String);

impl Network {
    fn new() -> Self {
        let network = Network(format!("mayfly-test-{}", std::process::id()));
        network.ip(&["netns", "add", &network.0]);
        for what in ["link set lo up", "addr add 10.201.8.1/32 dev lo"] {
            let words: Vec<&str> = what.split(' ').collect();
            network.ip(&[&["-n", &network.0], &words[..]].concat());
        }
        network
    }

    fn ip(&self, words: &[&str]) {
        assert!(Command::new("ip").args(words).status().unwrap().success());
    }

    fn inside(&self, command: &Command) -> Command {
        let mut inside = Command::new("nsenter");
        inside.arg(format!("--net=/run/netns/{}", self.0));
        inside.arg(command.get_program()).args(command.get_args());
        inside
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.0])
            .status();
    }
}

#[test]
fn tcp_goes_by_the_network_that_there_is() {
    let network = Network::new();
    let folder = tempfile::tempdir().unwrap();
    let bridged = script(folder.path(), "bridged", BRIDGED);
    let engines = format!("process,container,runc,{bridged}");
    let mut comparison = Comparison::of(&engines, &["--runs", "1", "--measure", "steady"]);
    comparison.command = network.inside(&comparison.command);
    for kind in ["csv", "html"] {
        let path = comparison.file(kind);
        comparison.command.arg(format!("--{kind}")).arg(path);
    }
    let (output, report) = comparison.run();
    let figures = |name: &str| -> Vec<f64> {
        let steady = engine(&report, name).steady.iter();
        let tcp = steady.filter(|it| it.name.starts_with("tcp_"));
        tcp.map(|it| it.value).collect()
    };
    for (name, way) in [
        ("process", Way::Loopback),
        ("container", Way::None),
        ("runc", Way::None),
        ("bridged", Way::Network),
    ] {
        let engine = engine(&report, name);
        assert_eq!(
            engine.tcp.as_ref(),
            Some(&way),
            "{name}: {:?}",
            engine.notes
        );
        let count = if way == Way::None { 0 } else { 3 };
        assert_eq!(figures(name).len(), count, "{name}");
        assert!(figures(name).iter().all(|&it| it > 0.0), "{name}");
    }
    // There is no figure where there is no network, not even a zero.
    let table = String::from_utf8(output.stdout).unwrap();
    let block = table.split("\n\n").find(|it| it.contains("tcp round trip"));
    let block = block.unwrap_or_else(|| panic!("{table}"));
    let row = block.lines().find(|it| it.starts_with("container"));
    assert_eq!(row.unwrap().matches("none").count(), 3, "{table}");
    assert!(
        block.replace('\n', " ").contains("No network by default: "),
        "{table}"
    );
    let rows = fs::read_to_string(comparison.file("csv")).unwrap();
    let of = |name: &str| {
        let lines = rows
            .lines()
            .filter(|it| it.starts_with(&format!("{name},")));
        lines.filter(|it| it.contains(",tcp_")).count()
    };
    assert_eq!((of("process"), of("container")), (3, 0), "{rows}");
    let page = fs::read_to_string(comparison.file("html")).unwrap();
    assert!(page.contains("TCP there and back (µs)"));
    assert!(page.contains("<span class=\"quiet\">none</span>"));
    nothing_is_left();
}

#[test]
fn a_command_runs_and_its_time_is_seen() {
    let flags = ["--runs", "2", "--measure", "start", "--", "sleep", "0.2"];
    let (_, report) = Comparison::of("container,runc", &flags).run();
    for name in ["container", "runc"] {
        for sample in &engine(&report, name).samples {
            let statuses = (sample.status, sample.command_status);
            assert_eq!(statuses, (Some(0), Some(0)));
            assert_eq!(sample.error, None);
            let command = sample.marks_ns[&Mark::Exit] - sample.marks_ns[&Mark::Command];
            assert!(command >= 200_000_000, "{command}");
        }
    }
}
