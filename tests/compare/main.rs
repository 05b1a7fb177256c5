//! `mayfly compare` without a VM: real processes and containers on this host.
//!
//! Run by scripts/test, as root, one by one. Engines with VMs are compared in
//! `tests/guests/compare.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use mayfly::compare::model::{EngineReport, Kind, Mark, Report, Way};
use mayfly::compare::statistics::Summary;

/// A word that no other process has, and a time that no test takes.
const LONG: &str = "98765";
const PATIENCE: Duration = Duration::from_secs(60);
const NAP: Duration = Duration::from_millis(50);
/// What a known answer may be off by.
const ACCURACY_MS: f64 = 2.0;
/// All comparisons' folders, instances and control groups begin so.
const PREFIX: &str = "mayfly-compare-";

fn mayfly() -> Command {
    let program = std::env::var_os("MAYFLY_BIN").expect("MAYFLY_BIN: run scripts/test");
    let mut command = Command::new(program);
    command.arg("compare").stdin(Stdio::null());
    command
}

/// A comparison of these engines, and where its record is.
struct Comparison {
    folder: tempfile::TempDir,
    command: Command,
}

impl Comparison {
    fn of(engines: &str, flags: &[&str]) -> Self {
        Comparison::of_image(Path::new("demo"), engines, flags)
    }

    fn of_image(image: &Path, engines: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = mayfly();
        command.args(["--engines", engines, "--json"]);
        command.arg(folder.path().join("record.json"));
        command.arg(image).args(flags);
        Comparison { folder, command }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn record(&self) -> Report {
        let text = fs::read(self.file("record.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    fn run(&mut self) -> (Output, Report) {
        let output = self.command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        (output, self.record())
    }

    fn start(&mut self) -> Child {
        let output = [Stdio::null(), Stdio::null()];
        let [output, errors] = output;
        self.command.stdout(output).stderr(errors);
        // A shell that starts this in the background has it ignore Ctrl-C.
        // SAFETY: a system call between fork and exec.
        unsafe {
            self.command.pre_exec(|| {
                libc::signal(libc::SIGINT, libc::SIG_DFL);
                Ok(())
            });
        }
        self.command.spawn().unwrap()
    }
}

/// Waits for what must come.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what}: not within a minute");
        thread::sleep(NAP);
    }
}

/// What a comparison would leave: folders, processes, mounts, control groups.
fn leftovers() -> Vec<String> {
    let mut found = Vec::new();
    let temporary = std::env::temp_dir();
    for folder in ["/run", "/dev/shm", "/var/tmp"]
        .map(Path::new)
        .iter()
        .chain([&temporary.as_path()])
    {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                found.push(entry.path().display().to_string());
            }
        }
    }
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        if words.contains(PREFIX) || words.contains(LONG) {
            found.push(words);
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    found.extend(
        mounts
            .lines()
            .filter(|line| line.contains(PREFIX))
            .map(str::to_owned),
    );
    let groups = Command::new("find")
        .args([
            "/sys/fs/cgroup",
            "-type",
            "d",
            "-name",
            &format!("{PREFIX}*"),
        ])
        .output()
        .unwrap();
    found.extend(
        String::from_utf8_lossy(&groups.stdout)
            .lines()
            .map(str::to_owned),
    );
    found
}

fn nothing_is_left() {
    let mut last = Vec::new();
    let start = Instant::now();
    loop {
        last.clone_from(&leftovers());
        if last.is_empty() {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "left behind: {last:#?}");
        thread::sleep(NAP);
    }
}

fn children(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(1));
        if parent == Some(pid.to_string().as_str()) {
            found.push(entry.file_name().to_str().unwrap().parse().unwrap());
        }
    }
    found
}

