//! The memory of instances that idle.

use std::time::Duration;

use super::{Session, Stop};
use crate::instance::Instance;
use crate::instance::batch::{Batch, BatchError};
use crate::model::{Kind, Mark};
use crate::{host, processes};

/// The numbers of instances at which memory is measured.
const IDLE: [u32; 4] = [1, 2, 5, 10];
/// How long an instance that has come to its command is left alone before.
const SETTLE: Duration = Duration::from_millis(500);
/// What is left to the host of its free memory.
const SPARE_MIB: u64 = 512;

impl Session<'_> {
    /// Weighs instances that idle.
    pub(super) fn measure_memory(&mut self) -> Result<(), Stop> {
        let words = vec!["hold".to_owned()];
        for index in 0..self.parts.len() {
            if !self.parts[index].engine.memory_is_ours() {
                continue;
            }
            let name = self.parts[index].report.name.clone();
            let mut batch = Batch::default();
            for wanted in IDLE {
                if self.parts[index].report.kind == Kind::Vm && !self.has_room(wanted) {
                    let note = format!("memory: {wanted} at once do not fit into this host");
                    self.parts[index].report.notes.push(note);
                    break;
                }
                self.tell(&format!("memory: {wanted} of {name}"));
                let mut launched = Ok(());
                while launched.is_ok() && batch.instances.len() < wanted as usize {
                    launched = self.launch(index, &words, None, &mut batch);
                }
                if let Err(Stop::Failed(failure)) = launched {
                    let note = format!("memory: {failure}");
                    self.parts[index].report.notes.push(note);
                    break;
                }
                let there = |it: &Instance| it.has(Mark::Command) || it.ended();
                let settled = batch
                    .until(&self.ends, self.options.timeout, there)
                    .and_then(|()| batch.rest(&self.ends, SETTLE));
                let failed = batch.instances.iter().find(|it| it.ended());
                let failed = failed.map(|it| it.error().unwrap_or_else(|| "it ended".into()));
                match (settled, failed) {
                    (Err(BatchError::Interrupted), _) => {
                        batch.end(&self.ends);
                        return Err(Stop::Interrupted);
                    }
                    (Err(error), _) => {
                        self.parts[index]
                            .report
                            .notes
                            .push(format!("memory: {error}"));
                        break;
                    }
                    (Ok(()), Some(error)) => {
                        self.parts[index]
                            .report
                            .notes
                            .push(format!("memory: {error}"));
                        break;
                    }
                    (Ok(()), None) => {}
                }
                let Some(point) = processes::memory(wanted, &self.ends.residents) else {
                    let note = "memory: only root may read its processes' memory";
                    self.parts[index].report.notes.push(note.into());
                    break;
                };
                // One that ended meanwhile was not measured whole.
                match batch.turn(&self.ends, Duration::ZERO) {
                    Err(BatchError::Interrupted) => {
                        batch.end(&self.ends);
                        return Err(Stop::Interrupted);
                    }
                    _ if batch.instances.iter().any(Instance::ended) => {
                        let note =
                            format!("memory: one of {wanted} ended while its memory was read");
                        self.parts[index].report.notes.push(note);
                        break;
                    }
                    _ => self.parts[index].report.memory.push(point),
                }
            }
            batch.end(&self.ends);
            self.forget()?;
        }
        Ok(())
    }

    fn has_room(&self, instances: u32) -> bool {
        let wanted = u64::from(instances) * self.options.memory_mib;
        wanted + SPARE_MIB <= host::memory_available_mib()
    }
}
