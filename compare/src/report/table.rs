//! What a person reads in a terminal.

use super::layout::{GAP, Grid, Page, Style, fitting};
use super::prose::{headline, method, subject, warnings};
use super::units::{self, Scale, columns, mib, printable, shorten};
use super::view::{self, bar, further, memory, missing, ranked, ratio};
use crate::model::{EngineReport, Isolation, Load, Mark, Report};
use crate::statistics::Summary;

/// A terminal that says it is narrower is written to as if it were not.
const NARROWEST: usize = 20;
/// Bars do not become longer, however wide a terminal is.
const WIDEST_BAR: usize = 100;
/// A note may hold all that a program complained of; the record has it whole.
const NOTE_MAX: usize = 160;

/// The comparison as text of at most `width` columns: the fastest first.
pub fn table(report: &Report, width: usize, colour: bool) -> String {
    let mut page = Page {
        text: String::new(),
        width: width.max(NARROWEST),
        style: Style(colour),
    };
    page.wrapped("", &page.style.bold(&subject(report)), &subject(report));
    page.paragraph(&method(report));
    if report.interrupted {
        page.warn("interrupted: this is what there was by then.");
    }

    let engines = ranked(report);
    if view::started(&engines) {
        page.blank();
        starts(&mut page, &engines);
    }
    for grid in [
        loads(&engines),
        memories(&engines),
        steady(&engines),
        isolation(&engines),
    ] {
        if grid.rows.is_empty() {
            continue;
        }
        page.blank();
        page.heading(grid.title);
        page.grid(&grid);
        if let Some(note) = &grid.note {
            page.dim_paragraph(note);
        }
    }

    if !engines.is_empty() {
        page.blank();
        page.heading("What was compared");
        for engine in &engines {
            page.hanging(&printable(&engine.name), &about(engine));
        }
    }
    let mut absent = missing(report).peekable();
    if absent.peek().is_some() {
        page.blank();
        page.heading("Missing");
        for (engine, why) in absent {
            page.hanging(&printable(&engine.name), &printable(why));
        }
    }
    let headline = headline(report);
    if !headline.is_empty() {
        page.blank();
        page.paragraph(&headline.join(" "));
    }
    if let Some(by) = &report.host.virtualised {
        page.warn(&format!(
            "this host is itself virtual ({}): absolute times mean little, ratios hold roughly.",
            printable(by)
        ));
    }
    for warning in warnings(report) {
        page.warn(&warning);
    }
    page.text
}

/// What one must know to read an engine's figures.
fn about(engine: &EngineReport) -> String {
    let network = Some(&engine.network).filter(|it| !it.is_empty());
    let network = network.map(|it| format!("network: {it}"));
    let notes = engine.notes.iter().cloned();
    let all = engine.version.iter().cloned().chain(network).chain(notes);
    let all: Vec<String> = all.map(|it| shorten(&printable(&it), NOTE_MAX)).collect();
    all.join("; ")
}

/// How each start went, with a bar below.
fn starts(page: &mut Page, engines: &[&EngineReport]) {
    let counted = || {
        engines
            .iter()
            .filter_map(|it| Some((it, it.start?, it.total?)))
    };
    let Some((_, fastest, _)) = counted().next() else {
        return page.paragraph("No run counts.");
    };
    let scale = Scale::of(counted().flat_map(|(_, start, total)| [start.median, total.median]));
    let deviations = counted().flat_map(|(_, start, total)| [start.deviation, total.deviation]);
    let wide = deviations
        .map(|it| scale.number(it).len())
        .max()
        .unwrap_or(0);
    let summary = |it: &Summary| {
        let deviation = scale.number(it.deviation);
        format!("{} ± {deviation:>wide$}", scale.number(it.median as f64))
    };
    let mut grid = Grid {
        title: "",
        note: None,
        heads: vec![
            "engine".to_owned(),
            format!("start ({})", scale.unit),
            "ratio".to_owned(),
            "runs".to_owned(),
            format!("to the end ({})", scale.unit),
        ],
        rows: Vec::new(),
    };
    for engine in engines {
        let ran = engine.samples.len();
        let runs = |count: u32| match count as usize == ran {
            true => ran.to_string(),
            false => format!("{count}/{ran}"),
        };
        let name = printable(&engine.name);
        grid.rows.push(match (&engine.start, &engine.total) {
            (Some(start), Some(total)) => vec![
                name,
                summary(start),
                units::times(ratio(start, &fastest).of),
                runs(start.count),
                summary(total),
            ],
            _ => vec![
                name,
                "–".to_owned(),
                "–".to_owned(),
                runs(0),
                "–".to_owned(),
            ],
        });
    }
    let widths = grid.widths(page.width);
    // The last columns go first.
    let (shown, _) = fitting(&widths, 1, page.width);
    page.heads(&grid, &widths, 1..shown);
    let longest = counted()
        .map(|(_, _, total)| total.median)
        .max()
        .unwrap_or(1);
    for (engine, row) in engines.iter().zip(&grid.rows) {
        page.row(row, &widths, 1..shown);
        let line = bar_line(engine, longest, page.width.min(WIDEST_BAR), page.style);
        if !line.is_empty() {
            page.line(&line);
        }
    }

    legend(page, engines);
    page.dim_paragraph(
        "Medians ± standard deviation. Start: from launch to the command's first instruction. \
         Low lines: what follows the start.",
    );
}

