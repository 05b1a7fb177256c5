//! What all forms of a report derive from its record.

use super::units::{digits, list, printable};
use crate::model::{EngineReport, Figure, Kind, Load, Mark, MemoryPoint, Report, Way};
use crate::statistics::Summary;

/// The engines that were compared: the fastest to the command's first instruction first,
/// then the fastest to the end; last those of which no run counts.
pub fn ranked(report: &Report) -> Vec<&EngineReport> {
    let mut engines: Vec<_> = report
        .engines
        .iter()
        .filter(|it| it.missing.is_none())
        .collect();
    let median = |of: &Option<Summary>| of.map_or(u64::MAX, |it| it.median);
    engines.sort_by_key(|it| (it.start.is_none(), median(&it.start), median(&it.total)));
    engines
}

/// The first of them, if it is of this kind.
pub fn fastest(report: &Report, kind: Option<Kind>) -> Option<(&EngineReport, Summary)> {
    ranked(report)
        .into_iter()
        .filter(|it| kind.is_none_or(|kind| it.kind == kind))
        .find_map(|it| Some((it, it.start?)))
}

/// Whether starts were looked at, or it was something else alone.
pub fn started(engines: &[&EngineReport]) -> bool {
    let other = |it: &&EngineReport| {
        let looked = it.isolation.is_some() || it.load.is_some();
        looked || !it.memory.is_empty() || !it.steady.is_empty()
    };
    engines.iter().any(|it| !it.samples.is_empty()) || !engines.iter().any(other)
}

/// Those that are not there, and why.
pub fn missing(report: &Report) -> impl Iterator<Item = (&EngineReport, &str)> {
    let why = |it| {
        let it: &EngineReport = it;
        Some((it, it.missing.as_deref()?))
    };
    report.engines.iter().filter_map(why)
}

/// How many runs do not count, of how many, and what the first of those says.
pub fn failures(engine: &EngineReport) -> Option<(usize, usize, &str)> {
    let mut errors = engine.samples.iter().filter_map(|it| it.error.as_deref());
    let first = errors.next()?;
    Some((1 + errors.count(), engine.samples.len(), first))
}

/// How many of the runs that come before failed, of how many, and what the first of those says.
pub fn failed_warmups(engine: &EngineReport) -> Option<(usize, usize, &str)> {
    let mut errors = engine.warmups.iter().filter_map(|it| it.error.as_deref());
    let first = errors.next()?;
    Some((1 + errors.count(), engine.warmups.len(), first))
}

/// Starts a second of many at once: of none that started, there is no figure.
pub fn starts_per_second(load: &Load) -> String {
    match load.starts_ns.is_empty() {
        true => "–".to_owned(),
        false => digits(load.starts_per_second),
    }
}

/// How many times as long one takes as another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// Of their medians.
    pub of: f64,
    /// Its deviation, as theirs propagate.
    pub deviation: f64,
}

/// See [`Ratio`].
pub fn ratio(of: &Summary, to: &Summary) -> Ratio {
    let median = |it: &Summary| (it.median as f64).max(1.0);
    let relative = |it: &Summary| it.deviation / median(it);
    let ratio = median(of) / median(to);
    Ratio {
        of: ratio,
        deviation: ratio * relative(of).hypot(relative(to)),
    }
}

/// Whether two differ by more than chance would rarely bring about: by more than three
/// standard errors of their means' difference.
pub fn differ(one: &Summary, other: &Summary) -> bool {
    let error = |it: &Summary| it.deviation / f64::from(it.count.max(1)).sqrt();
    // Of a single run, no deviation is known.
    one.count.min(other.count) > 1
        && (one.mean - other.mean).abs() > 3.0 * error(one).hypot(error(other))
}

/// A part of an engine's bar.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    /// The phase, or the last of several that are not told apart,
    pub mark: Mark,
    /// of which this is the first.
    pub first: Mark,
    /// The summary of its durations.
    pub summary: Summary,
    /// Where it begins and ends, in nanoseconds. The whole is as long as the median from
    /// launch to end, and divided as the phases' medians are: those do not add up to it.
    pub from: f64,
    /// See `from`.
    pub to: f64,
}

