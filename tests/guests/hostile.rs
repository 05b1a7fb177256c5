//! A guest that attacks its machine: `tests/hostile`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mayfly_testing::guest::{Controlled, Ended, Guest};
use mayfly_testing::net::Namespace;
use mayfly_testing::processes::children;
use mayfly_testing::tools::{Peer, tool};
use mayfly_testing::{mayfly, test_data, until};

/// All ports and kinds of attack come round in so many seeds.
const SEEDS: u64 = 3072;
/// The guest has said that all seeds are done.
const DONE: u64 = 42;
/// Every so many seeds it says where it is …
const TELL: u64 = 32;
/// … and within this time.
const STEP: Duration = Duration::from_secs(60);

/// What the VMM process may have beside guest memory and its program.
const OWN: u64 = 16 << 20;

/// A machine with every kind of device, and what is behind them on the host.
struct Target {
    namespace: Namespace,
    _ping: Peer,
}

impl Target {
    fn new(name: &str) -> Self {
        let namespace = Namespace::with(name, "tap multi_queue", ",queues=2");
        // Makes packets for the guest: at least those that ask who it is.
        let mut ping = namespace.command("busybox");
        ping.args(["ping", "-q", "10.9.0.2"]);
        ping.stdout(Stdio::null()).stderr(Stdio::null());
        let ping = Peer(ping.spawn().unwrap());
        Target {
            namespace,
            _ping: ping,
        }
    }

    fn guest(&self, cmdline: &str) -> Guest {
        let guest = Guest::of_kernel(&test_data("hostile"));
        let path = |name: &str| guest.path(name).to_str().unwrap().to_owned();
        let (raw, layer, qcow2) = (path("raw"), path("layer"), path("qcow2"));
        for disk in [&raw, &layer] {
            File::create(disk).unwrap().set_len(8 << 20).unwrap();
        }
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &qcow2, "8M"]);
        let args = [
            "--json",
            // More than there is room for below the devices.
            "--memory",
            "3136M",
            "--cpus",
            "2",
            "--watchdog",
            "--disk",
            &format!("path={raw},queues=2"),
            "--disk",
            &format!("path={qcow2},format=qcow2"),
            "--disk",
            &format!("path={layer},ro,iops=200"),
            "--net",
            "tap=tap0,queues=2",
            "--net",
            "user,allow=10.0.2.2",
            "--vsock",
            &format!("cid=3,unix={}", path("vsock")),
            "--balloon",
            "4M,reporting",
            "--console",
            "stdio,virtio",
            "--channel",
            &format!("name=one,unix={}", path("channel")),
            "--channel",
            "name=two,pty",
            "--cmdline",
            cmdline,
        ];
        let guest = guest.args(args);
        self.namespace.enter(guest)
    }
}

/// Talks to the guest over vsock and a channel: takes what it sends, and calls it.
struct Talk {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Talk {
    fn start(folder: &Path) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let listener = UnixListener::bind(folder.join("vsock_1000")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (its, folder) = (over.clone(), folder.to_owned());
        let thread = thread::spawn(move || {
            let mut clients: Vec<UnixStream> = Vec::new();
            let mut buffer = [0; 4096];
            while !its.load(Ordering::Relaxed) {
                clients.extend(listener.accept().ok().map(|(client, _)| client));
                for socket in ["vsock", "channel"] {
                    if let Ok(mut client) = UnixStream::connect(folder.join(socket)) {
                        let _ = client.write_all(b"CONNECT 1024\nhello");
                        clients.push(client);
                    }
                }
                for client in &mut clients {
                    client.set_nonblocking(true).unwrap();
                    let _ = client.read(&mut buffer);
                    let _ = client.write(&buffer);
                }
                let old = clients.len().saturating_sub(16);
                clients.drain(..old);
                thread::sleep(Duration::from_millis(100));
            }
        });
        Talk {
            over,
            threads: vec![thread],
        }
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The process of a machine: the descendant of its supervisor that runs vCPUs.
fn vmm_process(supervisor: u32) -> Option<u32> {
    children(supervisor).into_iter().find_map(|child: u32| {
        let tasks = fs::read_dir(format!("/proc/{child}/task")).ok()?;
        let mut names =
            tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
        match names.any(|name| name.trim() == "vcpu0") {
            true => Some(child),
            false => vmm_process(child),
        }
    })
}

/// The memory that a VMM process has now, but for its guest's.
fn memory(pid: u32) -> Option<u64> {
    /// Pieces of RAM: before the hole, less the kernel's; and behind it.
    const LOW_MIN: u64 = 2 << 30;
    const HIGH: u64 = 64 << 20;
    let (mut all, mut size) = (0, 0);
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))
        .ok()?
        .lines()
    {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next(), words.next());
        let bytes = || {
            value
                .and_then(|value| value.parse().ok())
                .map(|kib: u64| kib << 10)
        };
        match name {
            Some("Size:") => size = bytes()?,
            Some("Rss:") if size < LOW_MIN && size != HIGH => all += bytes()?,
            _ => {}
        }
    }
    Some(all)
}

