//! The host's side of the guest's console and channels.

mod ends;
mod escape;
mod pump;
mod tail;
pub(crate) mod terminal;

pub use self::ends::{ConsoleFds, ConsoleFlags, HostConsole};
pub use self::pump::{Accepted, Connection, Console, Pumped};
