//! How much of a sandbox is wanted.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The value of `--sandbox`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Every layer that the host has.
    #[default]
    On,
    /// Every layer, or no VM.
    Require,
    /// No sandbox.
    Off,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "on" => Ok(Mode::On),
            "require" => Ok(Mode::Require),
            "off" => Ok(Mode::Off),
            _ => Err("it is on, require or off".to_owned()),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::On => "on",
            Mode::Require => "require",
            Mode::Off => "off",
        })
    }
}

/// The sandbox that a VMM is to have.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// The mode that the user wants.
    pub mode: Mode,
    /// It needs nothing of the host's network but what the supervisor gives it.
    pub new_net: bool,
}
