//! What a comparison found: every raw sample, and what follows from it.
//!
//! It is what `--json` prints; the table, the page and the CSV are made of nothing else.

use std::collections::BTreeMap;

pub use mayfly_protocol::peer::Way;
pub use mayfly_protocol::steady::Figure;
use serde::{Deserialize, Serialize};

use super::statistics::Summary;

/// The version of the record: another one if a field changes its meaning.
pub const FORMAT: u32 = 1;

/// Moments in an instance's life, in their order. A phase is what ends with one; where an
/// engine does not let one be seen, its phase is part of the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mark {
    /// The launcher's own program runs.
    Launched,
    /// The sandbox, or the VM with its kernel in memory, is there.
    Built,
    /// The guest's kernel is entered.
    Kernel,
    /// The guest's init is reached.
    Init,
    /// The command's first instruction (its first word has arrived at the host).
    Command,
    /// The command ended (its last word has arrived at the host).
    Exit,
    /// The launcher ended, and nothing is left.
    Gone,
}

impl Mark {
    /// All of them.
    pub const ALL: [Mark; 7] = [
        Mark::Launched,
        Mark::Built,
        Mark::Kernel,
        Mark::Init,
        Mark::Command,
        Mark::Exit,
        Mark::Gone,
    ];

    /// As the record calls it.
    pub fn name(self) -> &'static str {
        match self {
            Mark::Launched => "launched",
            Mark::Built => "built",
            Mark::Kernel => "kernel",
            Mark::Init => "init",
            Mark::Command => "command",
            Mark::Exit => "exit",
            Mark::Gone => "gone",
        }
    }

    /// What is called so in the record.
    pub fn named(name: &str) -> Option<Mark> {
        Mark::ALL.into_iter().find(|it| it.name() == name)
    }

    /// What the phase that ends with it is called.
    pub fn phase(self) -> &'static str {
        match self {
            Mark::Launched => "launcher",
            Mark::Built => "build",
            Mark::Kernel => "enter",
            Mark::Init => "kernel",
            Mark::Command => "init",
            Mark::Exit => "command",
            Mark::Gone => "teardown",
        }
    }
}

/// One instance, from its launch to its end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Which round of those that count, or of those that do not, from 0.
    pub round: u32,
    /// The how many-th launch of those that count, or of those that do not, from 0.
    pub position: u32,
    /// When what was seen, in nanoseconds since the launch. Only of an instance that
    /// came to its end does [`Mark::Gone`] exist.
    pub marks_ns: BTreeMap<Mark, u64>,
    /// The launcher's exit status; 128 and more for signals.
    pub status: Option<i32>,
    /// The command's exit status; 128 and more for signals. A run counts only with 0.
    #[serde(default)]
    pub command_status: Option<i32>,
    /// The reason why it does not count.
    pub error: Option<String>,
}

impl Sample {
    /// The phases, in order, in nanoseconds. Their sum is the total.
    pub fn phases(&self) -> Vec<(Mark, u64)> {
        let mut last = 0;
        let mut phases = Vec::new();
        for (&mark, &at) in &self.marks_ns {
            phases.push((mark, at.saturating_sub(last)));
            last = last.max(at);
        }
        phases
    }

    /// From the launch to the end, in nanoseconds, if it counts.
    pub fn total(&self) -> Option<u64> {
        match self.error {
            None => self.marks_ns.get(&Mark::Gone).copied(),
            Some(_) => None,
        }
    }

    /// From the launch to the command's first instruction, in nanoseconds, if it counts.
    pub fn start(&self) -> Option<u64> {
        self.total()
            .and_then(|_| self.marks_ns.get(&Mark::Command).copied())
    }
}

/// What stands between the command and the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A process of the host, without isolation.
    Process,
    /// Namespaces, on the host's kernel.
    Container,
    /// A machine, with a kernel of its own.
    Vm,
    /// Whatever a program of the user's makes.
    Own,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 4] = [Kind::Process, Kind::Container, Kind::Vm, Kind::Own];

    /// As the record calls it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Process => "process",
            Kind::Container => "container",
            Kind::Vm => "vm",
            Kind::Own => "own",
        }
    }
}

