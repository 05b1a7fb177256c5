//! How a comparison was measured: its host, its workload, and what was launched.

use maud::{Markup, html as markup};
use mayfly_text::date::date;

use super::tables::capital;
use crate::model::{EngineReport, Host, PageCache, Report, Workload};
use crate::report::units::{digits, printable, shell};
use crate::report::view;

/// The day and time at which a comparison began.
pub fn day(report: &Report) -> String {
    let date = date(report.started_ms);
    match (date.split_once('T'), date.get(11..16)) {
        (Some((day, _)), Some(time)) => format!("{day}, {time} UTC"),
        _ => date,
    }
}

fn clock_rate(host: &Host) -> String {
    let governor = host.governor.as_deref().map_or_else(
        || "not the host's to decide".to_owned(),
        |it| format!("by the governor {}", printable(it)),
    );
    match host.turbo {
        Some(true) => format!("{governor}; turbo on"),
        Some(false) => format!("{governor}; turbo off"),
        None => governor,
    }
}

/// JSON for people, line by line.
fn pretty(value: &serde_json::Value) -> String {
    let text = format!("{value:#}");
    let lines: Vec<String> = text.lines().map(printable).collect();
    lines.join("\n")
}

/// The section about the method.
pub fn how(report: &Report, engines: &[&EngineReport]) -> Markup {
    let booted = report.workload.guest.iter();
    let booted: Vec<String> = booted
        .map(|(name, digest)| format!("{}: {}", printable(name), printable(digest)))
        .collect();
    markup! {
        dl.facts {
            @for (name, value) in facts(report) { div { dt { (name) } dd { (value) } } }
            @if !booted.is_empty() {
                div { dt { "VMs boot" } dd { @for it in &booted { (it) " " } } }
            }
        }
        h3 { "What was launched" }
        p.about { "Word by word; what stands in braces differs from run to run." }
        @for engine in engines { (launched(engine)) }
    }
}

/// The host, the workload and the runs, by name.
fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let mut facts = about_host(&report.host);
    facts.extend(about_workload(&report.workload));
    facts.extend(about_runs(report));
    facts
}

fn about_host(host: &Host) -> Vec<(&'static str, String)> {
    vec![
        (
            "Host",
            format!(
                "{}, kernel {}",
                printable(&host.system),
                printable(&host.kernel)
            ),
        ),
        (
            "CPU",
            format!("{}, {} online", printable(&host.cpu), host.cpus),
        ),
        ("Memory", format!("{} MiB", host.memory_mib)),
        (
            "Virtual",
            host.virtualised
                .as_deref()
                .map_or("no, as far as can be seen".to_owned(), printable),
        ),
        (
            "Started by",
            if host.root {
                "root"
            } else {
                "an ordinary user"
            }
            .to_owned(),
        ),
    ]
}

fn about_workload(workload: &Workload) -> [(&'static str, String); 4] {
    [
        ("Image", printable(&workload.image)),
        ("Its configuration", printable(&workload.image_id)),
        (
            "Command",
            match workload.command.as_slice() {
                [] => "none: the marker alone".to_owned(),
                words => shell(words),
            },
        ),
        (
            "Each has",
            format!("{} CPUs, {} MiB", workload.cpus, workload.memory_mib),
        ),
    ]
}

fn about_runs(report: &Report) -> [(&'static str, String); 6] {
    let host = &report.host;
    let page_cache = match report.page_cache {
        PageCache::Warm => "warm: files were in the host's memory",
        PageCache::Dropped => "dropped before each run",
    };
    [
        (
            "Runs",
            format!(
                "{} of each engine, after {} that do not count",
                report.runs, report.warmup
            ),
        ),
        (
            "Order",
            format!(
                "random, from seed {}, so that a drift hits all alike",
                report.seed
            ),
        ),
        ("Page cache", page_cache.to_owned()),
        ("Clock rate", clock_rate(host)),
        (
            "Load",
            format!(
                "{} before, {} at the end; {} % of CPU time went to other machines",
                digits(host.load_before),
                digits(host.load_after),
                digits(100.0 * host.stolen)
            ),
        ),
        ("Begun", day(report)),
    ]
}

/// An engine's command line and settings, with its notes.
fn launched(engine: &EngineReport) -> Markup {
    markup! {
        article.engine {
            h4 {
                (printable(&engine.name)) " "
                span.kind {
                    (view::kind(engine))
                    @if let Some(version) = &engine.version { " " (printable(version)) }
                }
            }
            @if !engine.command_line.is_empty() { pre tabindex="0" { code { (shell(&engine.command_line)) } } }
            @for (name, held) in &engine.settings {
                details { summary { (printable(name)) } pre tabindex="0" { code { (pretty(held)) } } }
            }
            @if !engine.network.is_empty() { p { "Network: " (printable(&engine.network)) "." } }
            @for note in &engine.notes { p { (capital(&printable(note))) } }
        }
    }
}
