//! Who is compared. Each says how an instance is launched, and what shows how far it is.

mod container;
mod docker;
mod machines;
mod mayfly;
mod oci;
mod own;
mod podman;
mod process;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Pid;

use super::instance::Launch;
use super::model::Kind;
use super::peer::Origin;
use super::undo::ask;
use crate::failure::Failure;
use crate::kvm::accept::AcceptKvm;

/// All there are, as `--engines` takes them.
pub const NAMES: [&str; 10] = [
    "process",
    "container",
    "mayfly",
    "runc",
    "crun",
    "podman",
    "docker",
    "qemu",
    "firecracker",
    "cloud-hypervisor",
];

/// What an engine is, by its name; `NAME=PROGRAM` is the user's own.
pub fn kind(name: &str) -> Kind {
    match name {
        "process" => Kind::Process,
        "container" | "runc" | "crun" | "podman" | "docker" => Kind::Container,
        "mayfly" | "qemu" | "firecracker" | "cloud-hypervisor" => Kind::Vm,
        _ => Kind::Own,
    }
}

/// Where the probe lies in all roots.
pub const PROBE: &str = "/.mayfly-probe";
/// Where an instance sees the volume, if it has one.
pub const VOLUME: &str = "/.mayfly-volume";

/// What all engines are given.
#[derive(Debug)]
pub struct Place {
    /// For what comes and goes.
    pub folder: PathBuf,
    /// mayfly, in a file of its own.
    pub program: PathBuf,
    /// The image's files, with the probe. What runs in a container must not write there.
    pub root: PathBuf,
    /// The probe itself, which no image or container can have changed.
    pub probe: PathBuf,
    /// What mayfly knows as `XDG_DATA_HOME`, with the same files as an image.
    pub data: PathBuf,
    /// That image's name.
    pub image: String,
    /// The image's variables.
    pub env: Vec<String>,
    /// CPUs of an instance.
    pub cpus: u32,
    /// Memory of an instance, in MiB.
    pub memory_mib: u64,
    /// A kernel for those that need one, and its initial RAM disk.
    pub guest: Option<(PathBuf, PathBuf)>,
    /// The initial RAM disk that `mayfly run` boots.
    pub own_initrd: Option<PathBuf>,
    /// Whether VMs use a KVM that seems to emulate.
    pub accept_kvm: AcceptKvm,
}

/// One launch.
#[derive(Debug)]
pub struct Job {
    /// What it is called, by nothing else on this host.
    pub id: String,
    /// What the probe's records begin with.
    pub nonce: String,
    /// What the probe is to do.
    pub words: Vec<String>,
    /// A folder of its own.
    pub folder: PathBuf,
    /// A folder of the host's that it is to have, too.
    pub volume: Option<PathBuf>,
}

impl Job {
    /// The command, for those that see the image's root.
    pub fn command(&self) -> Vec<String> {
        let words = [PROBE, self.nonce.as_str()].map(str::to_owned);
        words
            .into_iter()
            .chain(self.words.iter().cloned())
            .collect()
    }
}

/// What is to be known of an engine.
#[derive(Clone, Debug)]
pub struct About {
    /// As it says itself.
    pub version: Option<String>,
    /// Which network it gives.
    pub network: String,
    /// What one must know to read its figures.
    pub notes: Vec<String>,
}

/// One that can be compared.
pub trait Engine {
    /// What is to be known of it.
    fn about(&self) -> About;

    /// Makes what it keeps between instances. What removes that is known before.
    fn prepare(&mut self, _place: &Place) -> Result<(), String> {
        Ok(())
    }

    /// How an instance is launched.
    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Failure>;

    /// Asks less of the host, as what it was asked failed. False if there is nothing left.
    fn ask_less(&mut self) -> bool {
        false
    }

    /// It can give an instance a folder of the host.
    fn has_volumes(&self) -> bool {
        true
    }

    /// Where its instances' connections to the host come from.
    fn origin(&self) -> Origin {
        Origin::Host
    }

    /// Its processes are below ours.
    fn can_be_weighed(&self) -> bool {
        true
    }

    /// Processes that stay between instances. They are no part of any.
    fn residents(&self) -> Vec<Pid> {
        Vec::new()
    }

    /// What removes what it keeps between instances.
    fn undo(&self) -> Vec<Vec<OsString>> {
        Vec::new()
    }
}

/// Finds one by its name, or by `NAME=PROGRAM`; else says why it is missing.
pub fn find(name: &str, place: &Place) -> Result<Box<dyn Engine>, String> {
    if let Some((_, program)) = name.split_once('=') {
        let program = PathBuf::from(program);
        return Ok(Box::new(own::Own { program }));
    }
    Ok(match name {
        "process" => Box::new(process::Process),
        "container" => Box::new(container::Container),
        "mayfly" => Box::new(mayfly::Mayfly::find(place)?),
        "runc" | "crun" => Box::new(oci::Oci::find(name, place)?),
        "podman" => Box::new(podman::Podman::find(place)?),
        "docker" => Box::new(docker::Docker::find(place)?),
        "qemu" | "firecracker" | "cloud-hypervisor" => {
            Box::new(machines::Machine::find(name, place)?)
        }
        _ => return Err("there is no such engine".into()),
    })
}

/// A program of the host.
fn program(name: &str) -> Result<PathBuf, String> {
    let found = mayfly_process::programs::find_program(name);
    found.ok_or_else(|| format!("{name} is not installed"))
}

/// The first line that a program prints, if it succeeds.
fn first_line(program: &Path, arguments: &[&str]) -> Option<String> {
    let text = ask(Command::new(program).args(arguments)).ok()?;
    text.lines().next().map(|line| line.trim().to_owned())
}

/// Removes the control groups of an instance, which a launcher that is killed leaves.
fn remove_groups(id: &str) -> Vec<OsString> {
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

fn words<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.into_iter().map(OsString::from).collect()
}
