//! `podman run`, on the unpacked root with an overlay.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::{About, Engine, Job, Place, VOLUME, first_line, program, words};
use crate::compare::instance::{Launch, Sign};
use crate::compare::model::Mark;
use crate::compare::peer::Origin;
use crate::failure::Failure;

pub struct Podman {
    program: PathBuf,
    version: Option<String>,
    /// Its manager of cgroups, where the one that it takes by itself is not there.
    manager: Option<&'static str>,
    /// Its storage, for this comparison alone.
    storage: PathBuf,
    network: bool,
    limits: bool,
}

impl Podman {
    pub fn find(place: &Place) -> Result<Self, String> {
        let program = program("podman")?;
        Ok(Podman {
            version: first_line(&program, &["--version"]),
            program,
            manager: (!Path::new("/run/systemd/system").exists()).then_some("cgroupfs"),
            storage: place.folder.join("podman"),
            network: true,
            limits: true,
        })
    }

    fn begin(&self) -> Vec<OsString> {
        let mut command = vec![self.program.clone().into_os_string()];
        let storage = self.storage.to_string_lossy();
        command.extend(words(["--root", &format!("{storage}/root")]));
        command.extend(words(["--runroot", &format!("{storage}/run")]));
        if let Some(manager) = self.manager {
            command.extend(words(["--cgroup-manager", manager]));
        }
        command
    }
}

impl Engine for Podman {
    fn about(&self) -> About {
        let mut notes = Vec::new();
        if !self.network {
            notes.push("without a network, as its own failed on this host".into());
        }
        if !self.limits {
            notes.push("without a cgroup, as this host does not let it have one".into());
        }
        About {
            version: self.version.clone(),
            network: match self.network {
                true => "its default".into(),
                false => "none".into(),
            },
            notes,
        }
    }

    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Failure> {
        let mut command = self.begin();
        let pidfile = job.folder.join("pid");
        command.extend(words(["run", "--rm", "--name", &job.id]));
        command.extend(words(["--pidfile", &pidfile.to_string_lossy()]));
        match self.limits {
            true => command.extend(words([
                "--cpus",
                &place.cpus.to_string(),
                "--memory",
                &format!("{}m", place.memory_mib),
            ])),
            false => command.extend(words(["--cgroups", "disabled"])),
        }
        if !self.network {
            command.extend(words(["--network", "none"]));
        }
        for variable in &place.env {
            command.extend(words(["--env", variable]));
        }
        if let Some(volume) = &job.volume {
            command.extend(words(["-v", &format!("{}:{VOLUME}", volume.display())]));
        }
        command.extend(words(["--rootfs", &format!("{}:O", place.root.display())]));
        command.extend(job.command().into_iter().map(Into::into));
        let mut undo = self.begin();
        undo.extend(words(["rm", "--force", "--time", "0", &job.id]));
        let mut stop = self.begin();
        stop.extend(words(["kill", "--signal", "TERM", &job.id]));
        Ok(Launch {
            command,
            nonce: job.nonce.clone(),
            signs: vec![Sign::File(pidfile, Mark::Built)],
            stop: Some(stop),
            undo: vec![undo],
            ..Launch::default()
        })
    }

    /// An ordinary user's network is a process of the host, root's a bridge.
    fn origin(&self) -> Origin {
        match rustix::process::geteuid().is_root() {
            true => Origin::Anywhere,
            false => Origin::Host,
        }
    }

    fn ask_less(&mut self) -> bool {
        (self.network, self.limits) = match (self.network, self.limits) {
            (true, true) => (true, false),
            (true, false) => (false, true),
            (false, true) => (false, false),
            (false, false) => return false,
        };
        true
    }
}
