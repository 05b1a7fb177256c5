//! The agent's protocol, and programs that it could not start.

use mayfly_guest::program;
use mayfly_protocol::agent::{Frame, Frames, GuestMessage, HostMessage, Stream, send, send_data};
use mayfly_protocol::copy::wire::{Incoming, Piece};
use mayfly_protocol::copy::{Data, Kind, Source};
use std::io::Read;

use serde::{Serialize, de::DeserializeOwned};

/// Asks who executes a program. Whoever it is, the file names it.
pub fn program(head: &[u8]) {
    if let Some(interpreter) = program::interpreter(head) {
        assert!(
            head.windows(interpreter.len().max(1))
                .any(|it| it == interpreter)
                || interpreter.is_empty()
        );
    }
    program::is_foreign(head);
}

/// Takes the entries of a copy. Data and holes of a file are never more than it is long.
fn entries(wire: &[u8]) {
    let mut frames = Frames::new(wire);
    let mut source = Incoming::new(&mut frames, Stream::Out, |_| Ok(()));
    let mut buffer = [0; 512];
    while let Ok(Some(entry)) = source.next() {
        let Kind::File(size) = entry.kind else {
            continue;
        };
        let mut left = size;
        loop {
            let Ok(hole) = source.skip_hole() else { return };
            let Ok(len) = (if hole == 0 {
                source.read(&mut buffer)
            } else {
                Ok(0)
            }) else {
                return;
            };
            if hole == 0 && len == 0 {
                break;
            }
            left = left.checked_sub(hole + len as u64).unwrap();
        }
    }
}

/// Reads what may come from either side. What is understood is written and read again.
pub fn both_ways(wire: &[u8]) {
    entries(wire);
    read_all::<Piece>(wire);
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
