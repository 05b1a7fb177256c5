//! The container that mayfly itself makes: Docker's defaults, and nothing installed.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::commands::{remove_groups, words};
use super::engine::{About, Engine, Job, Place, VOLUME};
use crate::container::Spec;
use crate::error::{Context, Error};
use crate::instance::{Launch, Sign};

pub struct Container {
    /// mayfly's.
    pub version: String,
}

impl Engine for Container {
    fn about(&self) -> About {
        About {
            version: Some(self.version.clone()),
            network: "loopback".into(),
            notes: Vec::new(),
        }
    }

    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Error> {
        let what = "a container";
        let (read, write) = io::pipe().or_host(what)?;
        let write = OwnedFd::from(write);
        let volume = job.volume.iter();
        let spec = Spec {
            root: place.root.clone(),
            writable: job.directory.join("writable"),
            args: job.command(),
            env: place.env.clone(),
            hostname: job.id.clone(),
            cpus: Some(f64::from(place.cpus)),
            memory: Some(place.memory_mib << 20),
            cgroup: Some(job.id.clone()),
            volumes: volume
                .map(|host| (host.clone(), VOLUME.into(), false))
                .collect(),
            marks: Some(write.as_raw_fd()),
            ..Spec::default()
        };
        fs::create_dir(&spec.writable).or_host(what)?;
        let path = job.directory.join("spec.json");
        fs::write(&path, serde_json::to_vec(&spec).or_internal(what)?).or_host(what)?;
        let mut command = vec![place.program.clone().into_os_string()];
        command.extend(words(["compare-container", &path.to_string_lossy()]));
        Ok(Launch {
            command,
            undo: vec![remove_groups(&job.id)],
            nonce: job.nonce.clone(),
            signs: vec![Sign::Lines(read.into())],
            inherited: vec![write],
            ..Launch::default()
        })
    }
}