/// The last seed that the guest has told of.
fn last_seed(console: &str) -> Option<u64> {
    let whole = console.rsplit_once('\n').map_or("", |(lines, _)| lines);
    let mut lines = whole.lines().rev();
    lines.find_map(|line| line.split_once("hostile: seed ")?.1.trim().parse().ok())
}

/// How long a VM takes to answer a command; none if it does not, as it has ended.
fn answer(socket: &Path, command: &str) -> Option<Duration> {
    let started = Instant::now();
    let mut socket = UnixStream::connect(socket).ok()?;
    socket.set_read_timeout(Some(STEP)).ok()?;
    socket.write_all(command.as_bytes()).ok()?;
    socket.write_all(b"\n").ok()?;
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line).ok()?;
    line.contains("\"ok\"").then(|| started.elapsed())
}

const INFO: &str = r#"{"command":"info"}"#;
/// What the user does meanwhile.
const COMMANDS: [&str; 8] = [
    r#"{"command":"pause"}"#,
    INFO,
    r#"{"command":"resume"}"#,
    r#"{"command":"balloon","size":16777216}"#,
    r#"{"command":"limit","device":"net0","limits":{"bandwidth":{"per-second":1000000}}}"#,
    r#"{"command":"metrics"}"#,
    r#"{"command":"balloon","size":0}"#,
    r#"{"command":"limit","device":"net0"}"#,
];

/// What came of an attack.
struct Attack {
    ended: Ended,
    /// The guest stood still.
    hung: bool,
    peak: u64,
    /// The longest time that a command took, and how many were answered.
    slowest: Duration,
    answers: usize,
    last: Option<u64>,
}

impl Attack {
    /// Lets a guest do its seeds, and watches.
    fn run(name: &str, first: u64, count: u64, tell: u64, words: &str) -> Self {
        let target = Target::new(name);
        let guest = target.guest(&format!("seed={first} count={count} tell={tell} {words}"));
        let folder = guest.folder.path().to_owned();
        let mut vm = Controlled::start(guest, Guest::start);
        let _talk = Talk::start(&folder);
        let socket = vm.socket();
        let running = &mut vm.running;
        let (mut most, mut hung, mut last, mut moved) = (0, false, None, Instant::now());
        let mut process = None;
        let (mut slowest, mut answers) = (Duration::ZERO, 0);
        let mut commands = COMMANDS.iter().cycle();
        while running.child.try_wait().unwrap().is_none() && !hung {
            thread::sleep(Duration::from_millis(300));
            if let Some(time) = commands.next().and_then(|command| answer(&socket, command)) {
                slowest = slowest.max(time);
                answers += 1;
            }
            process = process.or_else(|| vmm_process(running.child.id()));
            most = most.max(process.and_then(memory).unwrap_or(0));
            let now = last_seed(&running.console());
            if now != last {
                (last, moved) = (now, Instant::now());
            }
            hung = moved.elapsed() > STEP;
        }
        if hung {
            running.signal(libc::SIGKILL);
        }
        let ended = vm.running.wait();
        Attack {
            last: last_seed(&ended.stdout),
            ended,
            hung,
            peak: most,
            slowest,
            answers,
        }
    }

