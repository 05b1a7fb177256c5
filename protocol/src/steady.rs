//! The steady state of an engine, as the probe of a comparison reports it in JSON.

use serde::{Deserialize, Serialize};

use crate::peer::Way;

/// The figures of the steady state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Steady {
    /// In the order in which they were taken.
    pub figures: Vec<Figure>,
    /// How TCP came to the host, if it was tried.
    pub tcp: Option<Way>,
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The task: `cpu`, `syscall`, `fault`, `root_write`, `root_read`, `volume_write`,
    /// `volume_read`, `tcp_send`, `tcp_receive`, `tcp_round_trip`.
    pub name: String,
    /// The median of the rounds.
    pub value: f64,
    /// `ns` (less is better), or `MiB/s` (more is).
    pub unit: String,
    /// Each round's, in their order.
    #[serde(default)]
    pub rounds: Vec<f64>,
}

impl Figure {
    /// Of these rounds; nothing if there is none, or one that is no number.
    pub fn of(name: &str, unit: &str, rounds: Vec<f64>) -> Option<Figure> {
        let mut sorted = rounds.clone();
        sorted.sort_by(f64::total_cmp);
        let value = *sorted.get(sorted.len() / 2)?;
        rounds.iter().all(|it| it.is_finite()).then(|| Figure {
            name: name.to_owned(),
            value,
            unit: unit.to_owned(),
            rounds,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_the_median_of_numbers() {
        let rounds = vec![9.0, 1.0, 5.0, 4.0, 100.0];
        let figure = Figure::of("cpu", "ns", rounds.clone()).unwrap();
        assert_eq!((figure.value, figure.rounds), (5.0, rounds));
        assert_eq!(Figure::of("cpu", "ns", vec![1.0, f64::NAN, 2.0]), None);
        assert_eq!(Figure::of("cpu", "ns", Vec::new()), None);
    }
}
