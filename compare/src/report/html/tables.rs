//! The page's tables.

use maud::{Markup, html};

use super::charts;
use crate::model::{EngineReport, Isolation};
use crate::report::units::{Scale, digits, duration, mib, printable, times};
use crate::report::view::{self, figure_name, further, marks, memory as points, ratio};
use crate::statistics::Summary;

const NONE: &str = "–";

/// A table whose first column names its rows. It may be wider than the page, and is then
/// moved by itself.
fn table(caption: &str, heads: &[String], rows: &[(String, Vec<Markup>)]) -> Markup {
    html! {
        div.scroll tabindex="0" role="region" aria-label=(caption) {
            table {
                caption { span { (caption) } }
                thead { tr { @for head in heads { th scope="col" { (head) } } } }
                tbody {
                    @for (name, cells) in rows {
                        tr { th scope="row" { (name) } @for cell in cells { td { (cell) } } }
                    }
                }
            }
        }
    }
}

fn heads(all: &[&str]) -> Vec<String> {
    all.iter().map(|&it| it.to_owned()).collect()
}

fn text(text: impl AsRef<str>) -> Markup {
    html! { (text.as_ref()) }
}

fn or_none(text: Option<String>) -> Markup {
    html! { @match text { Some(text) => (text), None => span.quiet { (NONE) } } }
}

/// Times until the command, and until the end.
pub fn starts(engines: &[&EngineReport], scale: Scale) -> Markup {
    let fastest = engines.iter().find_map(|it| it.start);
    let time = |it: f64| text(scale.number(it));
    let row = |engine: &&EngineReport| {
        let of = |it: &Summary| {
            vec![
                time(it.median as f64),
                time(it.mean),
                time(it.deviation),
                time(it.min as f64),
                time(it.max as f64),
                time(it.p95 as f64),
                time(it.p99 as f64),
                text(it.outliers.to_string()),
            ]
        };
        let ratio = match (&engine.start, &fastest) {
            (Some(start), Some(fastest)) if start == fastest => text("1"),
            (Some(start), Some(fastest)) => {
                let ratio = ratio(start, fastest);
                html! { (times(ratio.of)) " ± " (digits(ratio.deviation)) }
            }
            _ => text(NONE),
        };
        let count = engine.start.map_or(0, |it| it.count);
        let mut cells = vec![ratio, text(format!("{count}/{}", engine.samples.len()))];
        cells.extend(
            engine
                .start
                .as_ref()
                .map_or_else(|| vec![text(NONE); 8], of),
        );
        cells.extend([engine
            .total
            .map_or_else(|| text(NONE), |it| time(it.median as f64))]);
        (printable(&engine.name), cells)
    };
    table(
        &format!(
            "From launch to the command's first instruction, in {}",
            scale.unit
        ),
        &heads(&[
            "Engine",
            "Ratio",
            "Runs",
            "Median",
            "Mean",
            "Deviation",
            "Min",
            "Max",
            "p95",
            "p99",
            "Outliers",
            "To the end",
        ]),
        &engines.iter().map(row).collect::<Vec<_>>(),
    )
}

/// The medians of phases.
pub fn phases(engines: &[&EngineReport], scale: Scale) -> Markup {
    let marks = marks(engines);
    let row = |engine: &&EngineReport| {
        let cell = |mark| {
            or_none(
                engine
                    .phases
                    .get(mark)
                    .map(|it: &Summary| scale.number(it.median as f64)),
            )
        };
        (printable(&engine.name), marks.iter().map(cell).collect())
    };
    let mut heads = heads(&["Engine"]);
    heads.extend(marks.iter().map(|it| it.phase().to_owned()));
    table(
        &format!(
            "Medians of the phases, in {}; a dash: not seen, and part of the next",
            scale.unit
        ),
        &heads,
        &engines
            .iter()
            .filter(|it| !it.phases.is_empty())
            .map(row)
            .collect::<Vec<_>>(),
    )
}

/// Many at once.
pub fn load(engines: &[&EngineReport]) -> Markup {
    let loads = || {
        engines
            .iter()
            .filter_map(|it| Some((it, it.load.as_ref()?)))
    };
    let scale = Scale::of(loads().filter_map(|(_, it)| Some(it.start?.median)));
    let rows: Vec<_> = loads()
        .map(|(engine, load)| {
            let time = |of: fn(&Summary) -> u64| {
                or_none(load.start.as_ref().map(|it| scale.number(of(it) as f64)))
            };
            let cells = vec![
                text(load.at_once.to_string()),
                text(view::starts_per_second(load)),
                time(|it| it.median),
                time(|it| it.p95),
                time(|it| it.max),
                or_none(
                    (load.launched_within_ns > 0).then(|| duration(load.launched_within_ns as f64)),
                ),
                text(load.failed.to_string()),
            ];
            (printable(&engine.name), cells)
        })
        .collect();
    html! {
        p.about {
            "Launched one after the other, without waiting for any, so that they share the host's CPUs: "
            "what a busy host sees. Each start is counted from its own launch."
        }
        (table(
            &format!("From launch to the command's first instruction when many start at once, in {}", scale.unit),
            &heads(&["Engine", "At once", "Starts per second", "Median", "p95", "Last", "Launched within", "Failed"]),
            &rows,
        ))
    }
}