impl Part {
    /// It is several phases.
    pub fn together(&self) -> bool {
        self.first != self.mark
    }

    /// The name of the phase.
    pub fn name(&self) -> String {
        match self.together() {
            true => format!("{} to {}", self.first.phase(), self.mark.phase()),
            false => self.mark.phase().to_owned(),
        }
    }
}

/// An engine's bar.
pub fn bar(engine: &EngineReport) -> Vec<Part> {
    let Some(total) = engine.total else {
        return Vec::new();
    };
    let sum: f64 = engine.phases.values().map(|it| it.median as f64).sum();
    let scale = total.median as f64 / sum.max(1.0);
    let mut at = 0.0;
    let mut seen = None;
    let part = |(&mark, &summary): (&Mark, &Summary)| {
        let from = at;
        at += summary.median as f64 * scale;
        let missed = |it: &Mark| Some(*it) > seen && *it <= mark && has(engine.kind, *it);
        let first = Mark::ALL.into_iter().find(missed).unwrap_or(mark);
        seen = Some(mark);
        Part {
            mark,
            first,
            summary,
            from,
            to: at,
        }
    };
    engine.phases.iter().map(part).collect()
}

/// Whether there is such a moment at all, seen or not.
fn has(kind: Kind, mark: Mark) -> bool {
    match kind {
        Kind::Process => mark >= Mark::Command,
        Kind::Container => !matches!(mark, Mark::Kernel | Mark::Init),
        // It may be a VM.
        Kind::Vm | Kind::Own => true,
    }
}

/// The phases that any of them lets be seen, in order.
pub fn marks(engines: &[&EngineReport]) -> Vec<Mark> {
    let seen = |mark: &Mark| engines.iter().any(|it| it.phases.contains_key(mark));
    Mark::ALL.into_iter().filter(seen).collect()
}

/// The points of an engine's memory, the fewest instances first.
pub fn memory(engine: &EngineReport) -> Vec<MemoryPoint> {
    let mut points = engine.memory.clone();
    points.sort_by_key(|it| it.instances);
    points.dedup_by_key(|it| it.instances);
    points
}

/// What each further instance costs, in KiB of PSS: from the first point to the last.
pub fn further(points: &[MemoryPoint]) -> Option<f64> {
    let (first, last) = (points.first()?, points.last()?);
    let more = last
        .instances
        .checked_sub(first.instances)
        .filter(|&it| it > 0)?;
    Some((last.pss_kib as f64 - first.pss_kib as f64) / f64::from(more))
}

/// What the names of figures begin with that need a network.
const TCP: &str = "tcp_";

/// A figure of the steady state, of all engines.
pub struct Column<'a> {
    /// As the record has it.
    pub name: &'a str,
    /// In which all of them are shown.
    pub unit: &'a str,
    recorded: &'a str,
    per_unit: f64,
}

