//! A sandbox on its way.

#![allow(unsafe_code, reason = "a setting of the heap")]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::confinement::ConfinementBarrier;
use super::credentials::{self, Ids};
use super::layers::Report;
use super::lifeline::check;
use super::policy::Mode;

/// What a VMM process has to know of the sandbox that it was started in, to close it. It says
/// nothing of the host but user and group numbers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PreparedSandbox {
    pub(super) mode: Mode,
    /// The user and group that the process becomes.
    pub(super) ids: Option<Ids>,
    pub(super) report: Report,
    pub(super) namespaces: libc::c_int,
}

/// The VMM process, as it sees itself before the sandbox closes.
#[derive(Debug)]
pub struct SandboxSetup {
    pub(super) mode: Mode,
    /// The user and group that it becomes.
    pub(super) ids: Option<Ids>,
    pub(super) report: Report,
    /// Its other end closes when the supervisor has ended.
    pub(super) lifeline: File,
    pub(super) namespaces: libc::c_int,
    pub(super) barrier: ConfinementBarrier,
}

impl SandboxSetup {
    /// Goes on in a sandbox that was prepared, in a process with one thread, whose lifeline
    /// closes when the supervisor has ended.
    pub fn resume(prepared: PreparedSandbox, lifeline: OwnedFd) -> io::Result<Self> {
        // Other heaps than the process's own reserve 64 MiB for each thread, and grow by
        // `mprotect`, which is forbidden later.
        // SAFETY: this process has one thread, and no heap but that.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
        credentials::die_with_parent()?;
        check(&lifeline)?;
        let PreparedSandbox {
            mode,
            ids,
            report,
            namespaces,
        } = prepared;
        Ok(SandboxSetup {
            mode,
            ids,
            report,
            lifeline: lifeline.into(),
            namespaces,
            barrier: ConfinementBarrier::default(),
        })
    }

    /// For threads that start before the sandbox closes.
    pub fn barrier(&self) -> ConfinementBarrier {
        self.barrier.clone()
    }

    /// The state of the layers so far.
    pub fn report(&self) -> &Report {
        &self.report
    }
}
