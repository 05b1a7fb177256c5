//! Prometheus' text exposition format, version 0.0.4.

use std::fmt::Write;

/// A text of metric families.
#[derive(Default)]
pub struct Exposition(String);

/// A family that samples are added to.
pub struct Family<'a> {
    text: &'a mut String,
    name: String,
}

impl Exposition {
    /// A family of numbers that only grow; its name ends with `_total`.
    pub fn counter(&mut self, name: &str, help: &str) -> Family<'_> {
        self.family(name, help, "counter")
    }

    /// A family of numbers that may shrink.
    pub fn gauge(&mut self, name: &str, help: &str) -> Family<'_> {
        self.family(name, help, "gauge")
    }

    fn family(&mut self, name: &str, help: &str, kind: &str) -> Family<'_> {
        // Writing to a String does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        Family {
            text: &mut self.0,
            name: name.to_owned(),
        }
    }

    /// The text.
    pub fn finish(self) -> String {
        self.0
    }
}

impl Family<'_> {
    /// Adds a sample.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: f64) {
        self.text.push_str(&self.name);
        for (index, (name, value)) in labels.iter().enumerate() {
            self.text.push(if index == 0 { '{' } else { ',' });
            let _ = write!(self.text, "{name}=\"{}\"", escape(value));
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }
}

fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_as_prometheus_reads_it() {
        let mut text = Exposition::default();
        let mut family = text.counter("a_total", "All of a");
        family.sample(&[], 3.0);
        family.sample(&[("b", "c\"d\\"), ("e", "f\n")], 0.5);
        text.gauge("g", "Now").sample(&[("x", "")], 0.0);
        assert_eq!(
            text.finish(),
            "# HELP a_total All of a\n# TYPE a_total counter\na_total 3\n\
             a_total{b=\"c\\\"d\\\\\",e=\"f\\n\"} 0.5\n\
             # HELP g Now\n# TYPE g gauge\ng{x=\"\"} 0\n"
        );
    }
}