fn kill(pid: u32, signal: i32) {
    let pid = i32::try_from(pid).unwrap();
    // SAFETY: numbers.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// Waits until containers run the long command.
fn running(instances: usize) {
    until("the command runs", || {
        let words = |entry: fs::DirEntry| fs::read(entry.path().join("cmdline")).ok();
        let all = fs::read_dir("/proc").unwrap().flatten().filter_map(words);
        let long = format!("sleep\0{LONG}\0");
        all.filter(|words| words == long.as_bytes()).count() >= instances
    });
}

/// Which instance a process is of, if its command line says so.
fn instance(pid: u32) -> Option<u32> {
    let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words = String::from_utf8_lossy(&words).into_owned();
    let (_, rest) = words.split_once("/instance-")?;
    rest.split('/').next()?.parse().ok()
}

fn engine<'a>(report: &'a Report, name: &str) -> &'a EngineReport {
    let found = report.engines.iter().find(|engine| engine.name == name);
    let found = found.unwrap_or_else(|| panic!("{name} is not in the record"));
    assert_eq!(found.missing, None, "{name}");
    found
}

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

/// A program on its own as an image, with what a test adds to it.
fn image(spoil: impl FnOnce(&Path)) -> tempfile::TempDir {
    let image = tempfile::tempdir().unwrap();
    fs::set_permissions(image.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(image.path().join("bin")).unwrap();
    fs::copy("/bin/busybox", image.path().join("bin/busybox")).unwrap();
    for name in ["chmod", "echo", "mv", "sh", "sleep", "touch"] {
        symlink("busybox", image.path().join("bin").join(name)).unwrap();
    }
    spoil(image.path());
    image
}

/// Debian's `/run` executes nothing, and is small.
#[test]
fn what_the_host_has_in_memory_may_be_little() {
    let image = image(|root| fs::write(root.join("large"), vec![0x5a; 8 << 20]).unwrap());
    for options in ["noexec", "size=16m"] {
        let flags = ["--runs", "1", "--measure", "start"];
        let mut comparison = Comparison::of_image(image.path(), "process,container,runc", &flags);
        let script = "mount -t tmpfs -o $0 tmpfs /run && \"$@\"; status=$?; \
                      ls -A /run /var/tmp | grep ^mayfly-compare && exit 99; exit $status";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, options]);
        command.arg(comparison.command.get_program());
        command.args(comparison.command.get_args());
        comparison.command = command;
        let (_, report) = comparison.run();
        for name in ["process", "container", "runc"] {
            assert_eq!(engine(&report, name).samples.len(), 1, "{options}");
        }
        nothing_is_left();
    }
}

/// Links of an image lead nowhere on the host.
#[test]
fn an_image_cannot_have_files_of_the_host_written() {
    let host = tempfile::tempdir().unwrap();
    let victim = host.path().join("victim");
    fs::write(&victim, "safe").unwrap();
    let image = image(|root| {
        for name in [".mayfly-trial", ".mayfly-probe", ".mayfly-volume"] {
            symlink(&victim, root.join(name)).unwrap();
        }
    });
    let flags = ["--runs", "1", "--measure", "steady"];
    let (_, report) = Comparison::of_image(image.path(), "process", &flags).run();
    assert!(!engine(&report, "process").steady.is_empty());
    assert_eq!(fs::read_to_string(&victim).unwrap(), "safe");
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 1);
    nothing_is_left();
}

