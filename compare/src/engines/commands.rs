//! Commands of the host.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::undo::ask;

/// A program of the host.
pub fn program(name: &str) -> Result<PathBuf, String> {
    let found = mayfly_process::programs::find_program(name);
    found.ok_or_else(|| format!("{name} is not installed"))
}

/// The first line that a program prints, if it succeeds.
pub fn first_line(program: &Path, arguments: &[&str]) -> Option<String> {
    let text = ask(Command::new(program).args(arguments)).ok()?;
    text.lines().next().map(|line| line.trim().to_owned())
}

/// Removes the control groups of an instance, which a launcher that is killed leaves.
pub fn remove_groups(id: &str) -> Vec<OsString> {
    words([
        "find",
        "/sys/fs/cgroup",
        "-depth",
        "-type",
        "d",
        "-name",
        id,
        "-exec",
        "rmdir",
        "{}",
        ";",
    ])
}

pub fn words<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.into_iter().map(OsString::from).collect()
}
