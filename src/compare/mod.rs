//! `mayfly compare`: the same image and command in VMs and containers, side by side.

pub mod model;
pub mod report;
pub mod statistics;
