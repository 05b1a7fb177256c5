//! The second wall: what a guest that took over the VMM still cannot do.
//!
//! The supervisor, which stays outside, opens what the VM needs and [`spawn`]s the VMM into
//! namespaces of its own. The VMM builds its machine, [`Inside::close`]s the sandbox, and
//! each of its threads [`Jail::confine`]s itself before the guest's first instruction.

mod cgroup;
mod close;
pub(crate) mod credentials;
mod jail;
mod layers;
pub(crate) mod seccomp;
mod spawn;
mod syscalls;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use self::cgroup::{Bounds, Cgroup, Door, GroupUsage, Share, may_divide};
pub use self::close::{Keep, Limits, descriptors};
pub use self::jail::{Gate, Jail, Pending, Role};
pub use self::layers::{Layer, Report, Status};
pub use self::seccomp::{VIOLATION, calls_max};
pub use self::spawn::{
    Child, Inside, PANIC, PreparedSandbox, Program, exit, probe, spawn, spawn_program,
};
pub(crate) use self::spawn::{divide, wait};

/// What `--sandbox` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Every layer that the host has.
    #[default]
    On,
    /// Every layer, or no VM.
    Require,
    /// None.
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

/// How a VMM is to be surrounded.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// What the user wants.
    pub mode: Mode,
    /// It needs nothing of the host's network but what the supervisor gives it.
    pub new_net: bool,
}
