//! What a VM's main process wrote, kept with its streams apart, up to a size.
//!
//! A log is two files: the one that is written, and the one before it. Each is a row of
//! pieces. A piece is a stream (1 or 2, and [`CONTINUES`]), eight bytes of milliseconds
//! since 1970, eight of how many bytes were written before it, whether or not they are
//! still kept, four of its length, and its data; numbers are little-endian.

mod folder;
mod piece;
mod reader;
mod view;
mod writer;

pub use self::folder::{make_folder, path, remove_folder};
pub use self::piece::Piece;
pub use self::reader::{Item, Reader};
pub use self::view::{Stamps, Tail};
pub use self::writer::{Log, SIZE};