/// Memory of instances that idle, all together, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryPoint {
    /// The number of instances.
    pub instances: u32,
    /// Theirs alone.
    pub private_kib: u64,
    /// Shared with whomever.
    pub shared_kib: u64,
    /// Proportional set size: what is shared counts in parts. The guest's memory is in it.
    pub pss_kib: u64,
}

/// Many instances at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// How many were launched at once: one after the other, without waiting for any.
    pub at_once: u32,
    /// From the first launch to the last, in nanoseconds.
    #[serde(default)]
    pub launched_within_ns: u64,
    /// From the launch to the command's first instruction, each, in nanoseconds.
    pub starts_ns: Vec<u64>,
    /// The same, summed up.
    pub start: Option<Summary>,
    /// Instances that came to their command, by the time until the last one did.
    pub starts_per_second: f64,
    /// The number of instances that failed.
    pub failed: u32,
}

/// Isolation: what can be seen of the host from inside.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Isolation {
    /// `uname -r` inside.
    pub kernel: String,
    /// It is the host's own.
    pub host_kernel: bool,
    /// How many kinds of system calls of the command reach the host's kernel.
    pub host_syscalls: Option<u32>,
    /// How many kinds of system calls the process makes that serves the guest, at most.
    pub monitor_syscalls: Option<u32>,
    /// Device nodes below `/dev`.
    pub devices: Vec<String>,
    /// The command's effective capabilities, by their names.
    pub capabilities: Vec<String>,
    /// Whether capabilities count in a user namespace of its own only.
    pub own_user_namespace: bool,
    /// Its namespaces' kinds, and what its kernel calls them.
    #[serde(default)]
    pub namespaces: BTreeMap<String, String>,
    /// The namespaces that are the host's own.
    pub host_namespaces: Vec<String>,
    /// What `/proc` tells of the host: `memory`, `cpus`, `command line`, `modules`, `processes`.
    pub sees_of_host: Vec<String>,
    /// seccomp's mode: 0 none, 2 a filter.
    pub seccomp: u32,
}

/// One engine's part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineReport {
    /// As `--engines` takes it.
    pub name: String,
    /// The kind of the engine.
    pub kind: Kind,
    /// As it says itself.
    pub version: Option<String>,
    /// Why it is not compared: it is missing, or cannot run here.
    pub missing: Option<String>,
    /// What was launched, exactly; `{id}` stands for what differs from run to run.
    pub command_line: Vec<String>,
    /// What it was told by files in an instance's directory: their names, and what they hold.
    #[serde(default)]
    pub settings: BTreeMap<String, serde_json::Value>,
    /// Which network it gives by default.
    pub network: String,
    /// What one must know to read its figures.
    pub notes: Vec<String>,
    /// Those that came before and do not count, in the order in which they were taken.
    #[serde(default)]
    pub warmups: Vec<Sample>,
    /// In the order in which they were taken.
    pub samples: Vec<Sample>,
    /// Each phase of all samples that count.
    pub phases: BTreeMap<Mark, Summary>,
    /// From launch to command.
    pub start: Option<Summary>,
    /// From launch to end.
    pub total: Option<Summary>,
    /// Instances that idle.
    pub memory: Vec<MemoryPoint>,
    /// Many at once.
    pub load: Option<Load>,
    /// The figures of its steady state.
    pub steady: Vec<Figure>,
    /// By which way its TCP went to the host, if that was looked at.
    pub tcp: Option<Way>,
    /// Its isolation.
    pub isolation: Option<Isolation>,
}

