//! Conversations of a guest.

use std::net::IpAddr;

use crate::net::publish::Protocol;

/// An end of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    Guest,
    Peer,
}

/// A conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    pub begun_by: End,
    pub protocol: Protocol,
    pub guest_port: u16,
    pub peer: IpAddr,
    pub peer_port: u16,
}
