//! Processes of VMs, told apart from others that came to have their numbers.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A process that signals reach, and no other that has its number later.
pub struct Process {
    number: u32,
    stat: Stat,
    handle: OwnedFd,
}

/// What tells processes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    parent: u32,
    /// Clock ticks after the host was booted.
    started: u64,
}

impl Stat {
    fn of(number: u32) -> Option<Self> {
        Stat::parse(&fs::read_to_string(format!("/proc/{number}/stat")).ok()?)
    }

    /// See `proc_pid_stat(5)`.
    fn parse(text: &str) -> Option<Self> {
        // Behind the name, which may hold anything.
        let (_, fields) = text.rsplit_once(") ")?;
        let mut fields = fields.split_whitespace();
        // The state is field 3 there, and 0 here.
        let parent = fields.nth(1)?.parse().ok()?;
        let started = fields.nth(17)?.parse().ok()?;
        Some(Stat { parent, started })
    }
}

/// When a process was started: it and its number are no other process's.
pub fn started(number: u32) -> Option<u64> {
    Some(Stat::of(number)?.started)
}

impl Process {
    /// The process with this number that was started then, if it lives. Where that is not
    /// known, as in records of earlier versions, its number has to do.
    pub fn find(number: u32, started: Option<u64>) -> Option<Self> {
        let process = Process::open(number)?;
        let is_it = started.is_none_or(|started| process.stat.started == started);
        is_it.then_some(process)
    }

    fn open(number: u32) -> Option<Self> {
        let pid = Pid::from_raw(i32::try_from(number).ok()?)?;
        // First: what is looked at then may only be one that is started later.
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        Some(Process {
            number,
            stat: Stat::of(number)?,
            handle,
        })
    }

    /// The processes that it has started, and that live.
    pub fn children(&self) -> Vec<Process> {
        let number = self.number;
        let text = fs::read_to_string(format!("/proc/{number}/task/{number}/children"));
        let text = text.unwrap_or_default();
        let all = text.split_whitespace().flat_map(str::parse);
        let all = all.filter_map(Process::open);
        let all = all.filter(|child| child.stat.parent == number).collect();
        // Else they may be another's.
        match Stat::of(number) == Some(self.stat) {
            true => all,
            false => Vec::new(),
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.handle, signal)?)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, id};

    use super::*;

    #[test]
    fn another_process_of_the_same_number_is_none_of_a_vm_s() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let began = started(child.id());
        assert!(began.is_some());
        let other = began.map(|it| it + 1);
        assert!(Process::find(child.id(), other).is_none());
        assert!(Process::find(child.id(), None).is_some());
        let process = Process::find(child.id(), began).unwrap();
        let own = Process::find(id(), started(id())).unwrap();
        assert!(process.children().is_empty() && own.stat.started <= process.stat.started);
        assert_eq!(process.stat.parent, id());
        process.signal(Signal::KILL).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        assert!(process.signal(Signal::KILL).is_err());
        assert!(Process::find(child.id(), began).is_none());
    }

    #[test]
    fn children_are_found() {
        let mut shell = Command::new("sh");
        let mut shell = shell.args(["-c", "sleep 60; :"]).spawn().unwrap();
        let process = Process::find(shell.id(), started(shell.id())).unwrap();
        let child = loop {
            assert!(shell.try_wait().unwrap().is_none());
            if let Some(child) = process.children().pop() {
                break child;
            }
        };
        process.signal(Signal::KILL).unwrap();
        shell.wait().unwrap();
        assert!(process.children().is_empty());
        child.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn reads_the_kernel_s_words() {
        let text = "42 (a) b) S 7 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 4 0 99 1000 25";
        let stat = Stat {
            parent: 7,
            started: 99,
        };
        assert_eq!(Stat::parse(text), Some(stat));
        for nonsense in ["", "42 (a", "42 (a) S", "42 (a) S 7 2 3", "42 (a) S x"] {
            assert_eq!(Stat::parse(nonsense), None);
        }
    }
}
