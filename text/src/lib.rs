//! Text for people: what others say made harmless for a terminal, errors with their
//! causes, times.

pub mod date;
pub mod errors;
pub mod printable;
