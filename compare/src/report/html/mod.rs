//! The page: one file that asks for nothing else, and shows everything without a script.
//!
//! All text passes through `maud`, which escapes it. What is not text is drawn here.

mod axis;
mod charts;
mod memory;
mod method;
mod tables;

use maud::{DOCTYPE, Markup, PreEscaped, html as markup};
use mayfly_text::date::date;

use super::error::Error;
use super::prose::{headline, limits, method, more, subject, warnings};
use super::units::{Scale, duration, printable, times};
use super::view::{fastest, missing, ranked, ratio};
use crate::model::{EngineReport, Kind, Report};

const STYLE: &str = include_str!("../../../../resources/compare/page.css");
/// Nothing is fetched, and no script runs, whatever the record holds.
const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

/// The comparison as a page.
pub fn html(report: &Report) -> Result<String, Error> {
    let subject = subject(report);
    let engines = ranked(report);
    let sections = sections(report, &engines);
    let page = markup! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta name="referrer" content="no-referrer";
                meta name="generator" content={ "mayfly " (printable(&report.mayfly)) };
                title { (subject) " – mayfly compare" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                (charts::patterns())
                header {
                    div.top {
                        p.brand { "mayfly compare" }
                        (theme())
                    }
                    h1 {
                        (printable(&report.workload.image))
                        @for word in &report.workload.command { " " span { (printable(word)) } }
                    }
                    p.method { (method(report)) }
                    (notice(report))
                    (key_figures(report))
                }
                nav aria-label="Sections" {
                    ul { @for it in &sections { li { a href={ "#" (it.id) } { (it.short) } } } }
                }
                main {
                    @for it in &sections {
                        section id=(it.id) aria-labelledby={ (it.id) "-heading" } {
                            h2 id={ (it.id) "-heading" } { (it.title) }
                            (it.content)
                        }
                    }
                }
                footer {
                    p {
                        "Written by mayfly " (printable(&report.mayfly)) " on "
                        time datetime=(date(report.started_ms)) { (method::day(report)) }
                        ". The whole record, every raw sample included, is in this file as JSON: "
                        "the element " code { "#record" } "."
                    }
                }
                script type="application/json" id="record" { (PreEscaped(embedded(report)?)) }
            }
        }
    };
    Ok(page.into_string())
}

/// The record as JSON that ends no element and begins none.
fn embedded(report: &Report) -> Result<String, Error> {
    // Outside of strings, JSON has none of these.
    Ok(serde_json::to_string(report)?
        .replace('&', "\\u0026")
        .replace('<', "\\u003c")
        .replace('>', "\\u003e"))
}

/// A part of the page.
struct Section {
    id: &'static str,
    short: &'static str,
    title: &'static str,
    content: Markup,
}

/// Those of which there is data.
fn sections(report: &Report, engines: &[&EngineReport]) -> Vec<Section> {
    let any = |has: fn(&EngineReport) -> bool| engines.iter().any(|it| has(it));
    let mut sections = Vec::new();
    let mut add = |there: bool, id, short, title, content: &dyn Fn() -> Markup| {
        if there {
            let content = content();
            sections.push(Section {
                id,
                short,
                title,
                content,
            });
        }
    };
    let started = any(|it| it.start.is_some() && it.total.is_some());
    add(true, "meaning", "In words", "What it means", &|| {
        words(report)
    });
    add(started, "start", "Start", "From launch to end", &|| {
        start(engines)
    });
    add(started, "spread", "Spread", "Every run", &|| {
        spread(engines)
    });
    add(
        any(|it| it.load.is_some()),
        "load",
        "Load",
        "Many at once",
        &|| tables::load(engines),
    );
    add(
        any(|it| !it.memory.is_empty()),
        "memory",
        "Memory",
        "Memory",
        &|| memory(engines),
    );
    add(
        any(|it| !it.steady.is_empty()),
        "steady",
        "Running",
        "While it runs",
        &|| tables::steady(engines),
    );
    add(
        any(|it| it.isolation.is_some()),
        "isolation",
        "Isolation",
        "What can be seen from inside",
        &|| tables::isolation(engines),
    );
    let absent = missing(report).next().is_some();
    add(absent, "missing", "Missing", "Not compared", &|| {
        absentees(report)
    });
    add(true, "how", "Method", "How it was measured", &|| {
        method::how(report, engines)
    });
    sections
}

