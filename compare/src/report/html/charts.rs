//! Drawings. Across, they are in percent, so that they fit any width and their text keeps
//! its size; downwards in pixels.

use maud::{Markup, html};

use super::axis::{self, Axis, percent};
use crate::model::{EngineReport, Kind, Mark, Sample};
use crate::report::units::{Scale, duration, printable, times};
use crate::report::view::{Part, bar, kind, marks, ratio};

/// The height of a bar until the command is there, and from then on.
const HIGH: u32 = 24;
const LOW: u32 = 8;
/// How wide a bar is at least, on a telephone and where there is room, and a letter in it, in
/// pixels.
const NARROW_BAR: f64 = 300.0;
const WIDE_BAR: f64 = 520.0;
const LETTER: f64 = 6.6;
/// The height of a row of dots.
const STRIP: u32 = 36;
/// The least and the most that the axis of dots shows around a median, as parts of it.
const LITTLE: f64 = 0.05;
const FAR: f64 = 1.0;

/// Phases differ by more than colours.
pub fn patterns() -> Markup {
    html! {
        svg.unseen aria-hidden="true" width="0" height="0" {
            defs {
                pattern id="hatch" width="5" height="5"
                    patternUnits="userSpaceOnUse" patternTransform="rotate(45)" {
                    rect width="5" height="5" fill="var(--gone)";
                    rect width="1.6" height="5" fill="var(--paper)";
                }
            }
        }
    }
}

/// The class of what has a kind's colour.
pub fn kind_class(kind: Kind) -> &'static str {
    match kind {
        Kind::Process => "is-process",
        Kind::Container => "is-container",
        Kind::Vm => "is-vm",
        Kind::Own => "is-own",
    }
}

/// Until when a phase lasts, for those who do not know its name.
fn until(mark: Mark) -> &'static str {
    match mark {
        Mark::Launched => "until the launcher's program runs",
        Mark::Built => "until the sandbox or VM is there",
        Mark::Kernel => "until the guest's kernel is entered",
        Mark::Init => "until it has booted to its init",
        Mark::Command => "until the command's first instruction",
        Mark::Exit => "until the command's end",
        Mark::Gone => "until nothing is left",
    }
}

/// The kind of an engine, as a mark.
pub fn kind_of(engine: &EngineReport) -> Markup {
    html! { span class={ "kind " (kind_class(engine.kind)) } { (kind(engine)) } }
}

fn who(engine: &EngineReport) -> Markup {
    html! { div.who { b { (printable(&engine.name)) } " " (kind_of(engine)) } }
}

/// Each engine's phases, stacked.
pub fn bars(engines: &[&EngineReport], scale: Scale) -> Markup {
    let counted: Vec<_> = engines
        .iter()
        .filter_map(|it| Some((*it, it.start?, it.total?)))
        .collect();
    let longest = counted
        .iter()
        .map(|(_, _, total)| total.median)
        .max()
        .unwrap_or(1)
        .max(1) as f64;
    let axis = Axis::until(longest);
    let fastest = counted.first().map(|(_, start, _)| *start);
    html! {
        figure.chart aria-label="Phases of each engine" {
            ul.legend aria-label="Phases" {
                @for mark in marks(engines) {
                    li { span class={ "swatch " (mark.name()) } {} b { (mark.phase()) } " " (until(mark)) }
                }
                @if engines.iter().flat_map(|it| bar(it)).any(|it| it.together()) {
                    li { span.swatch.together {} b { "several" } " that it does not let be told apart" }
                }
            }
            @for (place, (engine, start, total)) in counted.iter().enumerate() {
                div.row {
                    (who(engine))
                    svg.bar width="100%" height=(HIGH) role="img"
                        aria-labelledby={ "bar-" (place) " bar-" (place) "-text" } {
                        title id={ "bar-" (place) } {
                            (printable(&engine.name)) ": "
                            (duration(start.median as f64)) " to the command, "
                            (duration(total.median as f64)) " to the end"
                        }
                        desc id={ "bar-" (place) "-text" } {
                            @for part in bar(engine) {
                                (part.name()) " " (duration(part.summary.median as f64)) "; "
                            }
                        }
                        (axis.grid(HIGH))
                        @for part in bar(engine) { (phase(&part, &axis)) }
                    }
                    div.number {
                        b { (scale.number(start.median as f64)) } " ± " (scale.text(start.deviation))
                        @if let Some(fastest) = &fastest { " " span.ratio { (times(ratio(start, fastest).of)) } }
                    }
                }
            }
            (axis.labels(axis::time))
        }
    }
}

