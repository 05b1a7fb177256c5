//! `mayfly compare`: the same image and command in VMs and containers, side by side.

pub mod container;
pub mod instance;
pub mod model;
pub mod processes;
pub mod report;
pub mod statistics;
pub mod undo;
