//! What usual work costs: the probe of a comparison says it, as JSON.

use serde::{Deserialize, Serialize};

use crate::peer::Way;

/// What was found.
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
    /// What was done: `cpu`, `syscall`, `fault`, `root_write`, `root_read`, `volume_write`,
    /// `volume_read`, `tcp_send`, `tcp_receive`, `tcp_round_trip`.
    pub name: String,
    /// The median of the rounds.
    pub value: f64,
    /// `ns` (less is better), or `MiB/s` (more is).
    pub unit: String,
}