impl Column<'_> {
    fn figure<'e>(&self, engine: &'e EngineReport) -> Option<&'e Figure> {
        let same = |it: &&Figure| it.name == self.name && it.unit == self.recorded;
        engine.steady.iter().find(same)
    }

    /// An engine's.
    pub fn value(&self, engine: &EngineReport) -> Option<f64> {
        Some(self.figure(engine)?.value / self.per_unit)
    }

    /// How far an engine's rounds are apart: the least and the greatest.
    pub fn range(&self, engine: &EngineReport) -> Option<(f64, f64)> {
        let Figure { value, rounds, .. } = self.figure(engine)?;
        let all = || rounds.iter().chain([value]).copied();
        let (least, most) = (all().fold(*value, f64::min), all().fold(*value, f64::max));
        Some((least / self.per_unit, most / self.per_unit))
    }

    /// Whether an engine is the best, or its rounds cannot be told from the best one's; and
    /// whether there is another of which they can.
    pub fn leads(&self, engine: &EngineReport, engines: &[&EngineReport]) -> bool {
        let ranges = || {
            engines
                .iter()
                .filter_map(|it| Some((self.value(it)?, self.range(it)?)))
        };
        let best = self.best(engines);
        let Some((_, best)) = ranges().find(|(value, _)| Some(*value) == best) else {
            return false;
        };
        let alike = |one: (f64, f64)| one.0 <= best.1 && best.0 <= one.1;
        self.range(engine).is_some_and(alike) && !ranges().all(|(_, it)| alike(it))
    }

    /// What is shown instead: that it has none is a fact, and not the same as unknown.
    pub fn without(&self, engine: &EngineReport) -> &'static str {
        match self.name.starts_with(TCP) && engine.tcp == Some(Way::None) {
            true => "none",
            false => "–",
        }
    }

    /// The best of these engines'.
    pub fn best(&self, engines: &[&EngineReport]) -> Option<f64> {
        let values = engines.iter().filter_map(|it| self.value(it));
        match self.recorded {
            "ns" => values.min_by(f64::total_cmp),
            _ => values.max_by(f64::total_cmp),
        }
    }
}

/// The steady state's figures, in the order of their first mention.
pub fn steady<'a>(engines: &[&'a EngineReport]) -> Vec<Column<'a>> {
    let mut columns: Vec<Column> = Vec::new();
    for Figure { name, unit, .. } in engines.iter().flat_map(|it| &it.steady) {
        if columns
            .iter()
            .any(|it| it.name == name && it.recorded == unit)
        {
            continue;
        }
        let mut column = Column {
            name,
            unit,
            recorded: unit,
            per_unit: 1.0,
        };
        if unit == "ns" {
            let least = column.best(engines).unwrap_or(0.0);
            (column.unit, column.per_unit) = match least {
                1e6.. => ("ms", 1e6),
                1e3.. => ("µs", 1e3),
                _ => ("ns", 1.0),
            };
        }
        columns.push(column);
    }
    columns
}

/// By which network each engine's TCP went, in words, if that was looked at.
pub fn networks(engines: &[&EngineReport]) -> Option<String> {
    let names = |way: Way| -> Vec<String> {
        let such = engines.iter().filter(|it| it.tcp.as_ref() == Some(&way));
        let name = |it: &&EngineReport| match way {
            Way::Network => format!("{} by {}", printable(&it.name), printable(&it.network)),
            _ => printable(&it.name),
        };
        such.map(name).collect()
    };
    let [loopback, network, none] = [Way::Loopback, Way::Network, Way::None].map(names);
    let mut ways = network;
    if !loopback.is_empty() {
        let names = list(&loopback);
        ways.insert(0, format!("{names} by the host's own loopback"));
    }
    let mut says = Vec::new();
    if !ways.is_empty() {
        says.push(format!(
            "TCP went to the host and back: {}.",
            ways.join("; ")
        ));
    }
    if !none.is_empty() {
        says.push(format!("No network by default: {}.", list(&none)));
    }
    Some(says.join(" ")).filter(|says| !says.is_empty())
}

/// What people call it, beside its name.
pub fn kind(engine: &EngineReport) -> &'static str {
    match (engine.kind, engine.name.as_str()) {
        (Kind::Process, _) => "the floor",
        (Kind::Container, "container") => "built in",
        (Kind::Container, _) => "container",
        (Kind::Vm, _) => "VM",
        (Kind::Own, _) => "your own",
    }
}

/// What a figure of the steady state is called.
pub fn figure_name(name: &str) -> String {
    match name {
        "cpu" => "CPU loop",
        "syscall" => "system call",
        "fault" => "page fault",
        "root_read" => "root read",
        "root_write" => "root write",
        "volume_read" => "volume read",
        "volume_write" => "volume write",
        "tcp_send" => "TCP to the host",
        "tcp_receive" => "TCP from the host",
        "tcp_round_trip" => "TCP there and back",
        other => other,
    }
    .to_owned()
}

