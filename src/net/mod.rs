//! The host's side of networks.

pub mod tap;
