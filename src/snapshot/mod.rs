//! What is kept of a VM that does not run.

pub mod memory;
