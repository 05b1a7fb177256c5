//! A comparison's record, as people and programs read it.

mod csv;
mod error;
mod html;
mod layout;
mod prose;
mod table;
#[cfg(test)]
mod testing;
mod units;
mod view;

pub use csv::csv;
pub use error::Error;
pub use html::html;
pub use table::table;

use super::model::Report;

/// The whole record.
pub fn json(report: &Report) -> Result<String, Error> {
    Ok(serde_json::to_string_pretty(report)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;
    use crate::model::Sample;
    use proptest::prelude::*;

    /// The record that other tests use is one that could be.
    #[test]
    fn summaries_follow_from_samples() {
        let record = record();
        for engine in &record.engines {
            let mut again = engine.clone();
            again.sum_up();
            // JSON's doubles are read to the last digit but one.
            let exact = |it: &Option<crate::statistics::Summary>| {
                it.map(|it| (it.count, it.median, it.p99, it.outliers))
            };
            assert_eq!(exact(&again.start), exact(&engine.start), "{}", engine.name);
            assert_eq!(exact(&again.total), exact(&engine.total), "{}", engine.name);
            assert!(again.phases.keys().eq(engine.phases.keys()));
            for sample in engine.samples.iter().filter(|it| it.error.is_none()) {
                let sum: u64 = Sample::phases(sample).iter().map(|(_, ns)| ns).sum();
                assert_eq!(Some(sum), sample.total());
            }
        }
    }

    #[test]
    fn json_is_the_record() {
        let record = record();
        let again: Report = serde_json::from_str(&json(&record).unwrap()).unwrap();
        assert_eq!(again.order, record.order);
        assert_eq!(again.host, record.host);
        assert_eq!(again.engines[1].samples, record.engines[1].samples);
    }

    /// Tags and attributes that the page has, and no others: foreign text makes none.
    fn sound(page: &str) {
        const TAGS: &str = "html head meta title style body svg defs pattern rect header div p \
            fieldset legend input label h1 h2 h3 h4 span strong dl dt dd b nav ul li a main \
            section article figure figcaption desc line text circle g tspan table caption thead \
            tbody tr th td details summary code pre footer time script";
        const ATTRIBUTES: &str = "lang charset http-equiv content name class aria-hidden \
            aria-label aria-labelledby width height id patternUnits patternTransform fill type \
            checked for role href x y x1 x2 y1 y2 cx cy r tabindex scope datetime";
        let mut rest = page.strip_prefix("<!DOCTYPE html>").unwrap();
        while let Some((_, after)) = rest.split_once('<') {
            let end = after.find([' ', '>']).unwrap();
            let (name, mut after) = after.split_at(end);
            assert!(
                TAGS.split_whitespace()
                    .any(|it| it == name.trim_start_matches('/')),
                "<{name}"
            );
            while let Some(attribute) = after.strip_prefix(' ') {
                let end = attribute.find(['=', '>', ' ']).unwrap();
                let name = &attribute[..end];
                assert!(ATTRIBUTES.split_whitespace().any(|it| it == name), "{name}");
                after = match attribute[end..].strip_prefix("=\"") {
                    Some(value) => value.split_once('"').unwrap().1,
                    None => &attribute[end..],
                };
            }
            rest = after.strip_prefix('>').unwrap();
            // Until they end, these have no tags.
            for raw in ["style", "script"] {
                if name == raw {
                    rest = rest.split_once(&format!("</{raw}>")).unwrap().1;
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_the_record_holds_is_shown(report in any_report(), width in 0usize..150, colour: bool) {
            sound(&html(&report).unwrap());
            json(&report).unwrap();
            let lines = csv(&report).unwrap();
            let rows: usize = report.engines.iter().map(|it| it.samples.len() + it.steady.len()).sum();
            prop_assert_eq!(::csv::Reader::from_reader(lines.as_bytes()).records().count(), rows);

            let text = table(&report, width, colour);
            let foreign = |it: char| it.is_control() && it != '\n' && !(colour && it == '\x1b');
            prop_assert!(!text.contains(foreign));
            if !colour {
                for line in text.lines() {
                    prop_assert!(units::columns(line) <= width.max(20), "{}", line);
                }
            }
        }
    }
}
