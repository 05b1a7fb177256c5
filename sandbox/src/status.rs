//! Exit statuses that tell what ended the process.

/// The exit status of a VMM that panicked: what a shell says of SIGABRT, which the first
/// process of a PID namespace cannot send itself.
pub const PANIC: u8 = 128 + 6;
const _: () = assert!(PANIC as i32 == 128 + libc::SIGABRT);

/// The exit status of a VMM that made a forbidden system call: what a shell says of SIGSYS.
pub const VIOLATION: u8 = 128 + 31;
const _: () = assert!(VIOLATION as i32 == 128 + libc::SIGSYS);