    /// Why it is not well, if it is not.
    fn fault(&self) -> Option<String> {
        let errors = &self.ended.stderr;
        if self.hung {
            return Some(format!("the machine hangs: {errors}"));
        }
        // Its console's text may end in the middle of a line.
        let record = self.ended.stdout.rfind("{\"outcome\"");
        let record = record
            .map(|at| &self.ended.stdout[at..])
            .unwrap_or_default();
        let record: serde_json::Value = serde_json::from_str(record.trim()).unwrap_or_default();
        if self.ended.code() != Some(0) || record["outcome"] != "power-off" {
            return Some(format!(
                "the machine ends with {}: {record} {errors}",
                self.ended.status
            ));
        }
        if record["guest_status"] != DONE {
            let said: Vec<&str> = self.ended.stdout.lines().rev().take(6).collect();
            return Some(format!("{NOT_DONE}: {record} {said:?}"));
        }
        if self.answers == 0 || self.slowest > STEP / 4 {
            let (answers, slowest) = (self.answers, self.slowest);
            return Some(format!("{answers} answers, one after {slowest:?}"));
        }
        for word in ["panicked", "sandbox:", "signal", "abort"] {
            if errors.contains(word) {
                return Some(errors.clone());
            }
        }
        let most = OWN + program_size();
        (self.peak > most || self.peak == 0).then(|| {
            format!(
                "the VMM process had {} bytes; {most} are its most",
                self.peak
            )
        })
    }
}

/// The guest ended before it had tried all of its seeds.
const NOT_DONE: &str = "the guest is not done";

fn program_size() -> u64 {
    mayfly().metadata().unwrap().len()
}

/// The first seed, and how many, by `MAYFLY_SEEDS=FIRST+COUNT`.
fn seeds() -> (u64, u64) {
    let Ok(text) = std::env::var("MAYFLY_SEEDS") else {
        return (0, SEEDS);
    };
    let (first, count) = text.split_once('+').unwrap();
    (first.parse().unwrap(), count.parse().unwrap())
}

#[test]
fn thousands_of_attacks_leave_the_monitor_well() {
    let (first, count) = seeds();
    let started = Instant::now();
    let attack = Attack::run("hostile", first, count, TELL, "");
    println!(
        "{count} seeds took {:.0} s; {} KiB at most; {} answers within {} ms",
        started.elapsed().as_secs_f64(),
        attack.peak >> 10,
        attack.answers,
        attack.slowest.as_millis()
    );
    let Some(fault) = attack.fault() else { return };
    // Which one was it? Those that it told of last, once more.
    let near = attack.last.unwrap_or(first);
    let again = Attack::run("hostile", near, TELL.min(first + count - near), 1, "");
    match again.fault() {
        Some(other) => panic!(
            "seed {} (MAYFLY_SEEDS={near}+{TELL}): {other}\nat first: {fault}",
            again.last.unwrap_or(near)
        ),
        // A guest whose devices write to memory at random may hit its own program, with what
        // earlier seeds left there. The monitor was well: so must it be with the other seeds.
        None if fault.starts_with(NOT_DONE) => {
            println!("the guest died of the seeds {near}+{TELL}, but not of them alone: {fault}");
            let (next, end) = (near + TELL, first + count);
            if next < end {
                let rest = Attack::run("hostile", next, end - next, TELL, "");
                assert_eq!(rest.fault(), None, "after {fault}");
            }
        }
        None => panic!("one of the seeds {near}+{TELL}, but not by itself: {fault}"),
    }
}

/// So many seeds are done while a second CPU attacks the same devices.
const SEEDS_BESIDE: u64 = 768;

#[test]
fn two_cpus_attack_at_once() {
    let attack = Attack::run("both", 0, SEEDS_BESIDE, TELL, "both");
    assert_eq!(attack.fault(), None);
    let console = &attack.ended.stdout;
    let (_, beside) = console.split_once("hostile: attacks beside ").unwrap();
    let beside: u64 = beside.lines().next().unwrap().parse().unwrap();
    println!(
        "{SEEDS_BESIDE} seeds, and beside them {beside} attacks; {} KiB at most",
        attack.peak >> 10
    );
    assert!(beside > SEEDS_BESIDE, "{beside}");
}

