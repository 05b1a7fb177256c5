//! The agent's protocol.

use mayfly_guest::protocol::{Frame, Frames, GuestMessage, HostMessage, send, send_data};
use serde::{Serialize, de::DeserializeOwned};

/// Reads what may come from either side. What is understood is written and read again.
pub fn both_ways(wire: &[u8]) {
    read_all::<HostMessage>(wire);
    read_all::<GuestMessage>(wire);
}

fn read_all<M: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(wire: &[u8]) {
    let mut frames = Frames::new(wire);
    while let Ok(Some(frame)) = frames.frame::<M>() {
        let mut again = Vec::new();
        match &frame {
            Frame::Message(message) => send(&mut again, message).unwrap(),
            Frame::Data(stream, data) => send_data(&mut again, *stream, data).unwrap(),
        }
        assert_eq!(Frames::new(&again[..]).frame().unwrap(), Some(frame));
    }
}
