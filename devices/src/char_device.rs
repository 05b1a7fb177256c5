//! A line that carries bytes between guest and host: a serial port, a console,
//! a channel. The host's side sees them all through this.

use serde::{Deserialize, Serialize};

/// The guest's end of a line.
pub trait CharDevice: Send {
    /// The first part of what the guest has sent.
    fn output(&self) -> &[u8];

    /// Removes the first bytes of the output, which were passed on.
    fn output_done(&mut self, count: usize);

    /// How many bytes [`Line::input`] takes now: none while the guest does not
    /// listen, as they would be lost.
    fn input_room(&self) -> usize;

    /// Gives the guest input; what has no room is lost.
    fn input(&mut self, data: &[u8]);

    /// Somebody is at the host's end, or is not any more.
    fn connected(&mut self, _: bool) {}

    /// The host's end is a terminal of this size.
    fn resized(&mut self, _: TerminalSize) {}
}

/// How many characters a terminal shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// In a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}
