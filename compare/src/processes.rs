//! Our descendants: how much memory they use, and their end. Those that lose their parents
//! become our children, as we said so (`PR_SET_CHILD_SUBREAPER`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::time::Duration;

use mayfly_process::signals::SignalFd;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, getpid, kill_process, pidfd_open, pidfd_send_signal, wait,
};

use super::model::MemoryPoint;

/// A killed process may wait for the disk.
const PAUSE: Duration = Duration::from_millis(5);
const ATTEMPTS: u32 = 1000;

/// Takes the signals that end a comparison, and the ends of its children.
pub fn take_signals() -> io::Result<SignalFd> {
    let signals = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGCHLD];
    SignalFd::take(&signals, false)
}

/// The processes below one, without it.
pub fn descendants(of: Pid) -> Vec<Pid> {
    let mut children = BTreeMap::<i32, Vec<i32>>::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // A name may have spaces and brackets: what follows the last one has none.
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| {
            let parent = rest.split_whitespace().nth(1)?;
            parent.parse::<i32>().ok()
        });
        children.entry(parent.unwrap_or(0)).or_default().push(pid);
    }
    let mut found = BTreeSet::new();
    let mut next = vec![of.as_raw_pid()];
    while let Some(pid) = next.pop() {
        for &child in children.get(&pid).into_iter().flatten() {
            if found.insert(child) {
                next.push(child);
            }
        }
    }
    found.into_iter().filter_map(Pid::from_raw).collect()
}

/// Kills all of ours but some, until there are no others.
pub fn kill_descendants(spared: &[Pid]) {
    for _ in 0..ATTEMPTS {
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        let mut all = descendants(getpid());
        all.retain(|pid| !spared.contains(pid));
        if all.is_empty() {
            return;
        }
        for pid in all {
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Kills all that have a variable in their environment, until there are none.
pub fn kill_marked(variable: &str, value: &str) {
    let marked = |words: &[u8]| {
        let mut words = words.split(|&byte| byte == 0);
        words.any(|word| {
            word.strip_prefix(variable.as_bytes())
                .and_then(|rest| rest.strip_prefix(b"="))
                == Some(value.as_bytes())
        })
    };
    for _ in 0..ATTEMPTS {
        let mut found = false;
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.parse().ok());
            let Some(pid) = pid.and_then(Pid::from_raw).filter(|&pid| pid != getpid()) else {
                continue;
            };
            // Its number may be another's by now, but not what is opened first.
            let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
                continue;
            };
            if fs::read(entry.path().join("environ")).is_ok_and(|words| marked(&words)) {
                found |= pidfd_send_signal(&process, Signal::KILL).is_ok();
            }
        }
        if !found {
            return;
        }
        std::thread::sleep(PAUSE);
    }
}

/// What our descendants but some have in memory, all together; `None` if there is one that
/// may not be looked at.
pub fn memory(instances: u32, without: &[Pid]) -> Option<MemoryPoint> {
    let mut point = MemoryPoint {
        instances,
        private_kib: 0,
        shared_kib: 0,
        pss_kib: 0,
    };
    for pid in descendants(getpid()) {
        if without.contains(&pid) {
            continue;
        }
        let path = format!("/proc/{}/smaps_rollup", pid.as_raw_pid());
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return None,
            // It ended meanwhile, or has no memory any more.
            Err(_) => continue,
        };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (name, size) = (words.next(), words.next());
            let size: u64 = size.and_then(|size| size.parse().ok()).unwrap_or(0);
            match name {
                Some("Pss:") => point.pss_kib += size,
                Some("Private_Clean:" | "Private_Dirty:") => point.private_kib += size,
                Some("Shared_Clean:" | "Shared_Dirty:") => point.shared_kib += size,
                _ => {}
            }
        }
    }
    Some(point)
}