/// One instance, and more.
pub fn memory(engines: &[&EngineReport]) -> Markup {
    let with: Vec<_> = engines
        .iter()
        .map(|it| (it, points(it)))
        .filter(|(_, it)| !it.is_empty())
        .collect();
    let mut counts: Vec<u32> = with
        .iter()
        .flat_map(|(_, it)| it)
        .map(|it| it.instances)
        .collect();
    counts.sort_unstable();
    counts.dedup();
    let rows: Vec<_> = with
        .iter()
        .map(|(engine, points)| {
            let first = points.first();
            let mut cells = vec![
                or_none(first.map(|it| mib(it.private_kib as f64))),
                or_none(first.map(|it| mib(it.shared_kib as f64))),
            ];
            for count in &counts {
                let point = points.iter().find(|it| it.instances == *count);
                cells.push(or_none(point.map(|it| mib(it.pss_kib as f64))));
            }
            let further = further(points).map(mib);
            cells.push(html! { b { (or_none(further)) } });
            (printable(&engine.name), cells)
        })
        .collect();
    let mut heads = heads(&["Engine", "Private", "Shared"]);
    heads.extend(counts.iter().map(|it| format!("PSS of {it}")));
    heads.push("Each further".to_owned());
    table(
        "Memory in MiB: private and shared of the fewest instances, PSS of all",
        &heads,
        &rows,
    )
}

/// The table of the steady state.
pub fn steady(engines: &[&EngineReport]) -> Markup {
    let columns = view::steady(engines);
    let row = |engine: &&&EngineReport| {
        let cell = |column: &view::Column| {
            let Some(value) = column.value(engine) else {
                return html! { span.quiet { (column.without(engine)) } };
            };
            let value = digits(value);
            html! {
                @if column.leads(engine, engines) { b { (value) } } @else { (value) }
                @if let Some((least, most)) = column.range(engine).filter(|it| it.0 < it.1) {
                    " " span.quiet { (digits(least)) "–" (digits(most)) }
                }
            }
        };
        (printable(&engine.name), columns.iter().map(cell).collect())
    };
    let mut heads = heads(&["Engine"]);
    heads.extend(columns.iter().map(|it| {
        format!(
            "{} ({})",
            capital(&printable(&figure_name(it.name))),
            printable(it.unit)
        )
    }));
    let rows: Vec<_> = engines
        .iter()
        .filter(|it| !it.steady.is_empty())
        .map(|it| row(&it))
        .collect();
    html! {
        p.about {
            "What it costs once it runs, by the same small program in each. Of times, less is better; "
            "of throughputs (MiB/s), more is. Beside a median: the least and the greatest of its rounds. "
            "Bold: the best of a column, and what its rounds do not tell from that; nothing, where all "
            "are alike. Engine by engine, not in turn: a machine that changes meanwhile is not fair to all."
        }
        (table("Medians of the steady state", &heads, &rows))
        @if let Some(networks) = view::networks(engines) { p.about { (networks) } }
    }
}

/// With a capital letter.
pub fn capital(name: &str) -> String {
    let mut letters = name.chars();
    match letters.next() {
        Some(first) => first.to_uppercase().chain(letters).collect(),
        None => String::new(),
    }
}

/// How a fact of isolation is shown.
type Show = fn(&Isolation) -> Markup;

/// The table of isolation.
pub fn isolation(engines: &[&EngineReport]) -> Markup {
    let with: Vec<_> = engines
        .iter()
        .filter_map(|it| Some((it, it.isolation.as_ref()?)))
        .collect();
    let facts: [(&str, Show); 11] = [
        ("Kernel inside", |it| text(printable(&it.kernel))),
        ("Whose kernel", |it| match it.host_kernel {
            true => html! { span.shared { "the host's" } },
            false => html! { b { "its own" } },
        }),
        ("System calls that reach the host's kernel", |it| {
            match it.host_syscalls {
                Some(0) => html! { b { "none" } },
                some => or_none(some.map(|it| format!("{it} kinds"))),
            }
        }),
        ("System calls of its monitor", |it| {
            or_none(it.monitor_syscalls.map(|it| format!("at most {it} kinds")))
        }),
        ("Seccomp", |it| text(view::seccomp(it.seccomp))),
        ("Capabilities", |it| names(&it.capabilities, "none")),
        ("Its own user namespace", |it| {
            text(if it.own_user_namespace { "yes" } else { "no" })
        }),
        ("Namespaces shared with the host", |it| {
            plain(&it.host_namespaces)
        }),
        ("Its namespaces", |it| {
            match it
                .namespaces
                .values()
                .cloned()
                .collect::<Vec<_>>()
                .as_slice()
            {
                [] => or_none(None),
                ids => names(ids, NONE),
            }
        }),
        ("What /proc tells of the host", |it| plain(&it.sees_of_host)),
        ("Devices", |it| names(&it.devices, "none")),
    ];
    html! {
        p.about {
            "Found by probing from inside. With the host's kernel, each system call is a door to it; "
            "with a kernel of its own, the command must first break that, and then the machine around it."
        }
        div.scroll tabindex="0" role="region" aria-label="Isolation" {
            table.facts {
                caption { span { "Facts, seen from inside" } }
                thead {
                    tr {
                        th scope="col" { "Fact" }
                        @for (engine, _) in &with {
                            th scope="col" { (printable(&engine.name)) " " (charts::kind_of(engine)) }
                        }
                    }
                }
                tbody {
                    @for (fact, show) in &facts {
                        tr { th scope="row" { (fact) } @for (_, it) in &with { td { (show(it)) } } }
                    }
                }
            }
        }
    }
}

fn plain(names: &[String]) -> Markup {
    match names {
        [] => html! { b { "none" } },
        names => text(printable(&names.join(", "))),
    }
}

/// How many; which ones, to whom asks.
fn names(names: &[String], none: &str) -> Markup {
    match names {
        [] => html! { b { (none) } },
        names => html! { details { summary { (names.len()) } (printable(&names.join(", "))) } },
    }
}
