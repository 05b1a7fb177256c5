//! Processes of the host: who started whom, who runs, and signals.
//!
//! The kernel's own list of a process's children (`/proc/PID/task/PID/children`) is not
//! reliable while any of them runs (proc(5)).

use std::fs;

/// What `/proc/PID/stat` says of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// The name of its program, of at most 15 bytes.
    pub name: String,
    /// Whether it has ended, but nobody has waited for it.
    pub zombie: bool,
    /// Who started it, or who has it now.
    pub parent: u32,
    /// Its process group.
    pub group: u32,
}

impl Process {
    /// A process, if there is one of this number.
    pub fn find(pid: u32) -> Option<Self> {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        let stat = String::from_utf8_lossy(&stat);
        // The name may hold anything, so also what ends it.
        let (start, rest) = stat.rsplit_once(") ")?;
        let (_, name) = start.split_once('(')?;
        let mut fields = rest.split(' ');
        Some(Process {
            pid,
            name: name.to_owned(),
            zombie: fields.next()? == "Z",
            parent: fields.next()?.parse().ok()?,
            group: fields.next()?.parse().ok()?,
        })
    }
}

/// The numbers of all processes.
fn numbers() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// All processes, by their numbers.
pub fn all() -> Vec<Process> {
    let mut all: Vec<Process> = numbers().filter_map(Process::find).collect();
    all.sort_unstable_by_key(|process| process.pid);
    all
}

/// The processes that a process has started, and that nobody has waited for.
pub fn children(pid: u32) -> Vec<u32> {
    let all = all().into_iter();
    let children = all.filter(|process| process.parent == pid);
    children.map(|process| process.pid).collect()
}

/// A process and all below it.
pub fn descendants(pid: u32) -> Vec<u32> {
    let processes = all();
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        let children = processes.iter().filter(|it| it.parent == parent);
        found.extend(children.map(|process| process.pid));
        next += 1;
    }
    found
}

/// The processes whose environment has a variable of this value, as `NAME=VALUE`.
pub fn with_variable(variable: &str) -> Vec<u32> {
    let has = |pid: &u32| {
        let variables = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let mut variables = variables.split(|&byte| byte == 0);
        variables.any(|it| it == variable.as_bytes())
    };
    numbers().filter(has).collect()
}

/// The words that the running processes were started with.
pub fn command_lines() -> Vec<Vec<u8>> {
    let words = |pid| fs::read(format!("/proc/{pid}/cmdline")).ok();
    numbers().filter_map(words).collect()
}

/// What a process's program is called; empty if there is none.
pub fn name(pid: u32) -> String {
    Process::find(pid).map_or_else(String::new, |process| process.name)
}

/// Whether a process runs; one that nobody waits for does not.
pub fn runs(pid: u32) -> bool {
    Process::find(pid).is_some_and(|process| !process.zombie)
}

/// Sends a signal to a process, which must be there.
#[allow(unsafe_code, reason = "a system call")]
pub fn kill(pid: u32, signal: i32) {
    // SAFETY: touches no memory.
    let status = unsafe { libc::kill(pid.cast_signed(), signal) };
    assert_eq!(status, 0, "kill {pid}: {}", std::io::Error::last_os_error());
}

/// Sends a signal to a process that may have ended.
#[allow(unsafe_code, reason = "a system call")]
pub fn kill_if_there(pid: u32, signal: i32) {
    // SAFETY: touches no memory.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}
