//! Commands to running VMs, by `mayfly ctl` and by hand.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mayfly_testing::guest::{Controlled, Guest};
use mayfly_testing::net::Namespace;
use mayfly_testing::tools::{Peer, tool};
use mayfly_testing::{mayfly, until};

/// The last number that the guest printed behind `now: `, on a whole line.
fn last_now(console: &str) -> u64 {
    let whole = console.rsplit_once('\n').map_or("", |(lines, _)| lines);
    let line = whole
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("now: "));
    line.map_or(0, |number| number.trim().parse().unwrap_or(0))
}

fn size(path: &Path) -> u64 {
    path.metadata().map_or(0, |metadata| metadata.len())
}

#[test]
fn a_pause_stops_time_for_nobody_else() {
    const LEN: u64 = 48 << 20;
    const PAUSE: Duration = Duration::from_secs(5);
    let namespace = Namespace::new("pause");
    let guest = Guest::new(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=48 2>/dev/null
         echo sum: $(md5sum /tmp/data | cut -d ' ' -f 1)
         (while :; do echo now: $(date +%s); sleep 1; done) &
         nc 10.9.0.1 5001 -e dd if=/tmp/data bs=64k 2>/dev/null
         echo sent: all
         sleep 1000",
    );
    let folder = tempfile::tempdir().unwrap();
    let received = folder.path().join("received");
    let target = format!("of={}", received.display());
    let mut nc = namespace.command("busybox");
    nc.args(["nc", "-l", "-p", "5001", "-e", "dd", "bs=64k", &target]);
    let mut sink = Peer(nc.stderr(std::process::Stdio::null()).spawn().unwrap());
    let mut vm = Controlled::start(guest, |guest| namespace.start(guest));
    until("a byte received", || size(&received) > 1 << 20);
    vm.ctl(&["pause"]);
    vm.ctl(&["pause"]); // again is no mistake
    assert_eq!(vm.info()["state"], "paused");
    std::thread::sleep(Duration::from_secs(1));
    let (at_pause, console) = (size(&received), vm.running.console());
    assert!(at_pause < LEN, "paused too late: {at_pause}");
    std::thread::sleep(PAUSE);
    assert_eq!(size(&received), at_pause);
    assert_eq!(vm.running.console(), console);
    vm.ctl(&["resume"]);
    vm.running.expect("sent: all");
    assert!(sink.0.wait().unwrap().success());
    assert_eq!(size(&received), LEN);
    let sum = tool("md5sum", &[received.to_str().unwrap()]);
    let sum = sum.split(' ').next().unwrap();
    assert!(vm.running.console().contains(&format!("sum: {sum}")));
    // The clock did not stand still with the guest.
    let before = last_now(&vm.running.console());
    until("another second", || {
        last_now(&vm.running.console()) > before
    });
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let off = now.as_secs() as i64 - last_now(&vm.running.console()) as i64;
    assert!((-2..=2).contains(&off), "the guest is {off} s behind");
}

