//! Where numbers are across a drawing.

use maud::{Markup, html};

/// A line from one number to a greater one.
pub struct Axis {
    from: f64,
    to: f64,
}

impl Axis {
    /// From nothing to a little more than this.
    pub fn until(to: f64) -> Axis {
        Axis::between(0.0, to.max(1e-9) * 1.02)
    }

    /// Between these.
    pub fn between(from: f64, to: f64) -> Axis {
        Axis { from, to }
    }

    /// Where a number is, from 0 to 1; at an end, if it is beyond that.
    pub fn place(&self, at: f64) -> f64 {
        let place = (at - self.from) / (self.to - self.from);
        if place.is_finite() {
            place.clamp(0.0, 1.0)
        } else {
            0.0
        }
    }

    /// Whether a number is on it.
    pub fn reaches(&self, at: f64) -> bool {
        (self.from..=self.to).contains(&at)
    }

    /// Round numbers on it.
    pub fn ticks(&self) -> Vec<f64> {
        let step = round_step((self.to - self.from) / 5.0);
        let first = (self.from / step).ceil();
        (0..8)
            .map(|it| (first + f64::from(it)) * step)
            .filter(|&it| self.reaches(it))
            .collect()
    }

    /// Lines at them.
    pub fn grid(&self, height: u32) -> Markup {
        html! {
            @for place in self.ticks().into_iter().map(|it| percent(self.place(it))) {
                line.grid x1=(place) x2=(place) y1="0" y2=(height) {}
            }
        }
    }

    /// And what they are.
    pub fn labels(&self, text: impl Fn(f64) -> String) -> Markup {
        html! {
            div.row.axis aria-hidden="true" {
                svg width="100%" height="20" {
                    @for tick in self.ticks() {
                        @let place = self.place(tick);
                        text class={ "tick" @if place < 0.04 { " first" } @else if place > 0.94 { " last" } }
                            x=(percent(place)) y="14" { (text(tick)) }
                    }
                }
            }
        }
    }
}

/// 1, 2 or 5 times a power of ten, and not less.
pub fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.max(1e-9).log10().floor());
    let steps = [1.0, 2.0, 5.0].into_iter().map(|it| it * power);
    steps
        .into_iter()
        .find(|&it| it >= least)
        .unwrap_or(10.0 * power)
}

/// A round time.
pub fn time(ns: f64) -> String {
    let (value, unit) = match ns {
        ..1e3 => (ns, "ns"),
        1e3..1e6 => (ns / 1e3, "µs"),
        1e6..1e9 => (ns / 1e6, "ms"),
        _ => (ns / 1e9, "s"),
    };
    match ns {
        0.0 => "0".to_owned(),
        _ => format!("{} {unit}", (value * 100.0).round() / 100.0),
    }
}

/// A round difference in parts of the whole.
pub fn difference(part: f64) -> String {
    match (part * 1000.0).round() / 10.0 {
        0.0 => "median".to_owned(),
        percent if percent > 0.0 => format!("+{percent} %"),
        percent => format!("−{} %", -percent),
    }
}

/// A part of a whole, from 0 to 1, as CSS takes it.
pub fn percent(part: f64) -> String {
    format!("{:.3}%", 100.0 * part.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_has_few_round_numbers() {
        assert_eq!(Axis::until(262e6).ticks(), [0.0, 1e8, 2e8]);
        assert_eq!(
            Axis::between(-0.25, 0.7).ticks(),
            [-0.2, 0.0, 0.2, 0.4, 0.6000000000000001]
        );
        for to in [0.0, 1.0, 7.0, 1e19] {
            let ticks = Axis::until(to).ticks();
            assert!((2..=8).contains(&ticks.len()), "{to}: {ticks:?}");
        }
        assert_eq!(time(2.5e6), "2.5 ms");
        assert_eq!(
            [-0.2, 0.0, 0.6000000000000001].map(difference),
            ["−20 %", "median", "+60 %"]
        );
    }
}