/// What seccomp's modes are called.
pub fn seccomp(mode: u32) -> String {
    match mode {
        0 => "none".to_owned(),
        1 => "strict".to_owned(),
        2 => "filter".to_owned(),
        other => format!("mode {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing::engine;

    #[test]
    fn a_column_has_one_unit_and_its_best() {
        let figure = |name: &str, value, unit: &str| Figure {
            name: name.to_owned(),
            value,
            unit: unit.to_owned(),
            rounds: Vec::new(),
        };
        let [mut one, mut other] = ["one", "other"].map(|it| engine(it, Kind::Vm, &[]));
        one.steady = vec![
            figure("cpu", 311_716.0, "ns"),
            figure("root_read", 728.0, "MiB/s"),
            figure("tcp_round_trip", 61_000.0, "ns"),
        ];
        other.steady = vec![
            figure("cpu", 2e6, "ns"),
            figure("root_read", 901.0, "MiB/s"),
        ];
        let engines = [&one, &other];
        let columns = steady(&engines);
        let [cpu, read, tcp] = columns.as_slice() else {
            panic!("three figures");
        };
        assert_eq!((cpu.unit, cpu.value(&other)), ("µs", Some(2000.0)));
        assert_eq!(
            (cpu.best(&engines), read.best(&engines)),
            (Some(311.716), Some(901.0))
        );
        // What is not there is no number.
        assert_eq!((tcp.unit, tcp.value(&one)), ("µs", Some(61.0)));
        assert_eq!((tcp.value(&other), tcp.without(&other)), (None, "–"));
        let none = EngineReport {
            tcp: Some(Way::None),
            ..other.clone()
        };
        assert_eq!((tcp.without(&none), read.without(&none)), ("none", "–"));
    }

    #[test]
    fn what_rounds_do_not_tell_apart_is_not_the_best_alone() {
        let with = |value: f64, rounds: [f64; 3]| {
            let mut it = engine("it", Kind::Vm, &[]);
            it.steady = vec![Figure {
                name: "cpu".to_owned(),
                value,
                unit: "ns".to_owned(),
                rounds: rounds.to_vec(),
            }];
            it
        };
        let best = with(100.0, [100.0, 98.0, 111.0]);
        let near = with(112.0, [112.0, 110.0, 115.0]);
        let far = with(120.0, [120.0, 119.0, 121.0]);
        let engines = [&far, &best, &near];
        let columns = steady(&engines);
        let leads = |engines: &[&EngineReport]| -> Vec<bool> {
            engines
                .iter()
                .map(|it| columns[0].leads(it, engines))
                .collect()
        };
        assert_eq!(columns[0].range(&best), Some((98.0, 111.0)));
        assert_eq!(leads(&engines), [false, true, true]);
        // Of two that are alike, none is better.
        assert_eq!(leads(&[&best, &near]), [false, false]);
        assert_eq!(leads(&[&best, &far]), [true, false]);
        assert_eq!(leads(&[&best]), [false]);
    }

    #[test]
    fn which_way_tcp_went_is_said() {
        let with = |name: &str, network: &str, tcp| EngineReport {
            network: network.to_owned(),
            tcp: Some(tcp),
            ..engine(name, Kind::Vm, &[])
        };
        let process = with("process", "the host's", Way::Loopback);
        let vm = with("vm", "user network (passt)\x1b", Way::Network);
        let [one, other] = ["one", "other"].map(|it| with(it, "loopback", Way::None));
        let lost = with("lost", "its own", Way::Lost("refused".into()));
        assert_eq!(networks(&[&engine("new", Kind::Vm, &[]), &lost]), None);
        assert_eq!(
            networks(&[&process, &one, &vm, &lost, &other]).unwrap(),
            "TCP went to the host and back: process by the host's own loopback; vm by user \
             network (passt)\u{fffd}. No network by default: one and other."
        );
    }
}
