//! What is to be compared.

use std::path::PathBuf;
use std::time::Duration;

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Starts, in phases.
    Start,
    /// What instances that idle have in memory.
    Memory,
    /// Many at once.
    Load,
    /// What usual work costs.
    Steady,
    /// What can be seen from inside.
    Isolation,
}

/// What is to be compared.
pub struct Options {
    /// As `mayfly run` takes it.
    pub image: String,
    /// Empty: only the marker.
    pub command: Vec<String>,
    /// Of each engine.
    pub runs: u32,
    /// Of each engine, before those.
    pub warmup: u32,
    /// Names, or none for all.
    pub engines: Vec<String>,
    /// What is looked at.
    pub measures: Vec<Measure>,
    /// How many at once.
    pub parallel: u32,
    /// Of each instance.
    pub cpus: u32,
    /// Of each instance, in MiB.
    pub memory_mib: u64,
    /// Decides the order.
    pub seed: u64,
    /// Let the host forget files before each run.
    pub drop_caches: bool,
    /// How long an instance may take.
    pub patience: Duration,
    /// One of those that are compared.
    pub mayfly: Mayfly,
}

/// What mayfly tells of itself: it is one engine of several.
pub struct Mayfly {
    /// Its version.
    pub version: String,
    /// Where its images are.
    pub store: PathBuf,
    /// What VMs boot.
    pub guest: Guest,
    /// The start of the kernel's command line, for all VMs.
    pub cmdline: String,
    /// Tells why VMs cannot run on this host, if that is so.
    pub check_kvm: Box<dyn Fn() -> Result<(), String>>,
    /// What `mayfly run` is told beside what is compared.
    pub flags: Vec<String>,
    /// `passt`, if there is one: without it, its VMs have no network.
    pub passt: Option<PathBuf>,
    /// How many system calls of the host its VM process may make.
    pub system_calls: Option<u32>,
}

/// What VMs boot.
pub struct Guest {
    /// Its name.
    pub name: String,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk for other monitors, if there is one.
    pub initrd: Option<PathBuf>,
    /// The one that `mayfly run` boots.
    pub run_initrd: Option<PathBuf>,
    /// The program that measures, in all engines.
    pub probe: Option<PathBuf>,
}
