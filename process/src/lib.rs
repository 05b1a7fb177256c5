//! Programs that this one starts, and signals that it takes.

pub mod programs;
pub mod signals;
