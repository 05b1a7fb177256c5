//! Every sample as a line, for spreadsheets and programs.

use super::error::Error;
use super::units::printable;
use crate::model::{Figure, Mark, Report, Sample};

/// A line for each sample, in the order in which they were taken; times are nanoseconds.
/// What an engine does not let be seen is empty. Then a line for each figure of the steady
/// state, of which only the engine and the last columns are filled.
pub fn csv(report: &Report) -> Result<String, Error> {
    let mut out = ::csv::WriterBuilder::new()
        .terminator(::csv::Terminator::CRLF)
        .from_writer(Vec::new());

    let fixed = ["engine", "kind", "round", "position"].map(str::to_owned);
    let marks = Mark::ALL.map(|it| format!("{}_at_ns", it.name()));
    let phases = Mark::ALL.map(|it| format!("{}_phase_ns", it.phase()));
    let last = [
        "start_ns", "total_ns", "status", "error", "figure", "value", "unit",
    ];
    let last = last.map(str::to_owned);
    let heads = fixed.iter().chain(&marks).chain(&phases).chain(&last);
    let columns = heads.clone().count();
    out.write_record(heads)?;

    let mut samples: Vec<_> = (report.engines.iter())
        .flat_map(|engine| engine.samples.iter().map(move |it| (engine, it)))
        .collect();
    samples.sort_by_key(|(_, it)| it.position);
    for (engine, sample) in samples {
        let mut line = vec![engine.name.clone(), engine.kind.name().to_owned()];
        line.extend([sample.round, sample.position].map(|it| it.to_string()));
        line.extend(Mark::ALL.map(|it| text(sample.marks_ns.get(&it).copied())));
        line.extend(Mark::ALL.map(|it| text(phase(sample, it))));
        line.extend([sample.start(), sample.total()].map(text));
        line.push(sample.status.map_or_else(String::new, |it| it.to_string()));
        // What a program complained of may command a terminal.
        line.push(sample.error.as_deref().map_or_else(String::new, printable));
        line.resize(columns, String::new());
        out.write_record(&line)?;
    }
    for engine in &report.engines {
        for figure in &engine.steady {
            let Figure {
                name, value, unit, ..
            } = figure;
            let mut line = vec![engine.name.clone(), engine.kind.name().to_owned()];
            line.resize(columns - 3, String::new());
            line.extend([printable(name), value.to_string(), printable(unit)]);
            out.write_record(&line)?;
        }
    }
    let written = out
        .into_inner()
        .map_err(|error| ::csv::Error::from(error.into_error()))?;
    // All that went in was text.
    Ok(String::from_utf8_lossy(&written).into_owned())
}

fn text(ns: Option<u64>) -> String {
    ns.map_or_else(String::new, |it| it.to_string())
}

fn phase(sample: &Sample, wanted: Mark) -> Option<u64> {
    let found = sample
        .phases()
        .into_iter()
        .find(|&(mark, _)| mark == wanted);
    found.map(|(_, ns)| ns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Kind;
    use crate::report::testing::{engine, record, report};

    fn lines(text: &str) -> Vec<::csv::StringRecord> {
        let mut reader = ::csv::Reader::from_reader(text.as_bytes());
        reader.records().collect::<Result<_, _>>().unwrap()
    }

    /// Those of samples.
    fn rows(text: &str) -> Vec<::csv::StringRecord> {
        let mut lines = lines(text);
        lines.retain(|it| it[22].is_empty());
        lines
    }

    #[test]
    fn a_line_for_each_sample_in_their_order() {
        let record = record();
        let text = csv(&record).unwrap();
        let rows = rows(&text);
        let engines: Vec<&str> = rows.iter().map(|it| &it[0]).collect();
        let order: Vec<&str> = (record.order.iter())
            .map(|&it| record.engines[it as usize].name.as_str())
            .collect();
        assert_eq!(engines, order);
        assert!(text.starts_with("engine,kind,round,position,launched_at_ns,built_at_ns,"));
    }

    #[test]
    fn phases_add_up_to_the_total_and_what_fails_has_none() {
        let number = |text: &str| text.parse::<u64>().unwrap_or(0);
        let mut failed = 0;
        for row in &rows(&csv(&record()).unwrap()) {
            let phases: u64 = (11..18).map(|it| number(&row[it])).sum();
            if row[21].is_empty() {
                assert_eq!(phases, number(&row[19]), "{row:?}");
                assert_eq!(row[8], row[18], "the start is when the command was there");
            } else {
                assert_eq!((&row[18], &row[19], &row[20]), ("", "", "1"));
                failed += 1;
            }
        }
        assert_eq!(failed, 2);
    }

    #[test]
    fn a_line_for_each_figure_behind_them() {
        let record = record();
        let all = lines(&csv(&record).unwrap());
        let samples: usize = record.engines.iter().map(|it| it.samples.len()).sum();
        let figures: usize = record.engines.iter().map(|it| it.steady.len()).sum();
        assert_eq!(all.len(), samples + figures);
        let first = &record.engines[0].steady[0];
        let line: Vec<&str> = all[samples].iter().filter(|it| !it.is_empty()).collect();
        let value = first.value.to_string();
        assert_eq!(
            line,
            ["process", "process", &first.name, &value, &first.unit]
        );
    }

    #[test]
    fn foreign_text_stays_in_its_field() {
        let mut engine = engine("a,\"b\"\r\n=c", Kind::Vm, &[&[(Mark::Gone, 5)]]);
        engine.samples[0].error = Some("no, \"never\"\x1b[2J".to_owned());
        let text = csv(&report(vec![engine])).unwrap();
        assert!(text.contains("\r\n\"a,\"\"b\"\"\r\n=c\",vm,0,0,"), "{text}");
        let rows = rows(&text);
        assert_eq!(
            (&rows[0][0], &rows[0][21]),
            ("a,\"b\"\r\n=c", "no, \"never\"\u{fffd}[2J")
        );
    }
}