#[test]
fn every_command_is_answered_and_garbage_harms_nobody() {
    let guest =
        Guest::new("trap '' TERM HUP; while :; do echo tick; sleep 1; done").args(["--cpus", "2"]);
    let mut vm = Controlled::start(guest, Guest::start);
    vm.running.expect("tick");
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(vm.socket().parent().unwrap()), 0o700);

    let info = vm.info();
    assert_eq!(info["name"], "vm");
    assert_eq!(info["pid"], vm.running.child.id());
    assert_eq!(info["state"], "running");
    assert_eq!(
        (&info["cpus"], &info["memory"]),
        (&2.into(), &(512u64 << 20).into())
    );
    assert_eq!(info["devices"][0]["name"], "rng");
    let list = vm.mayfly(&["list", "--json"]);
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!(list[0]["pid"], info["pid"]);
    let table = String::from_utf8(vm.mayfly(&["list"]).stdout).unwrap();
    assert!(table.lines().nth(1).unwrap().contains("running"), "{table}");

    let metrics = vm.ctl(&["metrics"]);
    let sample = |name: &str| -> f64 {
        let line = metrics.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in {metrics}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(sample("mayfly_vcpu_exits_total{vcpu=\"1\",reason=") >= 0.0);
    assert!(sample("mayfly_vcpu_exits_total{vcpu=\"0\",reason=\"io_out\"}") > 10.0);
    assert!(sample("mayfly_boot_phase_seconds{phase=\"guest_init\"}") > 0.0);
    assert!(sample("mayfly_device_chains_total{device=\"rng\"}") >= 0.0);
    assert_eq!(sample("mayfly_paused"), 0.0);

    // Another of the same name is refused, before it does anything.
    let mut second = Guest::new("");
    second.command.env("MAYFLY_RUNTIME_DIR", vm.runtime());
    let second = second.args(["--name", "vm"]).start().wait();
    assert_eq!(second.code(), Some(2), "{second:?}");
    assert!(second.stderr.contains("--name vm: a VM of that name runs"));

    // Garbage, by hand.
    let mut stream = UnixStream::connect(vm.socket()).unwrap();
    let mut answers = BufReader::new(stream.try_clone().unwrap()).lines();
    for garbage in [
        &b"GET / HTTP/1.1\r\n"[..],
        b"\0\xff\xff\n",
        b"{\"command\":\"pause\",\"x\":1}\n",
        b"{\"command\":\"shutdown\",\"deadline\":-1}\n",
    ] {
        stream.write_all(garbage).unwrap();
        let answer = answers.next().unwrap().unwrap();
        assert!(answer.starts_with(r#"{"error":"#), "{answer}");
    }
    let mut long = UnixStream::connect(vm.socket()).unwrap();
    long.write_all(&[b'['; 20 << 10]).unwrap();
    let mut answer = String::new();
    let _ = long.read_to_string(&mut answer);
    assert!(answer.contains("too long"), "{answer}");
    assert_eq!(vm.info()["state"], "running");

    // Events of all that follows, to the end.
    let mut command = Command::new(mayfly());
    command.env("MAYFLY_RUNTIME_DIR", vm.runtime());
    command.args(["ctl", "vm", "events"]);
    let mut events = command
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let (sender, lines) = std::sync::mpsc::channel();
    let pipe = BufReader::new(events.stdout.take().unwrap());
    std::thread::spawn(move || {
        for line in pipe.lines() {
            let _ = sender.send(line.unwrap());
        }
    });
    // It tells of what happens once it listens.
    until("an event", || {
        vm.ctl(&["pause"]);
        vm.ctl(&["resume"]);
        lines.recv_timeout(Duration::from_millis(100)).is_ok()
    });
    vm.ctl(&["nmi"]);
    let ticks = vm.running.console().matches("tick").count();
    until("another tick", || {
        vm.running.console().matches("tick").count() > ticks + 1
    });
    // Its processes do not heed the power button: the deadline ends it.
    vm.ctl(&["shutdown", "--deadline", "1"]);
    let text: Vec<String> = lines.iter().collect();
    assert!(events.wait().unwrap().success());
    let last: serde_json::Value = serde_json::from_str(text.last().unwrap()).unwrap();
    assert_eq!(
        (&last["event"], &last["detail"]),
        (&"ended".into(), &"forced-off".into())
    );
    assert!(text.iter().any(|line| line.contains("\"shutdown\"")));
    assert!(vm.refused(&["info"]).contains("no such VM runs"));
    assert!(!vm.socket().exists());
    let ended = vm.running.wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
}

#[test]
fn a_file_says_what_flags_say_and_flags_win() {
    let guest = Guest::new("echo cpus: $(nproc); grep MemTotal /proc/meminfo");
    let config = guest.path("vm.toml");
    let text = "cpus = 2\nmemory = { size = \"300M\", shared = true, prefault = true }\n\
                cmdline = \"quiet\"\nconsole = \"stdio\"\n";
    std::fs::write(&config, text).unwrap();
    let check = Command::new(mayfly())
        .args(["config", "check"])
        .arg(&config)
        .output()
        .unwrap();
    assert!(check.status.success(), "{check:?}");
    let running = guest
        .args(["--config"])
        .args([&config])
        .args(["--cpus", "1"])
        .start();
    let ended = running.wait();
    assert!(ended.stdout.contains("cpus: 1"), "{ended:?}");
    let total = ended.stdout.split("MemTotal:").nth(1).unwrap();
    let total: u64 = total.split_whitespace().next().unwrap().parse().unwrap();
    assert!((200_000..300 * 1024).contains(&total), "{total}");
}
