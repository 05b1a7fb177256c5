//! Exit statuses that tell what ended the process.

use std::io;

/// The exit status of a VMM that panicked: what a shell says of SIGABRT, which the first
/// process of a PID namespace cannot send itself.
pub const PANIC: u8 = 128 + 6;
const _: () = assert!(PANIC as i32 == 128 + libc::SIGABRT);

/// The exit status of a VMM that made a forbidden system call: what a shell says of SIGSYS.
pub const VIOLATION: u8 = 128 + 31;
const _: () = assert!(VIOLATION as i32 == 128 + libc::SIGSYS);

/// What is added to an error of Linux for the exit status of a process whose program could not
/// be executed.
const NOT_EXECUTED: u8 = VIOLATION + 1;

/// The exit status of a process whose program could not be executed.
pub fn not_executed(error: &io::Error) -> u8 {
    let code = error
        .raw_os_error()
        .and_then(|code| u8::try_from(code).ok());
    let status = code.and_then(|code| NOT_EXECUTED.checked_add(code));
    status.unwrap_or(NOT_EXECUTED)
}

/// Why a program could not be executed, if an exit status tells that.
pub fn why_not_executed(status: i32) -> Option<io::Error> {
    let code = status.checked_sub(NOT_EXECUTED.into())?;
    (code >= 0).then(|| io::Error::from_raw_os_error(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_tells_why_nothing_was_executed() {
        for code in [libc::ENOENT, libc::EACCES, libc::EMFILE, libc::ENOMEM] {
            let status = not_executed(&io::Error::from_raw_os_error(code));
            let why = why_not_executed(status.into()).unwrap();
            assert_eq!(why.raw_os_error(), Some(code), "{code}");
        }
        for status in [0, 1, PANIC.into(), VIOLATION.into()] {
            assert!(why_not_executed(status).is_none());
        }
    }
}
