//! What a container is to be.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// A container, as JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The image's files. They are not written to.
    pub root: PathBuf,
    /// A directory that is there; in it are made, and removed, `upper` and `work`: what the
    /// container writes. Each container needs one of its own.
    pub writable: PathBuf,
    /// The command. A name without `/` is looked for in the environment's `PATH`.
    pub args: Vec<String>,
    /// `NAME=VALUE`; all that the command gets.
    #[serde(default)]
    pub env: Vec<String>,
    /// Where the command starts, inside; `/` by default.
    #[serde(default)]
    pub cwd: Option<PathBuf>,
    /// The name of the machine, inside.
    pub hostname: String,
    /// The command's user, inside.
    #[serde(default)]
    pub uid: u32,
    /// The command's group, inside.
    #[serde(default)]
    pub gid: u32,
    /// The number of CPUs.
    #[serde(default)]
    pub cpus: Option<f64>,
    /// The memory, in bytes.
    #[serde(default)]
    pub memory: Option<u64>,
    /// The number of processes and threads.
    #[serde(default)]
    pub pids: Option<u64>,
    /// The name of a control group that is made for it, below the caller's or below the
    /// nearest one above that may have groups.
    #[serde(default)]
    pub cgroup: Option<String>,
    /// Directories and files of the host: where they are, where they are inside, and whether
    /// they are only read.
    #[serde(default)]
    pub volumes: Vec<Volume>,
    /// The number of an inherited descriptor, past 2.
    #[serde(default)]
    pub marks: Option<i32>,
}

/// A directory or file of the host's, where it is inside, and whether it is read-only.
pub type Volume = (PathBuf, PathBuf, bool);

impl Spec {
    /// Refuses what no container can be.
    pub fn check(&self) -> Result<(), Error> {
        let name = self.args.first().is_some_and(|name| !name.is_empty());
        let cgroup = self.cgroup.as_deref().unwrap_or("x");
        let inside = self.volumes.iter().map(|(_, inside, _)| inside.as_path());
        let mut inside = inside.chain(self.cwd.as_deref());
        let cpus = self.cpus.unwrap_or(1.0);
        let wrong = match () {
            () if !name => "args: no command",
            () if ["", ".", ".."].contains(&cgroup) || cgroup.contains('/') => "cgroup: no name",
            () if !inside.all(Path::is_absolute) => "paths inside are absolute",
            () if !(cpus > 0.0 && cpus < 1e6) => "cpus: not between 0 and 1000000",
            () if self.marks.is_some_and(|fd| fd <= libc::STDERR_FILENO) => "marks: it is past 2",
            () => return Ok(()),
        };
        Err(Error::invalid(wrong))
    }
}