impl EngineReport {
    /// One of which nothing is known yet.
    pub fn new(name: &str, kind: Kind) -> Self {
        EngineReport {
            name: name.to_owned(),
            kind,
            version: None,
            missing: None,
            command_line: Vec::new(),
            settings: BTreeMap::new(),
            network: String::new(),
            notes: Vec::new(),
            warmups: Vec::new(),
            samples: Vec::new(),
            phases: Default::default(),
            start: None,
            total: None,
            memory: Vec::new(),
            load: None,
            steady: Vec::new(),
            tcp: None,
            isolation: None,
        }
    }

    /// Makes what is summed up follow from the samples that count.
    pub fn sum_up(&mut self) {
        let counted = || self.samples.iter().filter(|it| it.total().is_some());
        let of = |times: Vec<u64>| Summary::of(&times);
        let mut phases: BTreeMap<Mark, Vec<u64>> = BTreeMap::new();
        for (mark, ns) in counted().flat_map(Sample::phases) {
            phases.entry(mark).or_default().push(ns);
        }
        let start = of(counted().filter_map(Sample::start).collect());
        let total = of(counted().filter_map(Sample::total).collect());
        self.phases = (phases.into_iter())
            .filter_map(|(mark, times)| Some((mark, of(times)?)))
            .collect();
        (self.start, self.total) = (start, total);
    }
}

/// The machine it ran on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// `uname -r`
    pub kernel: String,
    /// The CPU's name.
    pub cpu: String,
    /// The number of CPUs that are online.
    pub cpus: u32,
    /// In MiB.
    pub memory_mib: u64,
    /// The distribution's name.
    pub system: String,
    /// It is itself a VM, or emulated: what `systemd-detect-virt` would call it.
    pub virtualised: Option<String>,
    /// Started by root.
    pub root: bool,
    /// What decides the CPUs' clock rate, and its driver, if the host has one.
    #[serde(default)]
    pub governor: Option<String>,
    /// Whether a CPU may be faster than its nominal rate, if that can be seen.
    #[serde(default)]
    pub turbo: Option<bool>,
    /// The load of the minute before.
    #[serde(default)]
    pub load_before: f64,
    /// The load of the last minute.
    #[serde(default)]
    pub load_after: f64,
    /// The part of the CPUs' time that other machines had meanwhile, from 0 to 1.
    #[serde(default)]
    pub stolen: f64,
    /// The namespaces' kinds and ids of who compares, if isolation was looked at.
    #[serde(default)]
    pub namespaces: BTreeMap<String, String>,
}

/// The workload that ran in all engines.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// As it was named.
    pub image: String,
    /// The digest of its configuration.
    pub image_id: String,
    /// What the marker started; empty: only the marker ran.
    pub command: Vec<String>,
    /// vCPUs, or CPUs.
    pub cpus: u32,
    /// In MiB.
    pub memory_mib: u64,
    /// What the VMs boot, files and their digests: the kernel, mayfly's initial RAM disk and
    /// that of the others.
    #[serde(default)]
    pub guest: BTreeMap<String, String>,
}

/// Whether files were in the host's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PageCache {
    /// They were, after the warm-up.
    Warm,
    /// The host forgot them before each run.
    Dropped,
}

/// A whole comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT`]
    pub format: u32,
    /// mayfly's version.
    pub mayfly: String,
    /// When it began, in milliseconds since 1970.
    pub started_ms: u64,
    /// The seed of the order of runs.
    pub seed: u64,
    /// Runs of each engine that were wanted.
    pub runs: u32,
    /// Runs of each engine before those, which do not count.
    pub warmup: u32,
    /// The state of the page cache.
    pub page_cache: PageCache,
    /// It was ended before it was through.
    pub interrupted: bool,
    /// The host.
    pub host: Host,
    /// The workload.
    pub workload: Workload,
    /// The engines.
    pub engines: Vec<EngineReport>,
    /// The order of the runs that count: places in `engines`.
    pub order: Vec<u32>,
    /// Warnings about what makes figures doubtful.
    pub warnings: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_record() {
        for mark in Mark::ALL {
            assert_eq!(serde_json::to_value(mark).unwrap(), mark.name());
            assert_eq!(Mark::named(mark.name()), Some(mark));
        }
        for kind in Kind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }
}