/// What a container writes, neither the host executes nor another one sees.
#[test]
fn a_container_cannot_change_the_image() {
    let host = tempfile::tempdir().unwrap();
    let proof = host.path().join("proof");
    let image = image(|_| {});
    let script = format!(
        "[ ! -e /spoilt ] && touch /spoilt && echo '#!/bin/sh' >/new && \
         echo 'touch {}' >>/new && chmod 755 /new && mv /new /.mayfly-probe",
        proof.display()
    );
    let flags = ["--runs", "2", "--measure", "start,isolation", "--"];
    let flags = [&flags[..], &["sh", "-c", &script]].concat();
    let engines = ["runc", "container"];
    let (_, report) = Comparison::of_image(image.path(), &engines.join(","), &flags).run();
    for name in engines {
        let engine = engine(&report, name);
        assert!(engine.isolation.is_some(), "{engine:?}");
        for sample in &engine.samples {
            assert_eq!((sample.status, &sample.error), (Some(0), &None), "{name}");
        }
    }
    assert!(!proof.exists());
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

/// Milliseconds of each phase of the engine whose answer is known.
const KNOWN: [(Mark, u32); 7] = [
    (Mark::Launched, 20),
    (Mark::Built, 35),
    (Mark::Kernel, 10),
    (Mark::Init, 15),
    (Mark::Command, 40),
    (Mark::Exit, 25),
    (Mark::Gone, 30),
];

/// An engine that sleeps so long in each phase, or not at all.
fn sleeper(folder: &Path, name: &str, slow: bool) -> String {
    let mut script = "#!/bin/bash\nnonce=$3\n".to_owned();
    for (mark, time) in KNOWN {
        let time = if slow { time } else { 0 };
        script += &format!("sleep 0.{time:03}\n");
        script += &match mark {
            Mark::Command => "printf '\\036mayfly %s started\\n' $nonce\n".to_owned(),
            Mark::Exit => "printf '\\036mayfly %s ended 0\\n' $nonce\n".to_owned(),
            Mark::Gone => "exit 0\n".to_owned(),
            _ => {
                let word = serde_json::to_value(mark).unwrap();
                format!("echo {} >&$MAYFLY_MARKS\n", word.as_str().unwrap())
            }
        };
    }
    self::script(folder, name, &script)
}

/// An engine of one's own.
fn script(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    format!("{name}={}", path.display())
}

/// What the script itself needs is known from one that does not sleep.
#[test]
fn a_known_answer_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let engines = [("slow", true), ("quick", false)];
    let engines = engines.map(|(name, slow)| sleeper(folder.path(), name, slow));
    let flags = ["--runs", "20", "--measure", "start"];
    let (_, report) = Comparison::of(&engines.join(","), &flags).run();
    let middle = |name, mark| {
        let summary: Summary = engine(&report, name).phases[&mark];
        summary.median as f64 / 1e6
    };
    for (mark, expected) in KNOWN {
        let found = middle("slow", mark) - middle("quick", mark);
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
    let syscalls = |facts: &mayfly::compare::model::Isolation| facts.host_syscalls.unwrap();
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

/// An accident at the first start is no property of an engine.
#[test]
fn what_fails_once_is_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let been = folder.path().join("been").display().to_string();
    let once =
        format!("#!/bin/sh\n[ -e {been} ] || {{ touch {been}; exit 1; }}\nexec chroot \"$@\"\n");
    let engines = [("once", once.as_str()), ("never", "#!/bin/sh\nexit 1\n")];
    let engines = engines.map(|(name, text)| script(folder.path(), name, text));
    let flags = ["--runs", "2", "--measure", "start"];
    let (_, report) = Comparison::of(&engines.join(","), &flags).run();
    let once = engine(&report, "once");
    assert_eq!(once.start.unwrap().count, 2);
    assert!(!once.notes.iter().any(|it| it.contains("asked for less")));
    let never = report.engines.iter().find(|it| it.name == "never");
    let why = never.unwrap().missing.clone().unwrap();
    assert!(why.contains("it does not work here"), "{why}");
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
fn a_command_runs_and_its_status_is_seen() {
    let flags = [
        "--runs",
        "2",
        "--measure",
        "start",
        "--",
        "sh",
        "-c",
        "sleep 0.2; exit 3",
    ];
    let (_, report) = Comparison::of("container,runc", &flags).run();
    for name in ["container", "runc"] {
        for sample in &engine(&report, name).samples {
            assert_eq!((sample.status, &sample.error), (Some(3), &None));
            let command = sample.marks_ns[&Mark::Exit] - sample.marks_ns[&Mark::Command];
            assert!(command >= 200_000_000, "{command}");
        }
    }
}

#[test]
fn who_is_not_here_is_missing() {
    let flags = ["--runs", "1", "--measure", "start"];
    let mut comparison = Comparison::of("process,runc,firecracker", &flags);
    comparison
        .command
        .env("PATH", "/usr/bin/nowhere:/bin/nowhere");
    let output = comparison.command.output().unwrap();
    // Without squashfs-tools there is no image.
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("squashfs-tools"));
    let folder = tempfile::tempdir().unwrap();
    for tool in ["unsquashfs", "sqfstar"] {
        let path = std::env::split_paths(&std::env::var_os("PATH").unwrap())
            .map(|folder| folder.join(tool))
            .find(|path| path.exists());
        symlink(path.unwrap(), folder.path().join(tool)).unwrap();
    }
    comparison.command.env("PATH", folder.path());
    let (output, report) = comparison.run();
    for name in ["runc", "firecracker"] {
        let engine = report
            .engines
            .iter()
            .find(|engine| engine.name == name)
            .unwrap();
        assert_eq!(
            engine.missing.as_deref(),
            Some(format!("{name} is not installed").as_str())
        );
        assert!(engine.samples.is_empty() && engine.total.is_none());
    }
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(table.contains("runc is not installed"), "{table}");
}

#[test]
fn an_interrupted_comparison_keeps_what_it_has() {
    let flags = ["--runs", "10000", "--measure", "start"];
    let mut comparison = Comparison::of("process,container", &flags);
    let mut child = comparison.start();
    // One has been tried, and warmed up.
    until("samples are taken", || {
        let seconds = children(child.id()).into_iter();
        let mut launchers = seconds.flat_map(children).filter_map(instance);
        launchers.any(|number| number > 5)
    });
    kill(child.id(), libc::SIGINT);
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    let report = comparison.record();
    assert!(report.interrupted);
    let taken = engine(&report, "process").samples.len();
    assert!((1..10_000).contains(&taken), "{taken}");
    nothing_is_left();
}

/// Where the host executes no probe, what others are is still found.
#[test]
fn a_host_that_cannot_be_looked_at_is_no_end() {
    let cache = PathBuf::from(std::env::var_os("MAYFLY_CACHE").unwrap());
    let own = tempfile::tempdir().unwrap();
    let probe = own.path().join("default/probe");
    fs::create_dir(probe.parent().unwrap()).unwrap();
    fs::copy(cache.join("default/probe"), &probe).unwrap();
    fs::set_permissions(&probe, fs::Permissions::from_mode(0o644)).unwrap();
    let flags = ["--runs", "1", "--measure", "start,isolation"];
    let mut comparison = Comparison::of("process,container", &flags);
    comparison.command.env("MAYFLY_CACHE", own.path());
    let (_, report) = comparison.run();
    assert_eq!(engine(&report, "container").samples.len(), 1);
    let told = report
        .warnings
        .iter()
        .any(|it| it.contains("the host could not be looked at"));
    assert!(told, "{report:?}");
    nothing_is_left();
}

/// Nobody takes minutes for nothing.
#[test]
fn what_fails_at_the_end_takes_nothing_along() {
    let flags = ["--runs", "1", "--measure", "start", "--json", "/dev/full"];
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows");
    let mut command = mayfly();
    command.args(["--engines", "process"]).args(flags);
    let output = command.arg("--csv").arg(&rows).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("/dev/full"));
    assert!(String::from_utf8_lossy(&output.stdout).contains("process"));
    assert_eq!(fs::read_to_string(&rows).unwrap().lines().count(), 2);

    // An engine that is gone from its second run on.
    let own = sleeper(folder.path(), "own", false);
    let script = folder.path().join("own");
    let text = fs::read_to_string(&script).unwrap();
    let last = "[ ! -e $0.tried ] || rm $0\ntouch $0.tried\nexit 0";
    fs::write(&script, text.replace("exit 0", last)).unwrap();
    let flags = ["--runs", "3", "--warmup", "0", "--measure", "start"];
    let mut comparison = Comparison::of(&own, &flags);
    let output = comparison.command.output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("own"));
    let report = comparison.record();
    assert!(report.interrupted);
    assert_eq!(engine(&report, "own").samples.len(), 1);

    // What is never written is never made.
    let mut comparison = Comparison::of_image(Path::new("./no-such-image"), "process", &[]);
    assert_eq!(comparison.command.output().unwrap().status.code(), Some(2));
    assert!(!comparison.file("record.json").exists());
    nothing_is_left();
}

