//! VMM processes that are killed or stopped while they start.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use mayfly_testing::processes::{children, kill, with_variable};
use mayfly_testing::{eventually, until};

use crate::common::{FAILED, Host, Start, VERBS, Verb};
use crate::refusals::net_none;

/// The VMM process of a start, which has no environment: a child of its supervisor, and the
/// first in a PID namespace of its own.
fn vmm(start: &Start) -> Option<u32> {
    let started = with_variable(&start.mark).into_iter();
    started.flat_map(children).find(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        numbers.is_some_and(|it| it.split_whitespace().count() > 1 && it.ends_with("\t1"))
    })
}

/// Waits until it is there, and a while longer.
fn await_vmm(start: &mut Start, after: Duration) -> Option<u32> {
    let found = eventually("neither a VMM process nor an end", || {
        let ended = start.child.try_wait().unwrap().is_some();
        match (ended, vmm(start)) {
            (true, _) => Some(None),
            (false, found) => found.map(Some),
        }
    });
    found.inspect(|_| thread::sleep(after))
}

const MOMENTS: [u64; 8] = [0, 1, 2, 5, 10, 20, 40, 80];

#[test]
fn one_that_is_killed_ends_its_start() {
    let host = Host::new();
    for verb in VERBS {
        for moment in MOMENTS {
            let flags = [net_none(verb), &["--memory", "64M"]].concat();
            let mut start = host.start(host.command(verb, "halts", &flags));
            let vmm = await_vmm(&mut start, Duration::from_millis(moment));
            kill(vmm.unwrap(), libc::SIGKILL);
            let ended = host.finish(start);
            let status = if verb == Verb::Boot { 1 } else { FAILED };
            ended.assert_refused(status, "the VMM process was ended by signal 9");
        }
    }
}

/// Control groups of a supervisor's VM.
fn groups_of(supervisor: u32) -> Vec<PathBuf> {
    let name = format!("mayfly-{supervisor}");
    let (mut found, mut folders) = (Vec::new(), vec![PathBuf::from("/sys/fs/cgroup")]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                match entry.file_name() == *name {
                    true => found.push(entry.path()),
                    false => folders.push(entry.path()),
                }
            }
        }
    }
    found
}

#[test]
fn a_killed_supervisor_s_groups_go_with_its_record() {
    let host = Host::new();
    let flags = ["--net", "none", "--name", "killed"];
    let mut start = host.start(host.command(Verb::Run, "halts", &flags));
    await_vmm(&mut start, Duration::from_millis(100)).unwrap();
    let supervisor = start.child.id();
    let mut doctor = host.mayfly();
    let checks = doctor.args(["doctor", "--json"]).output().unwrap().stdout;
    let checks: Vec<serde_json::Value> = serde_json::from_slice(&checks).unwrap();
    let groups = checks.iter().find(|check| check["name"] == "cgroup");
    let (verdict, found) = (&groups.unwrap()["verdict"], &groups.unwrap()["found"]);
    match verdict.as_str().unwrap() {
        "ok" => assert_ne!(groups_of(supervisor), [""; 0].map(PathBuf::from)),
        _ => assert!(found.as_str().unwrap().contains("no limit of"), "{found}"),
    }
    kill(supervisor, libc::SIGKILL);
    let mark = start.wait().mark;
    until("nothing is left", || with_variable(&mark).is_empty());
    let mut remove = host.mayfly();
    let ended = host.finish(host.start({
        remove.args(["rm", "killed"]);
        remove
    }));
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(groups_of(supervisor), [""; 0].map(PathBuf::from));
}

#[test]
fn one_that_is_stopped_does_not_keep_signals_from_its_start() {
    let host = Host::new();
    for verb in VERBS {
        for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT] {
            let flags = [net_none(verb), &["--memory", "64M"]].concat();
            let mut start = host.start(host.command(verb, "halts", &flags));
            let vmm = await_vmm(&mut start, Duration::ZERO);
            kill(vmm.unwrap(), libc::SIGSTOP);
            start.signal(signal);
            let ended = host.finish(start);
            assert_eq!(
                ended.status.code(),
                Some(128 + signal),
                "{verb:?}: {ended:?}"
            );
        }
    }
}
