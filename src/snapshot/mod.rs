//! What is kept of a VM that does not run: the state file, and the memory file.

pub mod format;
pub mod kvm;
pub mod machine;
pub mod mailbox;
pub mod memory;
pub mod store;
