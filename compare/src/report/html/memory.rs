//! How memory grows with instances, as lines.

use maud::{Markup, html};

use super::axis::{Axis, percent};
use super::charts::kind_class;
use crate::model::{EngineReport, MemoryPoint};
use crate::report::units::{mib, printable, shorten};
use crate::report::view::memory as points;

/// In pixels.
const HEIGHT: f64 = 280.0;
/// Names beside lines are that far apart.
const NAME: f64 = 16.0;
/// And that long at most.
const LETTERS: usize = 16;

/// The last point of a line, and where its name goes.
struct End<'a> {
    engine: &'a EngineReport,
    pss_kib: u64,
    from: f64,
    name: f64,
}

/// A line for each engine: the PSS of several instances together.
pub fn chart(engines: &[&EngineReport]) -> Markup {
    let lines: Vec<_> = (engines.iter())
        .map(|it| (*it, points(it)))
        .filter(|(_, it)| it.len() > 1)
        .collect();
    let all = || lines.iter().flat_map(|(_, points)| points);
    let most = all().map(|it| it.instances).max().unwrap_or(1).max(1);
    let most_kib = all().map(|it| it.pss_kib).max().unwrap_or(1).max(1);
    let mut counts: Vec<u32> = all().map(|it| it.instances).collect();
    counts.sort_unstable();
    counts.dedup();

    let axis = Axis::until(most_kib as f64 / 1024.0);
    let at = |mib: f64| HEIGHT - 4.0 - (HEIGHT - 8.0) * axis.place(mib);
    let x = |instances: u32| percent(f64::from(instances) / f64::from(most) * 0.98);
    let y = |it: &MemoryPoint| at(it.pss_kib as f64 / 1024.0);
    let ends = ends(&lines, y);
    let height = format!("{HEIGHT:.0}");
    html! {
        @if !lines.is_empty() {
            figure.lines aria-label="PSS of several instances together" {
                svg.scale width="100%" height=(height) aria-hidden="true" {
                    @for tick in axis.ticks() { text.tick.last x="100%" y=(pixels(at(tick) + 4.0)) { (round(tick)) } }
                }
                svg.plot width="100%" height=(height) role="img" aria-labelledby="lines lines-text" {
                    title id="lines" { "PSS in MiB by the number of instances" }
                    desc id="lines-text" {
                        @for it in &ends { (printable(&it.engine.name)) ": " (mib(it.pss_kib as f64)) " MiB at last; " }
                    }
                    @for y in axis.ticks().into_iter().map(|it| pixels(at(it))) {
                        line.grid x1="0" x2="100%" y1=(y) y2=(y) {}
                    }
                    @for (engine, points) in &lines {
                        g class=(kind_class(engine.kind)) {
                            @for (from, to) in points.iter().zip(points.iter().skip(1)) {
                                line.trend x1=(x(from.instances)) y1=(pixels(y(from)))
                                    x2=(x(to.instances)) y2=(pixels(y(to))) {}
                            }
                            @for it in points {
                                circle cx=(x(it.instances)) cy=(pixels(y(it))) r="3.5" {
                                    title {
                                        (printable(&engine.name)) ", " (it.instances) ": "
                                        (mib(it.pss_kib as f64)) " MiB"
                                    }
                                }
                            }
                        }
                    }
                }
                svg.names width="100%" height=(height) aria-hidden="true" {
                    @for it in &ends {
                        g class=(kind_class(it.engine.kind)) {
                            line.leader x1="0" y1=(pixels(it.from)) x2="12" y2=(pixels(it.name)) {}
                            text x="16" y=(pixels(it.name + 4.0)) {
                                (shorten(&printable(&it.engine.name), LETTERS))
                                tspan.quiet { " " (mib(it.pss_kib as f64)) }
                            }
                        }
                    }
                }
                svg.below width="100%" height="20" aria-hidden="true" {
                    @for &count in &counts { text.tick x=(x(count)) y="14" { (count) } }
                }
                figcaption { "PSS in MiB, by how many instances there are at once." }
            }
        }
    }
}

/// Without what doubles add to round numbers.
fn round(it: f64) -> f64 {
    (it * 100.0).round() / 100.0
}

fn pixels(it: f64) -> String {
    format!("{it:.1}")
}

/// The heights at which lines end, from the top.
fn ends<'a>(
    lines: &[(&'a EngineReport, Vec<MemoryPoint>)],
    y: impl Fn(&MemoryPoint) -> f64,
) -> Vec<End<'a>> {
    let end = |(engine, points): &(&'a EngineReport, Vec<MemoryPoint>)| {
        let last = points.last()?;
        Some(End {
            engine,
            pss_kib: last.pss_kib,
            from: y(last),
            name: y(last),
        })
    };
    let mut ends: Vec<End> = lines.iter().filter_map(end).collect();
    ends.sort_by(|one, other| one.from.total_cmp(&other.from));
    let wanted: Vec<f64> = ends.iter().map(|it| it.from).collect();
    for (end, place) in ends.iter_mut().zip(apart(&wanted, NAME, HEIGHT - 6.0)) {
        end.name = place;
    }
    ends
}

/// Where labels go that want to be at these places, in order, and not on each other.
fn apart(wanted: &[f64], gap: f64, bottom: f64) -> Vec<f64> {
    let mut places = wanted.to_vec();
    for it in 1..places.len() {
        places[it] = places[it].max(places[it - 1] + gap);
    }
    let mut limit = bottom;
    for place in places.iter_mut().rev() {
        *place = place.min(limit);
        limit = *place - gap;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_move_apart_and_stay_inside() {
        assert_eq!(apart(&[10.0, 50.0], 16.0, 100.0), [10.0, 50.0]);
        assert_eq!(
            apart(&[10.0, 12.0, 95.0, 99.0], 16.0, 100.0),
            [10.0, 26.0, 84.0, 100.0]
        );
        assert_eq!(apart(&[], 16.0, 100.0), [0.0; 0]);
    }
}
