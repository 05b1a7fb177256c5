//! Many at once.

use std::time::Duration;

use super::{Session, Stop};
use crate::instance::Instance;
use crate::instance::batch::{Batch, BatchError};
use crate::model::{Load, Mark};
use crate::statistics::Summary;

impl Session<'_> {
    /// Starts many at once.
    pub(super) fn measure_load(&mut self) -> Result<(), Stop> {
        let at_once = self.options.parallel;
        for index in 0..self.parts.len() {
            let name = self.parts[index].report.name.clone();
            self.tell(&format!("{at_once} at once: {name}"));
            let mut batch = Batch::default();
            let words = self.run_words();
            // All is prepared before the first is launched.
            let mut launches = Vec::new();
            for _ in 0..at_once {
                launches.push(self.prepare(index, &words, None)?);
            }
            self.workspace.note(&self.undo_of(&batch, &launches))?;
            let mut launched = Ok(());
            for launch in launches {
                launched = batch.launch(launch).map_err(BatchError::Io);
                // Who is quick is seen at once.
                launched = launched.and_then(|()| batch.turn(&self.ends, Duration::ZERO));
                if launched.is_err() {
                    break;
                }
            }
            let ended =
                launched.and_then(|()| batch.wait_for_end(&self.ends, self.options.timeout));
            let instances = match ended {
                Ok(()) => batch.instances,
                Err(BatchError::Interrupted) => {
                    batch.end(&self.ends);
                    return Err(Stop::Interrupted);
                }
                Err(error) => {
                    let note = format!("{at_once} at once: {error}");
                    self.parts[index].report.notes.push(note);
                    batch.abandon(&self.ends)
                }
            };
            self.clean_up(&instances)?;
            let good = || instances.iter().filter(|it| it.error().is_none());
            if let Some(error) = instances.iter().find_map(Instance::error) {
                let failed = instances.len() - good().count();
                let note = format!("{at_once} at once: {failed} failed, the first as {error}");
                self.parts[index].report.notes.push(note);
            }
            let starts_ns: Vec<u64> = good()
                .filter_map(|it| it.since_launch(Mark::Command))
                .collect();
            let first = instances.iter().map(Instance::launched).min().unwrap_or(0);
            let latest = instances.iter().map(Instance::launched).max();
            let last = good().filter_map(|it| it.at(Mark::Command)).max();
            let span = last.unwrap_or(first).saturating_sub(first) as f64 / 1e9;
            self.parts[index].report.load = Some(Load {
                at_once,
                launched_within_ns: latest.unwrap_or(first) - first,
                start: Summary::of(&starts_ns),
                starts_per_second: match span > 0.0 {
                    true => starts_ns.len() as f64 / span,
                    false => 0.0,
                },
                failed: at_once.saturating_sub(u32::try_from(starts_ns.len()).unwrap_or(0)),
                starts_ns,
            });
        }
        Ok(())
    }
}
