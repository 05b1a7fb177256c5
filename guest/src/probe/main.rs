//! The program that `mayfly compare` runs in all engines alike: it marks its first
//! instruction and its command's end, and reports what it measures and finds.
//!
//! | words             | what it says                                              |
//! |-------------------|-----------------------------------------------------------|
//! | `NONCE run [CMD]` | `started`, then `ended STATUS` of the command, if any     |
//! | `NONCE hold`      | `started`, then nothing until SIGTERM                     |
//! | `NONCE steady`    | `data JSON`: the steady state (see `steady.rs`)           |
//! | `NONCE facts`     | `data JSON`: what isolation leaves visible (`facts.rs`)   |
//!
//! With `restart` or `off` before the verb it is a machine's first process, and ends the
//! machine so.
//!
//! What it says is a record on standard output that begins with a byte that text does
//! not have, so that it is found between other output: `\x1emayfly NONCE WORDS\n`.

mod facts;
mod repeat;
mod steady;
mod tcp;

use std::io::{self, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode};

use rustix::system::RebootCommand;

/// Comes before each record (ASCII's record separator).
const RECORD: char = '\x1e';
const STATUS_FAILED: u8 = 125;
const STATUS_NOT_EXECUTABLE: u8 = 126;
const STATUS_NOT_FOUND: u8 = 127;
const STATUS_SIGNAL: i32 = 128;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [nonce, words @ ..] = words.as_slice() else {
        return usage();
    };
    let (end, words) = match words {
        [first, rest @ ..] if first == "restart" => (Some(RebootCommand::Restart), rest),
        [first, rest @ ..] if first == "off" => (Some(RebootCommand::PowerOff), rest),
        _ => (None, words),
    };
    let [verb, rest @ ..] = words else {
        return usage();
    };
    let say = |text: &str| {
        let record = format!("{RECORD}mayfly {nonce} {text}\n");
        let mut output = io::stdout().lock();
        output
            .write_all(record.as_bytes())
            .and_then(|()| output.flush())
    };
    let said = match verb.as_str() {
        "run" => say("started").and_then(|()| {
            let status = run(rest);
            say(&format!("ended {status}")).map(|()| status)
        }),
        "hold" => say("started").map(|()| hold()),
        "steady" => say("started").and_then(|()| {
            let figures = steady::measure(rest);
            say(&format!("data {figures}")).map(|()| 0)
        }),
        "facts" => say("started")
            .and_then(|()| say(&format!("data {}", facts::collect())))
            .map(|()| 0),
        _ => return usage(),
    };
    let status = said.unwrap_or_else(|error| {
        eprintln!("mayfly-probe: {error}");
        STATUS_FAILED
    });
    if let Some(end) = end {
        // What was written is to arrive before.
        let _ = rustix::termios::tcdrain(io::stdout());
        let _ = rustix::system::reboot(end);
    }
    ExitCode::from(status)
}

fn usage() -> ExitCode {
    eprintln!(
        "usage: mayfly-probe NONCE run [COMMAND…] | hold | steady [root=DIR] [volume=DIR] [tcp=…] | facts"
    );
    ExitCode::from(STATUS_FAILED)
}

/// Runs the command, and waits for it. Its status is as a shell's.
#[allow(unsafe_code, reason = "what runs between fork and exec")]
fn run(words: &[String]) -> u8 {
    let [program, arguments @ ..] = words else {
        return 0;
    };
    let mut command = Command::new(program);
    command.args(arguments);
    // As a process of the host there is nobody else to end it.
    // SAFETY: between fork and exec there is a system call that takes numbers.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    match command.status() {
        Ok(status) => {
            let signal = || status.signal().map(|signal| STATUS_SIGNAL + signal);
            let code = status.code().or_else(signal).unwrap_or(STATUS_SIGNAL);
            u8::try_from(code).unwrap_or(u8::MAX)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => STATUS_NOT_FOUND,
        Err(_) => STATUS_NOT_EXECUTABLE,
    }
}

/// Waits for SIGTERM. The first process of a container would ignore it.
#[allow(unsafe_code, reason = "a signal's handler")]
fn hold() -> u8 {
    extern "C" fn end(_: libc::c_int) {
        // SAFETY: the call takes a number, and may be made in a signal handler.
        unsafe { libc::_exit(0) };
    }
    let handler: extern "C" fn(libc::c_int) = end;
    // SAFETY: the handler lives as long as the program, and makes one system call.
    unsafe { libc::signal(libc::SIGTERM, handler as libc::sighandler_t) };
    loop {
        // SAFETY: waits for a signal; takes nothing.
        unsafe { libc::pause() };
    }
}
