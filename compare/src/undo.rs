//! Programs of the host that are run beside instances: they answer a question, or remove
//! what an instance leaves. None may take for ever.

#![allow(unsafe_code, reason = "what runs between fork and exec")]

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};

use mayfly_process::programs::unblock_signals;

/// Each command takes no longer.
const LIMIT: Duration = Duration::from_secs(60);
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
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: what runs between fork and exec are system calls.
    unsafe { command.pre_exec(unblock_signals) };
    wait(&mut command.spawn()?).map(drop)
}

/// What a command prints, if it succeeds; else what it complains of.
pub fn ask(command: &mut Command) -> Result<String, String> {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or_default().to_owned();
    answer(command).map_err(|error| format!("{}: {error}", name.display()))
}

fn answer(command: &mut Command) -> io::Result<String> {
    // Files, as nobody empties a pipe meanwhile.
    let [mut output, mut errors] = [file()?, file()?];
    command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(errors.try_clone()?);
    let status = wait(&mut command.spawn()?)?;
    if status.success() {
        return text(&mut output);
    }
    let complaint = text(&mut errors)?;
    Err(io::Error::other(match complaint.trim() {
        "" => status.to_string(),
        complaint => complaint.replace('\n', "; "),
    }))
}

fn file() -> io::Result<File> {
    Ok(memfd_create("answer", MemfdFlags::CLOEXEC)?.into())
}

fn text(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Waits for the end of a command, and ends it if that does not come.
fn wait(child: &mut Child) -> io::Result<ExitStatus> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            let text = format!("no answer within {} s", LIMIT.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_or_a_complaint() {
        let ask = |script: &str| ask(Command::new("sh").args(["-c", script]));
        assert_eq!(ask("seq 100000 | tail -n 1"), Ok("100000\n".into()));
        assert_eq!(
            ask("echo no; echo first >&2; echo second >&2; exit 3"),
            Err("sh: first; second".into())
        );
        assert_eq!(ask("exit 3"), Err("sh: exit status: 3".into()));
    }
}
