//! The link between the supervisor and the VMM process.
//!
//! Each message is one of a pair of sockets: whole, or not there. The VMM process may have
//! been taken over by its guest: the supervisor takes nothing it says for more than words.

mod broker;
mod messages;
mod socket;

pub use self::broker::{Broker, BrokerReply, BrokerRequest};
pub use self::messages::{
    BlamePart, BuildRequest, DeviceBackend, Ending, FromVmm, ImageLayout, Origin, Outcome, Part,
    SnapshotUse, ToVmm, VmmFailure,
};
pub use self::socket::Link;