/// Light, dark, or what the system says. Without a script: the style asks which is checked.
fn theme() -> Markup {
    markup! {
        fieldset.theme {
            legend.unseen { "Colours" }
            @for (id, name) in [("auto", "Auto"), ("light", "Light"), ("dark", "Dark")] {
                input type="radio" name="theme" id={ "theme-" (id) } checked[id == "auto"];
                label for={ "theme-" (id) } { (name) }
            }
        }
    }
}

/// What must be known before any number is read.
fn notice(report: &Report) -> Markup {
    let warnings = warnings(report);
    markup! {
        @if report.interrupted || report.host.virtualised.is_some() || !warnings.is_empty() {
            div.notice role="note" aria-label="Warnings" {
                @if report.interrupted {
                    p {
                        strong { "Interrupted." }
                        " The comparison was ended before it was through; this is what there was by then."
                    }
                }
                @if let Some(by) = &report.host.virtualised {
                    p {
                        strong { "Measured on a virtual host (" (printable(by)) ")." }
                        " Absolute times mean little, and ratios hold only roughly."
                    }
                }
                @for warning in &warnings { p { strong { "Warning." } " " (warning) } }
            }
        }
    }
}

/// The fastest of each kind, in large type.
fn key_figures(report: &Report) -> Markup {
    let found: Vec<_> = Kind::ALL
        .into_iter()
        .filter_map(|it| fastest(report, Some(it)))
        .collect();
    let container = fastest(report, Some(Kind::Container)).map(|(_, start)| start);
    markup! {
        @if !found.is_empty() {
            dl.key {
                @for (engine, start) in &found {
                    @let (number, unit) = number_and_unit(start.median);
                    div class=(charts::kind_class(engine.kind)) {
                        dt {
                            b { (printable(&engine.name)) }
                            @match engine.kind {
                                Kind::Process => { " the floor: no isolation" }
                                Kind::Container => { " the fastest container" }
                                Kind::Vm => { " the fastest VM" }
                                Kind::Own => { " your own" }
                            }
                        }
                        dd.figure { (number) span.unit { " " (unit) } }
                        dd.beside {
                            "± " (duration(start.deviation)) " to its first instruction"
                            @if let (Kind::Vm, Some(container)) = (engine.kind, container) {
                                ", " (times(ratio(start, &container).of)) " the container"
                            }
                        }
                    }
                }
            }
        }
    }
}

fn number_and_unit(ns: u64) -> (String, String) {
    let text = duration(ns as f64);
    let (number, unit) = text.split_once(' ').unwrap_or((&text, ""));
    (number.to_owned(), unit.to_owned())
}

fn words(report: &Report) -> Markup {
    markup! {
        div.words {
            div {
                p.lede { (headline(report).join(" ")) }
                @for it in more(report) { p { (it) } }
            }
            div.limits {
                h3 { "What it does not mean" }
                ul { @for it in limits(report) { li { (it) } } }
            }
        }
    }
}

/// One scale for all times of a page's part.
fn scale(engines: &[&EngineReport]) -> Scale {
    let medians = |it: &&EngineReport| Some([it.start?.median, it.total?.median]);
    Scale::of(engines.iter().filter_map(medians).flatten())
}

fn start(engines: &[&EngineReport]) -> Markup {
    markup! {
        p.about {
            "The fastest first, by the median time to the command's first instruction: high bars are "
            "that start, low ones the command and what is left to clear away. A bar is as long as the "
            "median from launch to end, and divided as the phases' medians are."
        }
        (charts::bars(engines, scale(engines)))
        (tables::starts(engines, scale(engines)))
        (tables::phases(engines, scale(engines)))
    }
}

