//! `docker run`, with an image that is imported for the comparison.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::commands::{program, words};
use super::engine::{About, Engine, Job, Place, VOLUME};
use crate::error::Error;
use crate::instance::{Launch, Sign};
use crate::model::Mark;
use crate::peer::Origin;
use crate::undo::ask;

pub struct Docker {
    program: PathBuf,
    version: Option<String>,
    image: String,
    network: bool,
}

impl Docker {
    pub fn find(place: &Place) -> Result<Self, String> {
        let program = program("docker")?;
        let mut command = Command::new(&program);
        let version = ask(command.args(["version", "--format", "{{.Server.Version}}"]))?;
        let name = place.directory.file_name().unwrap_or_default();
        Ok(Docker {
            program,
            version: Some(version.trim().to_owned()),
            image: format!("{}:latest", name.to_string_lossy().to_lowercase()),
            network: true,
        })
    }
}

impl Engine for Docker {
    fn prepare(&mut self, place: &Place) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("docker import: {error}");
        let mut tar = Command::new("tar")
            .arg("-C")
            .arg(&place.root)
            .args(["-cf", "-", "."])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let archive = tar.stdout.take().map_or_else(Stdio::null, Stdio::from);
        let mut import = Command::new(&self.program);
        import.args(["import", "-", &self.image]).stdin(archive);
        let output = import.output().map_err(failed)?;
        tar.wait().map_err(failed)?;
        match output.status.success() {
            true => Ok(()),
            false => {
                let why = String::from_utf8_lossy(&output.stderr);
                Err(format!("docker import: {}", why.trim()))
            }
        }
    }

    fn about(&self) -> About {
        let mut notes = vec!["its memory is not counted: its processes are its daemon's".into()];
        if !self.network {
            notes.push("without a network, as its own failed on this host".into());
        }
        About {
            version: self.version.clone(),
            network: match self.network {
                true => "its default (a bridge)".into(),
                false => "none".into(),
            },
            notes,
        }
    }

    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Error> {
        let mut command = vec![self.program.clone().into_os_string()];
        let id = job.directory.join("id");
        command.extend(words(["run", "--rm", "--name", &job.id]));
        command.extend(words(["--cidfile", &id.to_string_lossy()]));
        command.extend(words(["--cpus", &place.cpus.to_string()]));
        command.extend(words(["--memory", &format!("{}m", place.memory_mib)]));
        if !self.network {
            command.extend(words(["--network", "none"]));
        }
        for variable in &place.env {
            command.extend(words(["--env", variable]));
        }
        if let Some(volume) = &job.volume {
            command.extend(words(["-v", &format!("{}:{VOLUME}", volume.display())]));
        }
        command.push(self.image.clone().into());
        command.extend(job.command().into_iter().map(Into::into));
        let program = self.program.to_string_lossy();
        Ok(Launch {
            command,
            nonce: job.nonce.clone(),
            // The daemon has made the container by then, but not begun it.
            signs: vec![Sign::File(id, Mark::Built)],
            stop: Some(words([&program, "kill", "--signal", "TERM", &job.id])),
            undo: vec![words([&program, "rm", "--force", &job.id])],
            ..Launch::default()
        })
    }

    fn ask_less(&mut self) -> bool {
        std::mem::take(&mut self.network)
    }

    fn origin(&self) -> Origin {
        match self.network {
            true => Origin::Anywhere,
            false => Origin::Host,
        }
    }

    fn memory_is_ours(&self) -> bool {
        false
    }

    fn undo(&self) -> Vec<Vec<OsString>> {
        let program = self.program.to_string_lossy();
        vec![words([&program, "rmi", "--force", &self.image])]
    }
}