/// The legend of a bar's blocks.
fn legend(page: &mut Page, engines: &[&EngineReport]) {
    let together = engines
        .iter()
        .flat_map(|it| bar(it))
        .any(|it| it.together());
    let mut keys: Vec<(char, Option<Mark>, &str)> = (view::marks(engines).into_iter())
        .map(|it| (block(it), Some(it), it.phase()))
        .collect();
    if together {
        keys.push((TOGETHER, None, "not told apart"));
    }
    let (mut line, mut used) = (String::new(), 0);
    for (block, mark, name) in keys {
        let wide = 2 + columns(name);
        if used > 0 && used + GAP + wide > page.width {
            page.line(&line);
            (line, used) = (String::new(), 0);
        }
        let gap = if used > 0 { GAP } else { 0 };
        let block = page.style.phase(mark, &block.to_string());
        line.push_str(&format!("{}{block} {name}", " ".repeat(gap)));
        used += gap + wide;
    }
    page.line(&line);
}

/// An engine's phases, one after the other.
fn bar_line(engine: &EngineReport, longest: u64, width: usize, style: Style) -> String {
    // To the nearest.
    let cells = |ns: f64| {
        let exact = ns / longest.max(1) as f64 * width as f64;
        let full = (1..=width).take_while(|&cell| cell as f64 - 0.5 <= exact);
        full.count()
    };
    let mut line = String::new();
    for part in bar(engine) {
        let (from, to) = (cells(part.from), cells(part.to));
        let (block, mark) = match part.together() {
            true => (TOGETHER, None),
            false => (block(part.mark), Some(part.mark)),
        };
        let blocks = block.to_string().repeat(to.saturating_sub(from));
        if !blocks.is_empty() {
            line.push_str(&style.phase(mark, &blocks));
        }
    }
    // Too short to be seen is not nothing.
    if line.is_empty() && engine.total.is_some() {
        line.push('▏');
    }
    line
}

/// What several phases look like that are not told apart.
const TOGETHER: char = '▞';

/// What a phase looks like: solid until the command is there, lines from then on.
fn block(mark: Mark) -> char {
    match mark {
        Mark::Launched => '█',
        Mark::Built => '▒',
        Mark::Kernel => '▄',
        Mark::Init => '▓',
        Mark::Command => '░',
        Mark::Exit => '━',
        Mark::Gone => '╌',
    }
}

fn loads(engines: &[&EngineReport]) -> Grid {
    let loads = || {
        engines
            .iter()
            .filter_map(|it| Some((it, it.load.as_ref()?)))
    };
    let scale = Scale::of(loads().filter_map(|(_, it)| Some(it.start?.median)));
    let row = |(engine, load): (&&EngineReport, &Load)| {
        let time =
            |of: Option<u64>| of.map_or_else(|| "–".to_owned(), |it| scale.number(it as f64));
        vec![
            printable(&engine.name),
            load.at_once.to_string(),
            view::starts_per_second(load),
            time(load.start.map(|it| it.median)),
            time(load.start.map(|it| it.p95)),
            time(load.start.map(|it| it.max)),
            load.failed.to_string(),
        ]
    };
    Grid {
        title: "Many at once",
        note: None,
        heads: vec![
            "engine".to_owned(),
            "at once".to_owned(),
            "starts/s".to_owned(),
            format!("median ({})", scale.unit),
            "p95".to_owned(),
            "last".to_owned(),
            "failed".to_owned(),
        ],
        rows: loads().map(row).collect(),
    }
}

