//! The host's side of networks.

pub mod cidr;
pub mod egress;
pub mod host;
pub mod passt;
pub mod publish;
pub mod tap;
pub mod user;
