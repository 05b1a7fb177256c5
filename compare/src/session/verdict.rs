//! What of a comparison is a failure, though it came to its end.

use super::Session;
use crate::error::Error;
use crate::model::EngineReport;
use crate::options::Measure;

/// What is said of the command, wherever it failed.
const REMEDY: &str = "a command that fails is not timed; if its status is as it should be, have \
                      a shell hide it: sh -c 'COMMAND; true'";

impl Session<'_> {
    /// Why the comparison is a failure: its command failed somewhere, or nothing of what was
    /// asked for was found.
    pub(super) fn verdict(&self) -> Option<Error> {
        // An engine whose command failed when it was tried has no samples.
        let ends = |name: &str| {
            let tried = self.refused.iter().filter(|(engine, _)| engine == name);
            tried.map(|&(_, status)| status).collect::<Vec<_>>()
        };
        let engines = self.parts.iter().map(|part| &part.report);
        let mut seen = Vec::new();
        for engine in engines.chain(&self.missing) {
            let taken = engine.samples.iter().filter_map(|it| it.command_status);
            let mut statuses: Vec<i32> = taken.chain(ends(&engine.name)).collect();
            statuses.sort_unstable();
            statuses.dedup();
            if !statuses.is_empty() {
                seen.push((engine.name.as_str(), statuses));
            }
        }
        if seen
            .iter()
            .flat_map(|(_, statuses)| statuses)
            .any(|&it| it != 0)
        {
            return Some(Error::invalid(told(&seen)));
        }
        let starts = self.options.measures.contains(&Measure::Start);
        let found = self.parts.iter().any(|part| match starts {
            true => part.report.samples.iter().any(|it| it.total().is_some()),
            false => has_anything(&part.report),
        });
        let nothing = || Error::host("nothing could be compared: no run of any engine counts");
        (!found).then(nothing)
    }
}

/// Says how the command ended in each engine: the same everywhere, or not.
fn told(seen: &[(&str, Vec<i32>)]) -> String {
    let list = |statuses: &[i32]| {
        let all: Vec<_> = statuses.iter().map(i32::to_string).collect();
        all.join(" or ")
    };
    let alike = seen.windows(2).all(|pair| match pair {
        [(_, one), (_, other)] => one == other,
        _ => true,
    });
    match seen {
        [(_, statuses), ..] if alike => {
            format!("the command's exit status is {}: {REMEDY}", list(statuses))
        }
        _ => {
            let all = seen.iter();
            let all: Vec<_> = all
                .map(|(name, statuses)| format!("{} ({name})", list(statuses)))
                .collect();
            format!(
                "the command's exit status differs between runs: {}: {REMEDY}",
                all.join(", ")
            )
        }
    }
}

fn has_anything(engine: &EngineReport) -> bool {
    let started = engine
        .load
        .as_ref()
        .is_some_and(|it| !it.starts_ns.is_empty());
    started || !engine.memory.is_empty() || !engine.steady.is_empty() || engine.isolation.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_told_by_engine_only_where_they_differ() {
        let same = told(&[("process", vec![3]), ("runc", vec![3])]);
        assert!(
            same.starts_with("the command's exit status is 3: "),
            "{same}"
        );
        let other = told(&[("process", vec![0]), ("runc", vec![0, 4])]);
        assert!(
            other.contains("differs between runs: 0 (process), 0 or 4 (runc): "),
            "{other}"
        );
    }
}
