//! The user's terminal in raw mode, restored on every way out.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, Once, PoisonError};

use mayfly_devices::line::TerminalSize;

/// The terminal to restore, where a panic finds it too.
static SAVED: Mutex<Option<(RawFd, libc::termios)>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// A terminal in raw mode, until this is dropped. It holds a descriptor of its
/// own: others may be closed earlier.
pub struct RawTerminal(File);

impl RawTerminal {
    /// Puts a terminal in raw mode; `None` if the file is not one. What is printed
    /// by others still gets its carriage returns.
    pub fn new(file: &File) -> io::Result<Option<Self>> {
        RawTerminal::with(file, libc::OPOST | libc::ONLCR)
    }

    /// The same for one that shows what another terminal prints, as it is.
    pub fn transparent(file: &File) -> io::Result<Option<Self>> {
        RawTerminal::with(file, 0)
    }

    fn with(file: &File, output: libc::tcflag_t) -> io::Result<Option<Self>> {
        let file = file.try_clone()?;
        let fd = file.as_raw_fd();
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
        raw.c_oflag |= output;
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                before(panic);
            }));
        });
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some((fd, saved));
        let terminal = RawTerminal(file);
        // SAFETY: reads a live structure.
        match unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw) } {
            0 => Ok(Some(terminal)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        debug_assert!(self.0.as_raw_fd() >= 0); // still open
        restore();
    }
}

/// The size of a terminal; `None` if the file is not one.
pub fn size(file: &File) -> Option<TerminalSize> {
    let mut size = MaybeUninit::<libc::winsize>::uninit();
    // SAFETY: fills in the structure, or fails.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TIOCGWINSZ, size.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: the call above succeeded.
    let size = unsafe { size.assume_init() };
    // Nobody has set one: nothing is known.
    (size.ws_col > 0 && size.ws_row > 0).then_some(TerminalSize {
        columns: size.ws_col,
        rows: size.ws_row,
    })
}

/// Gives the user's terminal back as it was; for those that end the process.
pub fn restore() {
    let saved = SAVED.try_lock().ok().and_then(|mut saved| saved.take());
    if let Some((fd, saved)) = saved {
        // SAFETY: reads a live structure.
        unsafe { libc::tcsetattr(fd, libc::TCSANOW, &saved) };
    }
}