/// Docker's daemon may be stuck: nobody need wait for it.
#[test]
fn ctrl_c_ends_what_prepares() {
    let folder = tempfile::tempdir().unwrap();
    let docker = folder.path().join("docker");
    fs::write(&docker, format!("#!/bin/sh\nexec sleep {LONG}\n")).unwrap();
    fs::set_permissions(&docker, fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", folder.path().display());
    let mut comparison = Comparison::of("process,docker", &["--runs", "1"]);
    comparison.command.env("PATH", path);
    let mut child = comparison.start();
    running(1);
    let asked = Instant::now();
    kill(child.id(), libc::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(asked.elapsed() < Duration::from_secs(10));
    nothing_is_left();
}

/// What lies in memory cannot be forgotten.
#[test]
fn files_lie_on_a_disk_if_they_are_to_be_forgotten() {
    for drop in [false, true] {
        let flags = ["--runs", "1", "--measure", "start", "--drop-caches"];
        let flags = &flags[..flags.len() - usize::from(!drop)];
        let (_, report) = Comparison::of("process,container", flags).run();
        let container = engine(&report, "container");
        let program = &container.command_line[0];
        assert_eq!(program.starts_with("/var/tmp/"), drop, "{program}");
        assert!(container.start.is_some());
        nothing_is_left();
    }
}

/// Whoever is killed, the other cleans up.
#[test]
fn killed_it_leaves_nothing() {
    for second in [false, true] {
        for engine in ["container", "runc"] {
            let flags = ["--runs", "1", "--measure", "start", "--", "sleep", LONG];
            let mut comparison = Comparison::of(engine, &flags);
            let mut child = comparison.start();
            running(1);
            let victim = match second {
                false => child.id(),
                true => *children(child.id()).first().unwrap(),
            };
            kill(victim, libc::SIGKILL);
            let status = child.wait().unwrap();
            match second {
                false => assert_eq!(status.signal(), Some(libc::SIGKILL)),
                true => assert_eq!(status.code(), Some(128 + libc::SIGKILL)),
            }
            nothing_is_left();
        }
    }
}

/// It does not read for ever what is written for ever.
#[test]
fn a_flood_is_no_hang() {
    let flags = ["--runs", "1", "--measure", "start", "--"];
    let flags = [&flags[..], &["sh", "-c", "yes & exit 0"]].concat();
    let mut comparison = Comparison::of("process", &flags);
    let mut child = comparison.start();
    until("it ends", || child.try_wait().unwrap().is_some());
    let report = comparison.record();
    let missing = report.engines.first().unwrap().missing.clone();
    assert!(missing.unwrap().contains("did not end"));
    nothing_is_left();
}

#[test]
fn who_starts_it_may_ignore_the_ends_of_children() {
    let mut comparison = Comparison::of("process", &["--runs", "1", "--measure", "start"]);
    // SAFETY: a system call between fork and exec.
    unsafe {
        comparison.command.pre_exec(|| {
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            Ok(())
        });
    }
    let mut child = comparison.command.stdout(Stdio::null()).spawn().unwrap();
    until("it ends", || child.try_wait().unwrap().is_some());
    assert_eq!(engine(&comparison.record(), "process").samples.len(), 1);
    nothing_is_left();
}

/// What runc has begun with when it is killed, it does not know itself.
#[test]
fn groups_of_a_launcher_that_hangs_are_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = std::env::var_os("PATH").unwrap();
    let mut all = std::env::split_paths(&path).map(|it| it.join("runc"));
    let runc = all.find(|it| it.exists()).unwrap();
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *\" run \"*)\n\
         for id; do :; done\n\
         mkdir /sys/fs/cgroup/$id /sys/fs/cgroup/cpu/$id 2>/dev/null\n\
         exec sleep {LONG};;\n\
         esac\nexec {} \"$@\"\n",
        runc.display()
    );
    let own = folder.path().join("runc");
    fs::write(&own, script).unwrap();
    fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).unwrap();
    let flags = ["--runs", "1", "--measure", "start", "--patience", "1"];
    let mut comparison = Comparison::of("runc", &flags);
    let folders = [folder.path().to_owned()];
    let folders = folders.into_iter().chain(std::env::split_paths(&path));
    comparison
        .command
        .env("PATH", std::env::join_paths(folders).unwrap());
    let (_, report) = comparison.run();
    let missing = report.engines.first().unwrap().missing.clone();
    assert!(missing.unwrap().contains("does not work here"));
    nothing_is_left();
}

