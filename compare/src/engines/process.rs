//! Nothing at all: a process of the host, as the floor.

use super::engine::{About, Engine, Job, Place, VOLUME};
use crate::error::Error;
use crate::instance::Launch;

pub struct Process;

impl Engine for Process {
    fn about(&self) -> About {
        About {
            version: None,
            network: "the host's".into(),
            notes: vec!["the command is the host's own, not the image's".into()],
        }
    }

    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Error> {
        let mut command = job.command();
        if job.words.first().is_some_and(|verb| verb == "steady") {
            // Not the image's own directory: what it has there may lead anywhere.
            command.push(format!("root={}", job.directory.display()));
        }
        // It sees the host's root.
        for word in &mut command {
            if let (Some(rest), Some(volume)) = (word.strip_prefix("volume="), &job.volume)
                && rest == VOLUME
            {
                *word = format!("volume={}", volume.display());
            }
        }
        let mut command: Vec<_> = command.into_iter().map(Into::into).collect();
        if let Some(program) = command.first_mut() {
            *program = place.probe.clone().into();
        }
        Ok(Launch {
            command,
            nonce: job.nonce.clone(),
            ..Launch::default()
        })
    }
}
