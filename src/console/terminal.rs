//! The user's terminal in raw mode, restored on every way out.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::sync::{Mutex, Once, PoisonError};

/// The terminal to restore, where a panic finds it too.
static SAVED: Mutex<Option<(RawFd, libc::termios)>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// A terminal in raw mode, until this is dropped.
pub struct RawTerminal(());

impl RawTerminal {
    /// Puts the terminal at `fd` in raw mode; `None` if it is not one.
    pub fn new(fd: RawFd) -> io::Result<Option<Self>> {
        let mut saved = MaybeUninit::uninit();
        // SAFETY: fills in the structure, or fails.
        if unsafe { libc::tcgetattr(fd, saved.as_mut_ptr()) } != 0 {
            return Ok(None);
        }
        // SAFETY: the call above succeeded.
        let saved = unsafe { saved.assume_init() };
        let mut raw = saved;
        // SAFETY: changes a live structure.
        unsafe { libc::cfmakeraw(&mut raw) };
        // What the monitor itself prints still needs its carriage returns.
        raw.c_oflag |= libc::OPOST | libc::ONLCR;
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                before(panic);
            }));
        });
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some((fd, saved));
        // SAFETY: reads a live structure.
        if unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Some(RawTerminal(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let saved = SAVED.try_lock().ok().and_then(|mut saved| saved.take());
    if let Some((fd, saved)) = saved {
        // SAFETY: reads a live structure.
        unsafe { libc::tcsetattr(fd, libc::TCSANOW, &saved) };
    }
}