fn spread(engines: &[&EngineReport]) -> Markup {
    markup! {
        p.about {
            "How far each start was from its engine's median: a dot for each run that counts, a box "
            "around the middle half, a line at the median. Narrow is calm. At the right: the least and "
            "the greatest."
        }
        (charts::strips(engines))
    }
}

fn memory(engines: &[&EngineReport]) -> Markup {
    markup! {
        p.about {
            "Instances that idle, all together. The proportional set size (PSS) counts what is "
            "shared in parts, so that sums make sense; what a VM's guest and its kernel use is in it. "
            "What the host's own kernel keeps for an instance (a container's namespaces, its network, "
            "page tables, files in the page cache) is nobody's, and not in it: containers seem smaller by that."
        }
        (memory::chart(engines))
        (tables::memory(engines))
    }
}

fn absentees(report: &Report) -> Markup {
    markup! {
        dl.facts {
            @for (engine, why) in missing(report) {
                div { dt { (printable(&engine.name)) } dd { (printable(why)) } }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing::*;

    fn order(page: &str, names: &[&str]) -> bool {
        let places: Vec<_> = names.iter().map(|it| page.find(it)).collect();
        places.iter().all(Option::is_some) && places.is_sorted()
    }

    #[test]
    fn the_page_shows_what_the_record_holds() {
        let page = html(&record()).unwrap();
        for it in [
            "meaning",
            "start",
            "spread",
            "load",
            "memory",
            "steady",
            "isolation",
            "missing",
            "how",
        ] {
            assert!(page.contains(&format!("<section id=\"{it}\"")), "{it}");
        }
        let names = [
            "process",
            "container",
            "crun",
            "runc",
            "mayfly",
            "qemu",
            "podman",
        ];
        let rows = names.map(|it| format!("<th scope=\"row\">{it}</th>"));
        assert!(
            order(&page, &rows.each_ref().map(String::as_str)),
            "the fastest first"
        );
        // A dot for each run that counts, and no other.
        let runs: usize = record()
            .engines
            .iter()
            .map(|it| it.start.map_or(0, |it| it.count as usize))
            .sum();
        assert_eq!(page.matches("r=\"2.5\"").count(), runs);
        assert!(page.contains("qemu-system-x86_64 -M microvm,x-option-roms=off"));
        assert!(page.contains("cloud-hypervisor is not installed"));
    }

    #[test]
    fn what_is_not_there_has_no_section() {
        let mut report = report(vec![absent("docker", "away")]);
        let page = html(&report).unwrap();
        assert_eq!(page.matches("<section").count(), 3);
        assert!(!page.contains("<figure") && !page.contains("class=\"notice\""));
        report.interrupted = true;
        report.host.virtualised = Some("kvm".to_owned());
        let page = html(&report).unwrap();
        assert!(
            page.contains("Interrupted.") && page.contains("Measured on a virtual host (kvm).")
        );
    }

    /// One run has no spread, and none of it divides by nothing.
    #[test]
    fn a_single_run_is_shown() {
        use crate::model::Mark::{Command, Gone};
        for at in [0, 1, u64::MAX] {
            let page = html(&report(vec![engine(
                "it",
                Kind::Vm,
                &[&[(Command, at), (Gone, at)]],
            )]))
            .unwrap();
            assert!(!page.contains("NaN") && !page.contains("inf"), "{at}");
        }
    }

    #[test]
    fn the_record_is_in_the_page() {
        let mut report = record();
        report.warnings.push("</script><!-- & \u{2028}".to_owned());
        let page = html(&report).unwrap();
        let (_, rest) = page.split_once("id=\"record\">").unwrap();
        let (json, _) = rest.split_once("</script>").unwrap();
        let found: Report = serde_json::from_str(json).unwrap();
        assert_eq!(found.warnings, report.warnings);
        assert_eq!(found.engines[2].samples, report.engines[2].samples);
    }
}
