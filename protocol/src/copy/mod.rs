//! Files on their way: out of a folder, over a connection, into a folder.
//!
//! A [`Source`] tells entry for entry what there is, a folder before what is in it;
//! a [`Sink`] makes it. Both ends of a connection use the same ones, and the other
//! end may be hostile: entries are checked where they come in, and [`Files`] makes
//! nothing outside of its place, whatever they say.

mod entry;
mod files;
mod keep;
mod path;
mod place;
mod walk;
pub mod wire;
pub mod xattrs;

pub use entry::{Data, Entry, Kind, Sink, Source, copy};
pub use files::Files;
pub use keep::Keep;
pub use place::Place;
pub use walk::Walk;

#[cfg(test)]
mod tests;