/// How long the flood is watched.
const FLOOD: Duration = Duration::from_secs(20);
/// Messages in a second, and what may be said beside them (src/logging.rs).
const MESSAGES: u64 = 50 + 2;

#[test]
fn a_flood_costs_the_guest_and_not_the_host() {
    let target = Target::new("flood");
    let mut vm = Controlled::start(target.guest("flood"), Guest::start);
    let started = Instant::now();
    vm.running.expect("hostile: devices");
    let process = vmm_process(vm.running.child.id()).unwrap();
    let _talk = Talk::start(vm.running.folder.path());
    let (mut slowest, mut most) = (Duration::ZERO, 0);
    while started.elapsed() < FLOOD {
        slowest = slowest.max(answer(&vm.socket(), INFO).unwrap());
        most = most.max(memory(process).unwrap());
        thread::sleep(Duration::from_millis(200));
    }
    vm.ctl(&["shutdown", "--deadline", "1"]);
    let flooded = started.elapsed();
    let ended = vm.running.wait();
    let messages = ended.stderr.lines().count() as u64;
    println!(
        "{messages} messages in {:.0} s, {} KiB, answers within {} ms",
        flooded.as_secs_f64(),
        most >> 10,
        slowest.as_millis()
    );
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    assert!(most <= OWN + program_size(), "{most}");
    assert!(slowest < STEP / 4, "{slowest:?}");
    assert!(messages <= MESSAGES * (flooded.as_secs() + 1), "{messages}");
}

/// How long two VMs are beside each other, on one CPU.
const BESIDE: Duration = Duration::from_secs(20);
/// What the one that only computes has, at least, of the CPU time that both have: half of
/// it, but for the other's supervisor and helpers, which are not in its control group. Without
/// groups, its threads were seen to leave a quarter.
const SHARE: f64 = 0.4;

/// All that this thread starts runs on one CPU.
fn stay_on_one_cpu() {
    // SAFETY: a set of bits, all of them clear.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: touches no memory.
    let cpu = unsafe { libc::sched_getcpu() };
    // SAFETY: sets one of its bits, or none.
    unsafe { libc::CPU_SET(usize::try_from(cpu).unwrap(), &mut set) };
    // SAFETY: a live set, and its size.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    assert_eq!(result, 0);
}

/// The CPU time that a process and its descendants have had, in ticks (`proc_pid_stat(5)`);
/// of those that ended, what their parents waited for.
fn cpu_time(pid: u32) -> u64 {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let stat = read("stat");
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let times = fields.split(' ').skip(11).take(4);
    let own: u64 = times.map(|time| time.parse::<u64>().unwrap()).sum();
    own + children(pid).into_iter().map(cpu_time).sum::<u64>()
}

#[test]
fn a_flood_leaves_others_their_share_of_a_cpu() {
    stay_on_one_cpu();
    let target = Target::new("share");
    let mut flood = Controlled::start(target.guest("flood both"), Guest::start);
    flood.running.expect("hostile: devices");
    let _talk = Talk::start(flood.running.folder.path());
    let quiet = Guest::of_kernel(&test_data("hostile"));
    let endless = format!("work={}", u64::MAX);
    let quiet = quiet.args(["--cmdline", &endless, "--memory", "64M"]);
    let quiet = quiet.start();
    until("a guest that runs", || {
        vmm_process(quiet.child.id()).is_some_and(|pid| cpu_time(pid) > 100)
    });
    let times = || [quiet.child.id(), flood.running.child.id()].map(cpu_time);
    let before = times();
    thread::sleep(BESIDE);
    let after = times();
    for running in [&quiet, &flood.running] {
        let lives = vmm_process(running.child.id()).is_some();
        assert!(lives, "a guest ended: {}", running.errors());
    }
    let [quiet, flood] = [0, 1].map(|vm: usize| (after[vm] - before[vm]) as f64);
    let share = quiet / (quiet + flood);
    println!(
        "beside a flood that had {flood} ticks, another guest had {quiet}: {:.0} %",
        100.0 * share
    );
    assert!(share >= SHARE, "{share}");
}
