//! Signals, as a descriptor.

#![allow(unsafe_code, reason = "masks of signals, and signalfd")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Reads the signals that were sent to this process.
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Blocks signals in this thread, and so in all that it starts. Those that the process
    /// was started to ignore (by nohup, say) stay ignored. Whether a read waits for one is
    /// chosen by `blocking`.
    pub fn take(signals: &[libc::c_int], blocking: bool) -> io::Result<Self> {
        let taken = signals.iter().copied().filter(|&it| !ignored(it));
        let set = mask(libc::SIG_BLOCK, &taken.collect::<Vec<_>>())?;
        let flags = if blocking { 0 } else { libc::SFD_NONBLOCK };
        // SAFETY: makes a new descriptor from a live set.
        match unsafe { libc::signalfd(-1, &set, flags | libc::SFD_CLOEXEC) } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: it is new, and nothing else owns it.
            fd => Ok(SignalFd(unsafe { OwnedFd::from_raw_fd(fd) })),
        }
    }

    /// The next signal that was sent.
    pub fn next_signal(&self) -> Option<i32> {
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

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for SignalFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: changes nothing; fills in the structure, or fails.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: the call succeeded.
    asked == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Changes which signals this thread blocks (`how`, as `pthread_sigmask` takes it), and returns
/// those signals as a set.
pub fn mask(how: libc::c_int, signals: &[libc::c_int]) -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: fills in the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for &signal in signals {
        // SAFETY: the set was filled in; a number that is no signal's is refused.
        if unsafe { libc::sigaddset(set.as_mut_ptr(), signal) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: it was filled in.
    let set = unsafe { set.assume_init() };
    // SAFETY: reads a live set.
    match unsafe { libc::pthread_sigmask(how, &set, std::ptr::null_mut()) } {
        0 => Ok(set),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
