//! What is to be compared.

use std::path::PathBuf;
use std::time::Duration;

/// A part of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Starts, in phases.
    Start,
    /// The memory of instances that idle.
    Memory,
    /// The load of many starts at once.
    Load,
    /// The steady state: what CPU, system calls, files and TCP cost.
    Steady,
    /// Isolation: what can be seen of the host from inside.
    Isolation,
}

/// The options of a comparison.
pub struct Options {
    /// As `mayfly run` takes it.
    pub image: String,
    /// Empty: only the marker.
    pub command: Vec<String>,
    /// The runs of each engine that count.
    pub runs: u32,
    /// The runs of each engine before those.
    pub warmup: u32,
    /// Names, or none for all.
    pub engines: Vec<String>,
    /// The parts that are wanted.
    pub measures: Vec<Measure>,
    /// The number of starts at once.
    pub parallel: u32,
    /// The CPUs of each instance.
    pub cpus: u32,
    /// The memory of each instance, in MiB.
    pub memory_mib: u64,
    /// Decides the order.
    pub seed: u64,
    /// Let the host forget files before each run.
    pub drop_caches: bool,
    /// The time that an instance may take.
    pub timeout: Duration,
    /// One of those that are compared.
    pub mayfly: Mayfly,
}

/// What mayfly tells of itself: it is one engine of several.
pub struct Mayfly {
    /// Its version.
    pub version: String,
    /// The directory of its images.
    pub store: PathBuf,
    /// The guest that VMs boot.
    pub guest: Guest,
    /// The start of the kernel's command line, for all VMs.
    pub cmdline: String,
    /// Tells why VMs cannot run on this host, if that is so.
    pub check_kvm: Box<dyn Fn() -> Result<(), String>>,
    /// The arguments of `mayfly run` beside what is compared.
    pub flags: Vec<String>,
    /// `passt`, if there is one: without it, its VMs have no network.
    pub passt: Option<PathBuf>,
    /// How many system calls of the host its VM process may make.
    pub system_calls: Option<u32>,
}

/// The files of a guest that VMs boot.
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
