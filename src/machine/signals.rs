//! Signals to a machine, as a descriptor for the event loop.

#![allow(unsafe_code, reason = "masks of signals, and signalfd")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::signal::create_sigset;

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

/// Blocks all signals that the keeper takes: a terminal sends them to both.
pub fn leave_to_others() -> io::Result<()> {
    mask(libc::SIG_BLOCK, &[&SIGNALS[..], &PASSED_ON[..]].concat())?;
    unblock_kick()
}

/// Whoever started mayfly may have blocked what its own threads need.
fn unblock_kick() -> io::Result<()> {
    mask(libc::SIG_UNBLOCK, &[kick_signal()]).map(drop)
}

/// Reads the signals that were sent.
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals in this thread, and so in all that it starts. Those
    /// that mayfly was started to ignore (by nohup, say) stay ignored.
    pub fn new() -> io::Result<Self> {
        Signals::take(&SIGNALS, libc::SFD_NONBLOCK)
    }

    /// The same, for those that are for the guest's command.
    pub fn passed_on() -> io::Result<Self> {
        Signals::take(&PASSED_ON, 0)
    }

    /// The same, for those that end a comparison, and the ends of its children.
    pub fn of_children() -> io::Result<Self> {
        let signals = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGCHLD];
        Signals::take(&signals, libc::SFD_NONBLOCK)
    }

    fn take(signals: &[libc::c_int], flags: libc::c_int) -> io::Result<Self> {
        let taken = signals.iter().copied().filter(|&it| !ignored(it));
        let taken: Vec<_> = taken.collect();
        let set = mask(libc::SIG_BLOCK, &taken)?;
        unblock_kick()?;
        // SAFETY: makes a new descriptor from a live set.
        match unsafe { libc::signalfd(-1, &set, flags | libc::SFD_CLOEXEC) } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: it is new, and nothing else owns it.
            fd => Ok(Signals(unsafe { OwnedFd::from_raw_fd(fd) })),
        }
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
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: writes at most `size` bytes to a structure of that size.
        let read = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(read) != Ok(size) {
            return None;
        }
        // SAFETY: all of it was written.
        let info = unsafe { info.assume_init() };
        i32::try_from(info.ssi_signo).ok()
    }
}

fn ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: changes nothing; fills in the structure, or fails.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: the call succeeded.
    asked == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

fn mask(how: libc::c_int, signals: &[libc::c_int]) -> io::Result<libc::sigset_t> {
    let set = create_sigset(signals).map_err(io::Error::from)?;
    // SAFETY: reads a live set.
    match unsafe { libc::pthread_sigmask(how, &set, std::ptr::null_mut()) } {
        0 => Ok(set),
        error => Err(io::Error::from_raw_os_error(error)),
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