/// A shell may have left it some.
#[test]
fn children_that_it_had_before_are_not_ended() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let script = r#"
        exec > >(cat >/dev/null; sleep 1; echo whole >"$1")
        shift
        exec "$@" compare --engines process --runs 1 --measure start"#;
    let mut command = Command::new("bash");
    command.args(["-c", script, "bash"]).arg(&log);
    command.arg(std::env::var_os("MAYFLY_BIN").unwrap());
    assert!(command.status().unwrap().success());
    until("its reader ends", || log.exists());
    assert_eq!(fs::read_to_string(&log).unwrap(), "whole\n");
    nothing_is_left();
}

/// Both are killed: what was launched ends, too, and the next comparison cleans up.
#[test]
fn the_next_one_removes_what_was_left() {
    let own = tempfile::tempdir().unwrap();
    let script = own.path().join("own");
    // Nothing ends with this one but itself.
    let text = format!("#!/bin/sh\nsetsid sleep {LONG} &\nsleep {LONG}\n");
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let own = format!("own={}", script.display());
    for engine in ["runc", "process", "container", &own] {
        let flags = ["--runs", "1", "--measure", "start", "--", "sleep", LONG];
        let mut comparison = Comparison::of(engine, &flags);
        let mut child = comparison.start();
        running(1);
        let second = *children(child.id()).first().unwrap();
        kill(child.id(), libc::SIGSTOP);
        kill(second, libc::SIGKILL);
        kill(child.id(), libc::SIGKILL);
        child.wait().unwrap();
        // Its lock is free when it has no files any more.
        let files = PathBuf::from(format!("/proc/{second}/fd"));
        until("the second is gone", || {
            fs::read_dir(&files).map_or(0, Iterator::count) == 0
        });
        assert!(!leftovers().is_empty());
        if ["process", "container"].contains(&engine) {
            // A group that a dying process is in cannot be removed.
            let has_processes = |group: &String| {
                fs::read(Path::new(group).join("cgroup.procs")).is_ok_and(|it| !it.is_empty())
            };
            until("the command ends", || {
                let left = leftovers();
                !left.iter().any(|it| it.contains(LONG) || has_processes(it))
            });
        }
        Comparison::of("process", &["--runs", "1", "--measure", "start"]).run();
        nothing_is_left();
    }
}