fn memories(engines: &[&EngineReport]) -> Grid {
    let row = |engine: &&EngineReport| {
        let points = memory(engine);
        let first = points.first()?;
        Some(vec![
            printable(&engine.name),
            mib(first.pss_kib as f64),
            mib(first.private_kib as f64),
            mib(first.shared_kib as f64),
            further(&points).map_or_else(|| "–".to_owned(), mib),
            points.last()?.instances.to_string(),
        ])
    };
    Grid {
        title: "Memory of an idle instance, in MiB (PSS: what is shared counts in parts)",
        note: None,
        heads: [
            "engine",
            "PSS",
            "private",
            "shared",
            "each further",
            "up to",
        ]
        .map(str::to_owned)
        .to_vec(),
        rows: engines.iter().filter_map(row).collect(),
    }
}

fn steady(engines: &[&EngineReport]) -> Grid {
    let columns = view::steady(engines);
    let head = |it: &view::Column| {
        let name = printable(&it.name.replace('_', " "));
        match it.unit {
            "MiB/s" => name,
            unit => format!("{name}, {}", printable(unit)),
        }
    };
    let row = |engine: &&&EngineReport| {
        let value = |it: &view::Column| {
            it.value(engine)
                .map_or_else(|| it.without(engine).to_owned(), units::digits)
        };
        [printable(&engine.name)]
            .into_iter()
            .chain(columns.iter().map(value))
            .collect()
    };
    Grid {
        title: "While it runs: MiB/s (more is better), or times (less is)",
        note: view::networks(engines),
        heads: ["engine".to_owned()]
            .into_iter()
            .chain(columns.iter().map(head))
            .collect(),
        rows: engines
            .iter()
            .filter(|it| !it.steady.is_empty())
            .map(|it| row(&it))
            .collect(),
    }
}

