//! The second wall: what a guest that took over the VMM still cannot do.
//!
//! The supervisor, which stays outside, opens what the VM needs and [`spawn`]s the VMM into
//! namespaces of its own. The VMM builds its machine, [`SandboxSetup::close`]s the sandbox, and
//! each of its threads [`ThreadConfinement::confine`]s itself before the guest's first instruction.

#![cfg_attr(
    not(test),
    deny(
        clippy::cast_lossless,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss
    )
)]

mod cgroup;
mod close;
mod confinement;
pub mod credentials;
mod error;
mod execute;
mod landlocked;
mod layers;
mod lifeline;
mod policy;
mod role;
pub mod seccomp;
mod setup;
mod spawn;
mod status;
mod syscalls;

pub use self::cgroup::{Bounds, Cgroup, Door, GroupUsage, Share, may_divide};
pub use self::close::{Keep, Limits, descriptors, end_by_panic};
pub use self::confinement::{ConfinementBarrier, Pending, ThreadConfinement};
pub use self::error::Error;
pub use self::execute::Program;
pub use self::layers::{Layer, Report, Status};
pub use self::policy::{Mode, Policy};
pub use self::role::Role;
pub use self::seccomp::calls_max;
pub use self::setup::{PreparedSandbox, SandboxSetup};
pub use self::spawn::{Child, divide, exit, probe, spawn, spawn_program, wait};
pub use self::status::{PANIC, VIOLATION, why_not_executed};
