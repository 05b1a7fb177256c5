//! Removing what instances leave.

#![allow(unsafe_code, reason = "what runs between fork and exec")]

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::helper::unblock_signals;

/// Each command takes no longer.
const UNDO_MAX: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(5);

/// Runs commands that remove what an instance leaves; most often there is nothing.
pub fn undo(commands: &[Vec<OsString>]) {
    for command in commands {
        if let [program, arguments @ ..] = command.as_slice() {
            let _ = run_quietly(program, arguments);
        }
    }
}

/// Runs a command, whatever comes of it.
pub fn run_quietly(program: &OsString, arguments: &[OsString]) -> io::Result<()> {
    let mut command = Command::new(program);
    command.args(arguments);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: what runs between fork and exec are system calls.
    unsafe { command.pre_exec(unblock_signals) };
    let mut child = command.spawn()?;
    let deadline = Instant::now() + UNDO_MAX;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}
