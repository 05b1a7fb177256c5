//! Starts from a template: that there are some, that nothing but the time tells them from
//! boots, and that what cannot be used costs a boot and no more.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use mayfly_testing::user::User;
use mayfly_testing::{text, until};
use serde_json::Value;

/// What a guest can see of its machine, but for what differs between any two of them.
const LOOK: &str = "sleep 1; cat /proc/cmdline /proc/partitions /etc/hosts /etc/resolv.conf \
    /proc/sys/kernel/hostname; cut -d' ' -f1 /proc/modules | sort; mount; ls -a / /dev /sys/block; \
    id; env | sort; ip addr | sed 's/_lft .*//; s/ tentative//; s/ dadfailed//'; ip route; \
    df -k / | sed 's/ .*//'; ls /proc | grep -c '^[0-9]' >/dev/null; umask; ulimit -a; pwd";

/// Runs a command in a VM, and returns its output and the record of the run.
fn run(user: &User, flags: &[&str], command: &[&str]) -> (String, Value) {
    let words = [&["run", "--rm", "--json"], flags, &["demo"], command].concat();
    let output = user.text(&words);
    let (said, record) = match output.trim_end().rsplit_once('\n') {
        Some((said, record)) => (said.to_owned(), record),
        None => (String::new(), output.trim_end()),
    };
    (said, serde_json::from_str(record).unwrap())
}

/// Boots a machine, and waits for its template.
fn make(user: &User, flags: &[&str]) {
    let before = user.templates().len();
    let (_, record) = run(user, flags, &["true"]);
    assert_eq!(record["start"], "cold", "{record}");
    until("a template", || user.templates().len() > before);
}

fn own() -> User {
    User::with_templates_of_its_own()
}

fn file(user: &User, name: &str) -> PathBuf {
    let all = user.templates();
    assert_eq!(all.len(), 1, "{all:?}");
    all[0].join(name)
}

#[test]
fn nothing_but_the_time_tells_a_warm_start_from_a_boot() {
    let user = own();
    let flags = ["--hostname", "same", "--name", "same"];
    for more in [
        &[][..],
        &["--net", "none", "--disk-size", "64M", "--cpus", "2"],
    ] {
        let flags = [&flags, more].concat();
        make(&user, &flags);
        let cold = [&flags[..], &["--cold"]].concat();
        let (booted, record) = run(&user, &cold, &["sh", "-c", LOOK]);
        assert_eq!(record["start"], "cold", "{record}");
        let (restored, record) = run(&user, &flags, &["sh", "-c", LOOK]);
        assert_eq!(record["start"], "warm", "{record}");
        assert_eq!(restored, booted);
        assert!(booted.contains("root=") || booted.len() > 500, "{booted}");
    }
    // Other machines have other templates.
    let (_, record) = run(&user, &["--memory", "300M"], &["true"]);
    assert_eq!(record["start"], "cold");
    let why = record["cold_because"].as_str().unwrap();
    assert!(why.contains("the memory"), "{why}");
}

#[test]
fn clones_are_themselves_before_their_command_runs() {
    let user = own();
    make(&user, &["--net", "none"]);
    let mut seen = Vec::new();
    for _ in 0..10 {
        let now = || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap()
                .as_secs()
        };
        let before = now();
        let script = "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid; \
                      hostname; date +%s";
        let (said, record) = run(&user, &["--net", "none"], &["sh", "-c", script]);
        let after = now();
        assert_eq!(record["start"], "warm", "{record}");
        let mut lines: Vec<&str> = said.lines().collect();
        let time: u64 = lines.pop().unwrap().parse().unwrap();
        assert!((before..=after).contains(&time), "{before} {time} {after}");
        for line in lines {
            assert!(!seen.contains(&line.to_owned()), "{line}");
            seen.push(line.to_owned());
        }
    }
    assert_eq!(seen.len(), 30);
}

#[test]
fn streams_and_statuses_go_through_a_clone() {
    let user = own();
    make(&user, &["--net", "none"]);
    let words = |flags: &[&'static str], command: &[&'static str]| {
        [
            &["run", "--net", "none", "--verbose"],
            flags,
            &["demo"],
            command,
        ]
        .concat()
    };
    for (command, status, out, err) in [
        (
            &["sh", "-c", "echo a; echo b >&2; exit 7"][..],
            7,
            "a\n",
            "b\n",
        ),
        (&["sh", "-c", "kill -TERM $$"], 128 + 15, "", ""),
        (&["nothere"], 127, "", "nothere: not found"),
        (&["/etc/passwd"], 126, "", "Permission denied"),
    ] {
        let output = user.output(&words(&["--rm"], command));
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        assert_eq!(text(&output.stdout), out);
        let errors = text(&output.stderr);
        assert!(
            errors.contains(err) && errors.contains("it started from a template"),
            "{errors}"
        );
    }
    // A setup that the agent's mailbox has no room for goes over the connection.
    let host = |number: usize| format!("--add-host=host-{number:040}:192.0.2.1");
    let hosts: Vec<String> = (0..4000).map(host).collect();
    let mut words = vec!["run", "--rm", "--verbose", "--net", "none"];
    words.extend(hosts.iter().map(String::as_str));
    words.extend(["demo", "grep", "-c", "192.0.2.1", "/etc/hosts"]);
    let output = user.output(&words);
    assert_eq!(text(&output.stdout), "4000\n", "{:?}", output.status);
    assert!(text(&output.stderr).contains("it started from a template"));
}

#[test]
fn a_template_that_cannot_be_used_costs_a_boot() {
    type Damage = fn(&User);
    let damages: [(&str, Damage); 4] = [
        ("a damaged state", |user| {
            let state = OpenOptions::new()
                .write(true)
                .open(file(user, "state"))
                .unwrap();
            state.write_all_at(b"damage", 1000).unwrap();
        }),
        ("another's state", |user| {
            fs::write(file(user, "state"), "mayflyST").unwrap()
        }),
        ("a short memory", |user| {
            let memory = OpenOptions::new()
                .write(true)
                .open(file(user, "memory"))
                .unwrap();
            memory.set_len(4096).unwrap();
        }),
        ("a memory of zeroes", |user| {
            let memory = OpenOptions::new()
                .write(true)
                .open(file(user, "memory"))
                .unwrap();
            let len = memory.metadata().unwrap().len();
            memory.set_len(0).unwrap();
            memory.set_len(len).unwrap();
        }),
    ];
    for (what, damage) in damages {
        let user = own();
        make(&user, &["--net", "none"]);
        damage(&user);
        let (said, record) = run(&user, &["--net", "none"], &["echo", "all the same"]);
        assert_eq!(said, "all the same", "{what}");
        assert_eq!(record["start"], "cold", "{what}: {record}");
        let why = record["cold_because"].as_str().unwrap();
        assert!(why.contains("its template"), "{what}: {why}");
    }
}

#[test]
fn the_entropy_device_gives_no_clone_what_another_got() {
    let user = own();
    make(&user, &["--net", "none"]);
    let mut seen = Vec::new();
    for _ in 0..4 {
        let script = "head -c 32 /dev/hwrng | od -An -v -tx1";
        let (said, record) = run(&user, &["--net", "none"], &["sh", "-c", script]);
        assert_eq!(record["start"], "warm", "{record}");
        for line in said.lines() {
            assert!(!seen.contains(&line.to_owned()), "{line}");
            seen.push(line.to_owned());
        }
    }
    assert_eq!(seen.len(), 8);
}