/// Where its folder was, anybody may have made one by the time the last half ends.
#[test]
fn a_folder_in_its_place_is_left_alone() {
    let proof = tempfile::tempdir().unwrap();
    let flags = ["--runs", "1", "--measure", "start"];
    let mut comparison = Comparison::of("process", &flags);
    // It cannot end until its table is read.
    let (mut reader, writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while (&writer).write(&[0; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    comparison.command.stdout(writer).stderr(Stdio::null());
    let mut child = comparison.command.spawn().unwrap();
    drop(comparison.command);
    let folder = || leftovers().into_iter().find(|it| it.starts_with('/'));
    until("its folder appears", || folder().is_some());
    let place = folder().unwrap();
    until("its folder is removed", || folder().is_none());

    let elsewhere = proof.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::set_permissions(&elsewhere, fs::Permissions::from_mode(0o755)).unwrap();
    let evil = serde_json::json!([["touch", proof.path().join("proof")]]);
    fs::create_dir(&place).unwrap();
    fs::write(Path::new(&place).join("undo.json"), evil.to_string()).unwrap();
    symlink(&elsewhere, Path::new(&place).join("link")).unwrap();
    std::io::copy(&mut reader, &mut std::io::sink()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(fs::read_dir(&place).unwrap().count(), 2);
    assert!(!proof.path().join("proof").exists());
    fs::remove_dir_all(place).unwrap();
    nothing_is_left();
}

#[test]
fn what_cannot_be_is_told() {
    for (args, status, said) in [
        (&["--engines", "vmware"][..], 2, "NAME=PROGRAM"),
        (&["--json", "/nowhere/record"][..], 2, "/nowhere/record"),
        (&["--memory", "much"][..], 2, "--memory much"),
        (&["./no-such-image"][..], 2, "no-such-image"),
        (&["--runs", "0"][..], 2, "--runs"),
    ] {
        let output = mayfly().args(args).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {errors}");
        assert!(errors.contains(said), "{args:?}: {errors}");
    }
    nothing_is_left();
}
