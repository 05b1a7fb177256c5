//! Tar archives: reading foreign ones, and writing plain ones.

mod block;
mod decimal;
mod entry;
mod error;
mod header;
mod pax;
mod reader;
mod sparse;
mod writer;

pub use entry::{Entry, Kind, Meta};
pub use error::{ArchiveError, show};
pub use pax::percent_decoded;
pub use reader::Entries;
pub use sparse::{HOLE_MIN, PIECES_MAX};
pub use writer::Writer;

#[cfg(test)]
mod tests;