fn isolation(engines: &[&EngineReport]) -> Grid {
    let row = |engine: &&EngineReport| {
        let Isolation {
            host_kernel,
            host_syscalls,
            devices,
            capabilities,
            host_namespaces,
            sees_of_host,
            seccomp,
            ..
        } = engine.isolation.as_ref()?;
        let count = |of: &[String]| of.len().to_string();
        Some(vec![
            printable(&engine.name),
            if *host_kernel { "host's" } else { "own" }.to_owned(),
            host_syscalls.map_or_else(|| "–".to_owned(), |it| it.to_string()),
            view::seccomp(*seccomp),
            count(capabilities),
            count(devices),
            count(host_namespaces),
            count(sees_of_host),
        ])
    };
    Grid {
        title: "Isolation, seen from inside",
        note: Some(
            "¹ Kinds of system calls of the command that reach the host's kernel. ² Namespaces \
             of seven that are the host's own. ³ Facts of the host that /proc tells."
                .to_owned(),
        ),
        heads: [
            "engine",
            "kernel",
            "syscalls¹",
            "seccomp",
            "caps",
            "devices",
            "host ns²",
            "/proc³",
        ]
        .map(str::to_owned)
        .to_vec(),
        rows: engines.iter().filter_map(row).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Kind;
    use crate::report::testing::*;

    fn lines(report: &Report, width: usize) -> Vec<String> {
        table(report, width, false)
            .lines()
            .map(str::to_owned)
            .collect()
    }

    /// The names that begin a row, in their order.
    fn rows(report: &Report) -> Vec<String> {
        let names: Vec<_> = report.engines.iter().map(|it| it.name.as_str()).collect();
        (lines(report, 80).iter())
            .take_while(|it| !it.starts_with("Medians"))
            .filter_map(|it| names.iter().find(|name| it.split(' ').next() == Some(name)))
            .map(|it| (*it).to_owned())
            .collect()
    }

    fn row(report: &Report, name: &str) -> String {
        let begins = |it: &&String| it.split(' ').next() == Some(name);
        lines(report, 80)
            .iter()
            .find(begins)
            .cloned()
            .unwrap_or_default()
    }

    #[test]
    fn the_fastest_is_first_and_ratios_are_to_it() {
        let three = |name, kind, start: u64, total: u64| {
            let marks = [
                (Mark::Command, start * 1_000_000),
                (Mark::Exit, start * 1_000_000),
                (Mark::Gone, total * 1_000_000),
            ];
            engine(name, kind, &[marks.as_slice(); 3])
        };
        let report = report(vec![
            three("slow", Kind::Vm, 90, 100),
            engine("never", Kind::Vm, &[]),
            three("fast", Kind::Container, 30, 50),
            three("faster", Kind::Container, 30, 40),
            absent("docker", "it is not installed"),
        ]);
        assert_eq!(rows(&report), ["faster", "fast", "slow", "never"]);
        assert_eq!(
            row(&report, "slow").split_whitespace().collect::<Vec<_>>(),
            ["slow", "90.0", "±", "0.0", "3.0×", "3", "100.0", "±", "0.0"]
        );
        let text = table(&report, 80, false);
        assert!(text.contains("docker: it is not installed"));
        assert!(row(&report, "never").contains('–'));

        // As long as the page, and 40 and 50 parts of 100.
        let text = lines(&report, 100);
        let bars: Vec<_> = (text.iter().filter(|it| it.starts_with('▞')))
            .map(|it| (it.matches('▞').count(), it.matches('╌').count()))
            .filter(|it| it.1 > 0)
            .collect();
        assert_eq!(bars, [(30, 10), (30, 20), (90, 10)]);
    }

    #[test]
    fn what_is_not_told_apart_is_no_phase() {
        use Mark::{Command, Exit, Gone, Launched};
        let marks: &[&[_]] = &[&[(Launched, 10), (Command, 90), (Exit, 90), (Gone, 100)]];
        let only = |kind| report(vec![engine("it", kind, marks)]);
        let bar = |block: &str| format!("█████{}╌╌╌╌╌", block.repeat(40));
        assert!(lines(&only(Kind::Container), 50).contains(&bar("▞")));
        // A process has no such phases.
        assert!(lines(&only(Kind::Process), 50).contains(&bar("░")));
    }

    #[test]
    fn only_what_counts_counts() {
        let record = record();
        assert!(
            row(&record, "crun").contains("18/20"),
            "{}",
            row(&record, "crun")
        );
        let warned = lines(&record, 80)
            .iter()
            .filter(|it| it.starts_with("warning: crun: 2 of 20"))
            .count();
        assert_eq!(warned, 1);
    }

    #[test]
    fn what_an_engine_lacks_stands_below_its_figures() {
        let mut podman = engine("podman", Kind::Container, &[]);
        podman.version = Some("podman version 4.3.1".to_owned());
        podman.network = "none".to_owned();
        podman.notes = vec!["without a network".to_owned(), "x".repeat(1000)];
        let text = table(&report(vec![podman]), 80, false);
        let told = "podman: podman version 4.3.1; network: none; without a network;";
        assert!(text.contains(told), "{text}");
        assert!(text.matches('x').count() < 200 && text.contains('…'));
    }

    #[test]
    fn there_are_tables_of_what_there_is() {
        let titles = [
            "Many at once",
            "Memory of",
            "While it runs",
            "Isolation",
            "Missing",
        ];
        let text = table(&record(), 80, false);
        assert!(titles.iter().all(|it| text.contains(it)), "{text}");
        // 10 instances have 337 MiB, one has 58: 31 for each of nine.
        assert!(
            text.contains("mayfly      58.2     50.1    13.0          31."),
            "{text}"
        );

        let mut little = report(vec![engine("it", Kind::Vm, &[])]);
        little.interrupted = true;
        let text = table(&little, 80, false);
        assert!(!titles.iter().any(|it| text.contains(it)), "{text}");
        assert!(text.contains("No run counts.") && text.contains("interrupted"));
    }

    #[test]
    fn eighty_columns_suffice_and_less_does_not_break() {
        for width in [0, 20, 33, 60, 80, 200] {
            for line in lines(&record(), width) {
                assert!(columns(&line) <= width.max(NARROWEST), "{width}: {line}");
            }
        }
        let wide = lines(&record(), 80);
        assert!(
            wide.iter()
                .any(|it| it.contains("ratio") && it.contains("to the end (ms)"))
        );
    }

    #[test]
    fn colours_are_all_that_colour_adds() {
        let plain = table(&record(), 80, false);
        let coloured = table(&record(), 80, true);
        assert!(!plain.contains('\x1b') && coloured.contains("\x1b[1mmayfly\x1b[0m"));
        let mut rest = String::new();
        for (place, part) in coloured.split('\x1b').enumerate() {
            rest.push_str(if place == 0 {
                part
            } else {
                part.split_once('m').unwrap().1
            });
        }
        assert_eq!(rest, plain);
    }
}