/// A part of a bar.
fn phase(part: &Part, axis: &Axis) -> Markup {
    let (from, to) = (axis.place(part.from), axis.place(part.to));
    let wide = to - from;
    let started = part.mark > Mark::Command;
    let (y, height) = if started {
        ((HIGH - LOW) / 2, LOW)
    } else {
        (0, HIGH)
    };
    let class = if part.together() {
        "together"
    } else {
        part.mark.name()
    };
    let name = part.name();
    let needed = name.len() as f64 * LETTER + 12.0;
    html! {
        rect class=(class) x=(percent(from)) y=(y) width=(percent(wide)) height=(height) {
            title { (name) ": " (duration(part.summary.median as f64)) " ± " (duration(part.summary.deviation)) }
        }
        // A border to the next, where there is room for one.
        @if wide > 0.01 { rect.border x=(percent(to)) y=(y) width="1" height=(height) {} }
        @if !started && wide * WIDE_BAR > needed {
            text class={ "inside " (class) @if wide * NARROW_BAR <= needed { " wide" } }
                x=(percent(from + wide / 2.0)) y=(HIGH / 2) { (name) }
        }
    }
}

/// All samples of each engine, by how far they are from its median.
pub fn strips(engines: &[&EngineReport]) -> Markup {
    let parts = |engine: &EngineReport| {
        let median = (engine.start?.median as f64).max(1.0);
        let starts = engine.samples.iter().filter_map(Sample::start);
        let mut parts: Vec<f64> = starts.map(|it| it as f64 / median - 1.0).collect();
        parts.sort_by(f64::total_cmp);
        Some(parts).filter(|it| !it.is_empty())
    };
    let rows: Vec<_> = (engines.iter())
        .filter_map(|it| Some((*it, parts(it)?)))
        .collect();
    let all = || rows.iter().flat_map(|(_, parts)| parts.iter().copied());
    let least = all().fold(-LITTLE, f64::min);
    let most = all().fold(LITTLE, f64::max).min(FAR);
    let axis = Axis::between(least * 1.1, most * 1.05);
    html! {
        figure.chart.strips aria-label="Every run of each engine" {
            @for (place, (engine, parts)) in rows.iter().enumerate() {
                div.row {
                    (who(engine))
                    (strip(place, engine, parts, &axis))
                    div.number {
                        @if let Some(it) = &engine.start {
                            (duration(it.min as f64)) " – " (duration(it.max as f64))
                        }
                    }
                }
            }
            (axis.labels(axis::difference))
            @if all().any(|it| !axis.reaches(it)) {
                figcaption { "A ring at the edge is further away than the axis reaches." }
            }
        }
    }
}

fn strip(row: usize, engine: &EngineReport, sorted: &[f64], axis: &Axis) -> Markup {
    let quarter = |quarters: usize| {
        let rank = (sorted.len() * quarters).div_ceil(4).max(1);
        axis.place(sorted.get(rank - 1).copied().unwrap_or(0.0))
    };
    let (low, high) = (quarter(1), quarter(3));
    let median = percent(axis.place(0.0));
    // Neighbours lie in different ones of five lines.
    let line = |place: usize| u32::try_from(place % 5).unwrap_or(0);
    let y = |place: usize| 6 + line(place) * 2 % 5 * (STRIP - 12) / 4;
    html! {
        svg.strip.(kind_class(engine.kind)) width="100%" height=(STRIP) role="img"
            aria-labelledby={ "strip-" (row) " strip-" (row) "-text" } {
            title id={ "strip-" (row) } { (printable(&engine.name)) ": " (sorted.len()) " runs" }
            desc id={ "strip-" (row) "-text" } {
                @if let Some(it) = &engine.start {
                    "Median " (duration(it.median as f64)) ", least " (duration(it.min as f64)) ", greatest "
                    (duration(it.max as f64)) ", " (it.outliers) " outliers."
                }
            }
            (axis.grid(STRIP))
            rect.box x=(percent(low)) y="3" width=(percent(high - low)) height=(STRIP - 6) {}
            @for (place, &part) in sorted.iter().enumerate() {
                circle.beyond[!axis.reaches(part)] cx=(percent(axis.place(part))) cy=(y(place)) r="2.5" {}
            }
            line.median x1=(median) x2=(median) y1="1" y2=(STRIP - 1) {}
        }
    }
}
