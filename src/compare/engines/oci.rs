//! `runc` and `crun`: a bundle each, with the configuration that they propose themselves.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::geteuid;
use serde_json::{Value, json};

use super::{About, Engine, Job, Place, VOLUME, program, words};
use crate::compare::instance::{Launch, Sign};
use crate::compare::model::{Kind, Mark};
use crate::compare::undo::ask;
use crate::failure::{Failure, OrFail};
use crate::sandbox::may_divide;

pub struct Oci {
    name: &'static str,
    program: PathBuf,
    version: Option<String>,
    /// What `spec` proposes.
    proposed: Value,
    limits: bool,
}

impl Oci {
    pub fn find(name: &str, place: &Place) -> Result<Self, String> {
        let program = program(name)?;
        let name = if name == "runc" { "runc" } else { "crun" };
        let bundle = place.folder.join(name);
        let failed = |what: &str| format!("{name} spec: {what}");
        fs::create_dir_all(&bundle).map_err(|error| failed(&error.to_string()))?;
        let root = geteuid().is_root();
        let mut command = Command::new(&program);
        command.arg("spec").args((!root).then_some("--rootless"));
        // Where it makes a folder, whatever it is asked.
        let env = ("XDG_RUNTIME_DIR", &bundle);
        ask(command.current_dir(&bundle).envs([env]))?;
        let said = ask(Command::new(&program).arg("--version").envs([env])).ok();
        let text = fs::read(bundle.join("config.json"));
        let text = text.map_err(|error| failed(&error.to_string()))?;
        Ok(Oci {
            name,
            version: said.and_then(|said| said.lines().next().map(str::to_owned)),
            program,
            proposed: serde_json::from_slice(&text).map_err(|error| failed(&error.to_string()))?,
            // Without a group crun ignores them, and says nothing.
            limits: root || may_divide(),
        })
    }
}

impl Engine for Oci {
    fn about(&self) -> About {
        let mut notes = vec![
            format!(
                "the configuration of `{} spec`: three capabilities, no seccomp filter",
                self.name
            ),
            "the image's files themselves, without an overlay: what is written there stays".into(),
        ];
        if !self.limits {
            notes.push(
                "without limits of CPU and memory, which this host does not let it set".into(),
            );
        }
        About {
            kind: Kind::Container,
            version: self.version.clone(),
            network: "loopback".into(),
            notes,
        }
    }

    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Failure> {
        const PERIOD_US: u64 = 100_000;
        let mut config = self.proposed.clone();
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(job.command());
        config["process"]["env"] = json!(place.env);
        config["hostname"] = json!(job.id);
        config["root"] = json!({ "path": place.root, "readonly": false });
        if let (Some(volume), Some(mounts)) = (&job.volume, config["mounts"].as_array_mut()) {
            mounts.push(json!({
                "destination": VOLUME, "type": "bind", "source": volume, "options": ["bind", "rw"],
            }));
        }
        if self.limits {
            config["linux"]["resources"]["memory"] = json!({ "limit": place.memory_mib << 20 });
            config["linux"]["resources"]["cpu"] = json!({
                "quota": u64::from(place.cpus) * PERIOD_US, "period": PERIOD_US,
            });
        }
        let text = serde_json::to_vec(&config).or_internal("a bundle's configuration")?;
        fs::write(job.folder.join("config.json"), text).or_host(job.folder.display())?;
        let state = job.folder.join("state");
        fs::create_dir(&state).or_host(state.display())?;
        let mut begin = vec![self.program.clone().into_os_string()];
        begin.extend(words(["--root", &state.to_string_lossy()]));
        let mut command = begin.clone();
        command.extend(words([
            "run",
            "--bundle",
            &job.folder.to_string_lossy(),
            &job.id,
        ]));
        let mut undo = begin;
        undo.extend(words(["delete", "--force", &job.id]));
        // What it writes once its container is made, and waits to begin.
        let created = match self.name {
            "runc" => "state.json",
            _ => "status",
        };
        Ok(Launch {
            command,
            nonce: job.nonce.clone(),
            signs: vec![
                Sign::File(state.join(&job.id), Mark::Launched),
                Sign::File(state.join(&job.id).join(created), Mark::Built),
            ],
            undo: vec![undo],
            ..Launch::default()
        })
    }

    fn ask_less(&mut self) -> bool {
        std::mem::take(&mut self.limits)
    }
}
