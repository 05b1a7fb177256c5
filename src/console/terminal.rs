//! The user's terminal in raw mode, restored on every way out.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, Once, PoisonError};

use mayfly_devices::char_device::TerminalSize;
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// The terminal to restore, where a panic finds it too. It has a descriptor of its
/// own: others may be closed earlier.
static SAVED: Mutex<Option<(Arc<File>, Termios)>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// A terminal in raw mode, until this is dropped.
pub struct RawTerminal;

impl RawTerminal {
    /// Puts a terminal in raw mode; `None` if the file is not one. What is printed
    /// by others still gets its carriage returns.
    pub fn new(file: &File) -> io::Result<Option<Self>> {
        RawTerminal::with(file, OutputModes::OPOST | OutputModes::ONLCR)
    }

    /// The same for one that shows what another terminal prints, as it is.
    pub fn transparent(file: &File) -> io::Result<Option<Self>> {
        RawTerminal::with(file, OutputModes::empty())
    }

    fn with(file: &File, output: OutputModes) -> io::Result<Option<Self>> {
        let file = Arc::new(file.try_clone()?);
        let Ok(saved) = tcgetattr(&file) else {
            return Ok(None);
        };
        let mut raw = saved.clone();
        raw.make_raw();
        raw.output_modes |= output;
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                before(panic);
            }));
        });
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some((file.clone(), saved));
        let terminal = RawTerminal;
        tcsetattr(&file, OptionalActions::Now, &raw)?;
        Ok(Some(terminal))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// The size of a terminal; `None` if the file is not one.
pub fn size(file: &File) -> Option<TerminalSize> {
    let size = tcgetwinsize(file).ok()?;
    // Nobody has set one: nothing is known.
    (size.ws_col > 0 && size.ws_row > 0).then_some(TerminalSize {
        columns: size.ws_col,
        rows: size.ws_row,
    })
}

/// Gives the user's terminal back as it was; for those that end the process.
pub fn restore() {
    let saved = SAVED.try_lock().ok().and_then(|mut saved| saved.take());
    if let Some((file, saved)) = saved {
        let _ = tcsetattr(file, OptionalActions::Now, &saved);
    }
}
