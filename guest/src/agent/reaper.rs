//! PID 1 takes in every process that ends; those that were started here are
//! waited for.

#![allow(unsafe_code, reason = "the end of processes that nobody waits for")]

use std::collections::HashMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_protocol::agent::Exit;

/// Knows the processes that were started here and have not ended.
#[derive(Default)]
pub struct Reaper {
    processes: Mutex<Processes>,
    changed: Condvar,
}

#[derive(Default)]
struct Processes {
    waiting: HashMap<libc::pid_t, Sender<Exit>>,
    main: Option<libc::pid_t>,
    /// There may be processes, started here or orphans of those.
    some: bool,
}

/// A process that was started.
pub struct Started {
    /// With its pipes.
    pub child: Child,
    /// Receives how the process ended.
    pub exit: Receiver<Exit>,
}

impl Reaper {
    /// Starts the thread that takes processes in.
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Reaper::default());
        let worker = reaper.clone();
        thread::Builder::new().spawn(move || worker.work())?;
        Ok(reaper)
    }

    fn lock(&self) -> MutexGuard<'_, Processes> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process. Nothing is taken in meanwhile: not what is about to be
    /// waited for, nor what the standard library itself waits for.
    pub fn spawn(&self, command: &mut Command, main: bool) -> io::Result<Started> {
        let mut processes = self.lock();
        let child = command.spawn()?;
        let pid = child.id().cast_signed();
        let (sender, exit) = mpsc::channel();
        processes.waiting.insert(pid, sender);
        processes.some = true;
        if main {
            processes.main = Some(pid);
        }
        self.changed.notify_all();
        Ok(Started { child, exit })
    }

    /// Signals a process that was started here, if it has not ended: its
    /// number may be another's by now.
    pub fn signal(&self, pid: u32, signal: i32) {
        let processes = self.lock();
        let pid = pid.cast_signed();
        if processes.waiting.contains_key(&pid) {
            // SAFETY: touches no memory.
            unsafe { libc::kill(pid, signal) };
        }
    }

    /// Signals the main process.
    pub fn signal_main(&self, signal: i32) {
        let main = self.lock().main;
        if let Some(pid) = main {
            self.signal(pid.cast_unsigned(), signal);
        }
    }

    /// Ends every process, and returns when they are gone, but for those that wait
    /// for a folder whose server died.
    pub fn end_all(&self) {
        const PAUSE: Duration = Duration::from_millis(10);
        const END_TIMEOUT: Duration = Duration::from_secs(30);
        let deadline = Instant::now() + END_TIMEOUT;
        let mut processes = self.lock();
        while processes.some && Instant::now() < deadline {
            // Again and again: they may be starting others.
            // SAFETY: touches no memory.
            unsafe { libc::kill(-1, libc::SIGKILL) };
            let waited = self.changed.wait_timeout(processes, PAUSE);
            processes = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn work(&self) {
        loop {
            // Under the lock, as one may just be started.
            let mut processes = self.lock();
            if none_is_left() {
                processes.some = false;
                self.changed.notify_all();
                let none = |processes: &mut Processes| !processes.some;
                drop(self.changed.wait_while(processes, none));
            } else {
                drop(processes);
                let _ = self.take_in();
            }
        }
    }

    /// Waits for the end of any process.
    fn take_in(&self) -> io::Result<()> {
        // SAFETY: plain bytes, for which zeroes are a value.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let look = libc::WEXITED | libc::WNOWAIT;
        // SAFETY: writes to a live structure.
        crate::system::check(unsafe { libc::waitid(libc::P_ALL, 0, &mut info, look) }.into())?;
        // SAFETY: the call succeeded, so it is the end of a process.
        let pid = unsafe { info.si_pid() };
        let mut processes = self.lock();
        let mut raw = 0;
        // SAFETY: writes to a live integer. It may be gone: see `spawn`.
        if unsafe { libc::waitpid(pid, &mut raw, libc::WNOHANG) } == pid {
            let waiting = processes.waiting.remove(&pid);
            drop(processes);
            if let Some(sender) = waiting {
                let _ = sender.send(exit(ExitStatus::from_raw(raw), oom_kills()));
            }
        }
        Ok(())
    }
}

/// This process has no others, not even ended ones.
fn none_is_left() -> bool {
    let look = libc::WEXITED | libc::WNOWAIT | libc::WNOHANG;
    // SAFETY: plain bytes, for which zeroes are a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: writes to a live structure.
    let looked = unsafe { libc::waitid(libc::P_ALL, 0, &mut info, look) };
    looked != 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ECHILD)
}

fn exit(status: ExitStatus, oom_kills: u64) -> Exit {
    const SIGNALLED: i32 = 128;
    let code = status
        .code()
        .unwrap_or_else(|| SIGNALLED + status.signal().unwrap_or(0));
    Exit {
        status: u8::try_from(code).unwrap_or(u8::MAX),
        // A shell tells of its command's death by its own status.
        out_of_memory: code == SIGNALLED + libc::SIGKILL && oom_kills > 0,
    }
}

/// How many processes the kernel has killed for want of memory.
fn oom_kills() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("oom_kill "));
    lines
        .next()
        .and_then(|count| count.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_killed_was_out_of_memory() {
        for (raw, oom_kills, status, out_of_memory) in [
            (libc::SIGKILL, 1, 137, true),
            (libc::SIGKILL, 0, 137, false),
            (137 << 8, 1, 137, true),
            (137 << 8, 0, 137, false),
            (libc::SIGTERM, 1, 143, false),
            (1 << 8, 1, 1, false),
            (0, 1, 0, false),
        ] {
            let expected = Exit {
                status,
                out_of_memory,
            };
            assert_eq!(exit(ExitStatus::from_raw(raw), oom_kills), expected);
        }
    }
}
