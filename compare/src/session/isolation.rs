//! What can be seen from inside.

use mayfly_protocol::facts::Facts;

use super::{Part, Session, Stop};
use crate::engines;
use crate::error::Error;
use crate::facts::isolation;
use crate::model::{EngineReport, Kind};

impl Session<'_> {
    /// Looks from inside of each.
    pub(super) fn measure_isolation(&mut self) -> Result<(), Stop> {
        let calls = self.options.mayfly.system_calls;
        let words = vec!["facts".to_owned()];
        let host = Part {
            report: EngineReport::new("process", Kind::Process),
            engine: engines::find("process", &self.place).map_err(Error::host)?,
        };
        self.parts.push(host);
        let instance = self.one(self.parts.len() - 1, &words, None);
        self.parts.pop();
        let facts = match instance {
            Ok(instance) => match (instance.error(), instance.data) {
                (None, Some(data)) => Ok(data),
                (error, _) => Err(error.unwrap_or_else(|| "nothing was said".into())),
            },
            Err(Stop::Failed(failure)) => Err(failure.text()),
            Err(stop) => return Err(stop),
        };
        match facts {
            Ok(data) => self.host = serde_json::from_str(&data).ok(),
            Err(why) => self
                .report
                .warnings
                .push(format!("isolation: the host could not be inspected: {why}")),
        }
        if let Some(host) = &self.host {
            self.report.host.namespaces = host.namespaces.iter().cloned().collect();
        }
        for index in 0..self.parts.len() {
            self.tell(&format!("isolation: {}", self.parts[index].report.name));
            let instance = self.one(index, &words, None)?;
            let facts: Option<Facts> = instance
                .data
                .as_ref()
                .and_then(|data| serde_json::from_str(data).ok());
            let part = &mut self.parts[index].report;
            match (facts, &self.host) {
                (Some(facts), Some(host)) if instance.error().is_none() => {
                    part.isolation = Some(isolation(part, &facts, host, calls))
                }
                _ => part.notes.push(match instance.error() {
                    Some(error) => format!("what it shows of the host could not be seen: {error}"),
                    None => "what it shows of the host could not be seen".into(),
                }),
            }
        }
        Ok(())
    }
}
