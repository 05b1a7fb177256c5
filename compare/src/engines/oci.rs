//! `runc` and `crun`: a bundle each, with the configuration that they propose themselves.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use mayfly_sandbox::may_divide;
use rustix::process::geteuid;
use serde_json::{Value, json};

use super::commands::{program, remove_groups, words};
use super::engine::{About, Engine, Job, Place, VOLUME};
use crate::error::{Context, Error};
use crate::instance::{Launch, Sign};
use crate::model::Mark;
use crate::overlay::Overlay;
use crate::undo::ask;

pub struct Oci {
    name: &'static str,
    program: PathBuf,
    version: Option<String>,
    /// The configuration that the runtime's `spec` command proposes.
    proposed: Value,
    limits: bool,
    /// Its files have a layer for changes; else they are only read.
    overlay: bool,
}

impl Oci {
    pub fn find(name: &str, place: &Place) -> Result<Self, String> {
        let program = program(name)?;
        let name = if name == "runc" { "runc" } else { "crun" };
        let bundle = place.directory.join(name);
        let failed = |what: &str| format!("{name} spec: {what}");
        fs::create_dir_all(&bundle).map_err(|error| failed(&error.to_string()))?;
        let root = geteuid().is_root();
        let mut command = Command::new(&program);
        command.arg("spec").args((!root).then_some("--rootless"));
        // Where it makes a directory, whatever it is asked.
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
            // Without a group crun ignores them silently.
            limits: root || may_divide(),
            // Another user may only mount in a namespace in which runc is not the user.
            overlay: root,
        })
    }
}

impl Engine for Oci {
    fn about(&self) -> About {
        let mut notes = vec![format!(
            "the configuration of `{} spec`: three capabilities, no seccomp filter",
            self.name
        )];
        if !self.overlay {
            notes.push("the image's files read-only, as an overlay cannot be had".into());
        }
        if !self.limits {
            notes.push(
                "without limits of CPU and memory, which this host does not let it set".into(),
            );
        }
        About {
            version: self.version.clone(),
            network: "loopback".into(),
            notes,
        }
    }

    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Error> {
        const PERIOD_US: u64 = 100_000;
        let mut config = self.proposed.clone();
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(job.command());
        config["process"]["env"] = json!(place.env);
        config["hostname"] = json!(job.id);
        let (overlay, root) = match self.overlay {
            true => {
                let made = Overlay::prepare(&place.root, &job.directory);
                let (overlay, root) = made.or_host(job.directory.display())?;
                (Some(overlay), root)
            }
            false => (None, place.root.clone()),
        };
        config["root"] = json!({ "path": root, "readonly": !self.overlay });
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
        fs::write(job.directory.join("config.json"), text).or_host(job.directory.display())?;
        let state = job.directory.join("state");
        fs::create_dir(&state).or_host(state.display())?;
        let mut begin = vec![self.program.clone().into_os_string()];
        begin.extend(words(["--root", &state.to_string_lossy()]));
        let mut command = begin.clone();
        command.extend(words([
            "run",
            "--bundle",
            &job.directory.to_string_lossy(),
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
                // It reads that first of all.
                Sign::FileOpened(job.directory.join("config.json"), Mark::Launched),
                Sign::File(state.join(&job.id).join(created), Mark::Built),
            ],
            // What it has not noted yet it does not delete.
            undo: vec![undo, remove_groups(&job.id)],
            overlay,
            ..Launch::default()
        })
    }

    fn ask_less(&mut self) -> bool {
        (self.limits, self.overlay) = match (self.limits, self.overlay) {
            (true, overlay) => (false, overlay),
            (false, true) => (true, false),
            (false, false) => return false,
        };
        true
    }
}
