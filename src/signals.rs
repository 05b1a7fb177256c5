//! Signals, as descriptors.

#![allow(unsafe_code, reason = "what signals do")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use mayfly_devices::poll::{entry, poll};
use mayfly_process::signals::{SignalFd, mask};

use crate::failure::{Failure, OrFail};
use crate::kvm::vcpu::kick_signal;

/// Those that end a machine in order, and the one that its terminal's size
/// changed.
const SIGNALS: [libc::c_int; 5] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGWINCH,
];

/// Those that end a start.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Those that are for the guest's command, where there is one.
const PASSED_ON: [libc::c_int; 7] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
];

/// Blocks all signals that the supervisor takes: a terminal sends them to both.
pub fn leave_to_others() -> io::Result<()> {
    mask(libc::SIG_BLOCK, &[&SIGNALS[..], &PASSED_ON[..]].concat())?;
    unblock_kick()
}

/// Lets signals through again that were blocked here, for a program that this process becomes.
pub fn let_through() -> io::Result<()> {
    mask(libc::SIG_UNBLOCK, &[&SIGNALS[..], &PASSED_ON[..]].concat()).map(drop)
}

/// Whoever started mayfly may have blocked what its own threads need.
fn unblock_kick() -> io::Result<()> {
    mask(libc::SIG_UNBLOCK, &[kick_signal()]).map(drop)
}

/// Has a write that would pass the user's limit of a file's size (`ulimit -f`) fail, as one
/// on a full disk does, rather than end this process. What it starts inherits that.
pub fn survive_file_limit() {
    // SAFETY: no handler is installed. It cannot fail: there is such a signal.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Reads the signals that were sent.
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals in this thread, and so in all that it starts. Those
    /// that mayfly was started to ignore (by nohup, say) stay ignored.
    pub fn new() -> io::Result<Self> {
        Signals::take(&SIGNALS, false)
    }

    /// The same, for those that are for the guest's command.
    pub fn passed_on() -> io::Result<Self> {
        Signals::take(&PASSED_ON, true)
    }

    fn take(signals: &[libc::c_int], blocking: bool) -> io::Result<Self> {
        let taken = SignalFd::take(signals, blocking)?;
        unblock_kick()?;
        Ok(Signals(taken))
    }

    /// The next signal that is sent, if they were taken to be passed on.
    pub fn wait(&self) -> Option<i32> {
        loop {
            match self.next() {
                None if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                signal => return signal,
            }
        }
    }

    /// The next signal that was sent.
    pub fn next(&self) -> Option<i32> {
        self.0.next_signal()
    }
}

/// The signals that end a VM's start: then nothing is left of it. All of its waits heed them,
/// but for those for locks of images (see `disk_lock`), which end soon. Those that are for a VM that runs wait for who takes them.
pub struct StartSignals(Signals);

impl StartSignals {
    /// Blocks all signals that a VM's supervisor takes, in this thread and all that it starts.
    pub fn take() -> io::Result<Self> {
        leave_to_others()?;
        Signals::take(&ENDING, false).map(StartSignals)
    }

    /// Fails if a signal was sent.
    pub fn check(&self) -> Result<(), Failure> {
        match self.0.next() {
            Some(signal) => Err(Failure::signalled(signal)),
            None => Ok(()),
        }
    }

    /// Waits until a descriptor is ready or broken, but not longer than a time: false then.
    /// Fails if a signal is sent.
    pub fn wait(&self, fd: BorrowedFd, timeout: Duration) -> Result<bool, Failure> {
        self.wait_for((fd.as_raw_fd(), libc::POLLIN), timeout)
    }

    /// Waits until a descriptor takes more or is broken, but not longer than a time: false
    /// then. Fails if a signal is sent.
    pub fn wait_for_room(&self, fd: BorrowedFd, timeout: Duration) -> Result<bool, Failure> {
        self.wait_for((fd.as_raw_fd(), libc::POLLOUT), timeout)
    }

    /// Waits. Fails if a signal is sent.
    pub fn sleep(&self, time: Duration) -> Result<(), Failure> {
        const NONE: RawFd = -1;
        self.wait_for((NONE, libc::POLLIN), time).map(drop)
    }

    fn wait_for(
        &self,
        (fd, events): (RawFd, libc::c_short),
        timeout: Duration,
    ) -> Result<bool, Failure> {
        let deadline = Instant::now().checked_add(timeout);
        let mut entries = [entry(self.0.as_raw_fd(), libc::POLLIN), entry(fd, events)];
        loop {
            // Rounded up, so that it is over then.
            let left = deadline.map_or(timeout, |it| it.saturating_duration_since(Instant::now()));
            let left =
                left.as_millis() + u128::from(!left.subsec_nanos().is_multiple_of(1_000_000));
            let left = libc::c_int::try_from(left).unwrap_or(libc::c_int::MAX);
            match poll(&mut entries, left) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).or_host("waiting"),
                Ok(_) => {}
            }
            let [signal, fd] = entries.map(|entry| entry.revents != 0);
            if signal {
                self.check()?;
            }
            if fd {
                return Ok(true);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(false);
            }
        }
    }
}

impl AsFd for StartSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sends this thread a signal.
#[cfg(test)]
pub fn raise(signal: libc::c_int) {
    // SAFETY: a number.
    unsafe { libc::raise(signal) };
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_wait_heeds_signals_and_has_an_end() {
        // What is blocked, and what is sent, is of a thread.
        let test = || {
            let signals = StartSignals::take().unwrap();
            let (reader, writer) = io::pipe().unwrap();
            let wait = |time| signals.wait(reader.as_fd(), time);
            assert!(!wait(Duration::from_millis(1)).unwrap());
            drop(writer);
            assert!(wait(Duration::MAX).unwrap());
            signals.check().unwrap();
            raise(libc::SIGUSR1); // for a command
            raise(libc::SIGTERM);
            let failure = signals.sleep(Duration::from_secs(3600)).unwrap_err();
            assert_eq!(failure.status(), 128 + 15);
            signals.check().unwrap();
        };
        thread::spawn(test).join().unwrap();
    }
}
