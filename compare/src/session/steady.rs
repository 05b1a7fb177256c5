//! What usual work costs.

use std::fs;

use mayfly_protocol::peer::Way;
use mayfly_protocol::steady::Steady;

use super::{Session, Stop};
use crate::engines::VOLUME;
use crate::error::Context;
use crate::peer::Peer;

impl Session<'_> {
    /// Lets each do usual work.
    pub(super) fn measure_steady(&mut self) -> Result<(), Stop> {
        for index in 0..self.parts.len() {
            self.tell(&format!("steady state: {}", self.parts[index].report.name));
            // What one leaves there is nothing to another.
            let volume = self.workspace.directory.join(format!("volume-{index}"));
            fs::create_dir(&volume).or_host(volume.display())?;
            let mut words = vec!["steady".to_owned()];
            let volume = self.parts[index]
                .engine
                .has_volumes()
                .then(|| volume.clone());
            if volume.is_some() {
                words.push(format!("volume={VOLUME}"));
            }
            // It listens as long as this engine is measured.
            let peer = Peer::start(self.parts[index].engine.origin());
            match &peer {
                Ok(peer) => words.push(peer.meeting().to_string()),
                Err(error) => {
                    let note = format!("TCP could not be measured: {error}");
                    self.parts[index].report.notes.push(note);
                }
            }
            let instance = self.one(index, &words, volume)?;
            drop(peer);
            let found: Option<Steady> = instance
                .data
                .as_ref()
                .and_then(|data| serde_json::from_str(data).ok());
            let report = &mut self.parts[index].report;
            match (found, instance.error()) {
                (Some(Steady { figures, tcp }), None) => {
                    if let Some(Way::Lost(why)) = &tcp {
                        let note = format!("TCP could not be measured: {why}");
                        report.notes.push(note);
                    }
                    (report.steady, report.tcp) = (figures, tcp);
                }
                // Figures of one that failed are none.
                (_, error) => report.notes.push(format!(
                    "the steady state could not be measured: {}",
                    error.unwrap_or_else(|| "it said nothing".into())
                )),
            }
        }
        Ok(())
    }
}
