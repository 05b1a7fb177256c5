//! Who is compared. Each says how an instance is launched, and what shows how far it is.

mod commands;
mod container;
mod docker;
mod engine;
mod machines;
mod mayfly;
mod oci;
mod own;
mod podman;
mod process;

use std::path::PathBuf;

pub use self::engine::{Engine, Job, PROBE, Place, VOLUME};
use super::model::Kind;

/// All there are, as `--engines` takes them.
pub const NAMES: [&str; 11] = [
    "process",
    "container",
    "mayfly",
    "mayfly-cold",
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
        "mayfly" | "mayfly-cold" | "qemu" | "firecracker" | "cloud-hypervisor" => Kind::Vm,
        _ => Kind::Own,
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
        "container" => Box::new(container::Container {
            version: place.mayfly.version.clone(),
        }),
        "mayfly" => Box::new(mayfly::Mayfly::find(place, false)?),
        "mayfly-cold" => Box::new(mayfly::Mayfly::find(place, true)?),
        "runc" | "crun" => Box::new(oci::Oci::find(name, place)?),
        "podman" => Box::new(podman::Podman::find(place)?),
        "docker" => Box::new(docker::Docker::find(place)?),
        "qemu" | "firecracker" | "cloud-hypervisor" => {
            Box::new(machines::Machine::find(name, place)?)
        }
        _ => return Err("there is no such engine".into()),
    })
}
