//! Files that the host asks for, or brings.

use std::fs::File;
use std::io::{self, Read};

use mayfly_protocol::agent::{Bytes, Failed, Frames, GuestMessage, Stream, Unpack, send};
use mayfly_protocol::copy::wire::{Incoming, Outgoing, Piece};
use mayfly_protocol::copy::{Files, Keep, Place, Walk, copy};

/// Everything: the host is the machine's owner.
pub const ALL: Keep = Keep {
    owners: true,
    special: true,
};

/// Sends a file or folder, its holes as such if the host can use them.
pub fn send_from(host: &File, path: &[u8], follow: bool, holes: bool) -> io::Result<()> {
    let place = Place::of_source(&absolute(path), follow);
    let mut walk = match place.and_then(|place| Walk::new(&place)) {
        Ok(walk) => walk,
        Err(error) => return send(host, &failed(&error)),
    };
    send(host, &GuestMessage::Done)?;
    let mut out = Outgoing::new(host, Stream::Out, |_| Ok(()));
    if !holes {
        out = out.without_holes();
    }
    // If the host has gone, it does not hear why either.
    copy(&mut walk, &mut out).or_else(|error| send(host, &Piece::Failed(error.to_string())))
}

/// Takes a file or folder.
pub fn take(host: &File, frames: &mut Frames<impl Read>, wish: Unpack) -> io::Result<()> {
    let wish = Unpack {
        path: absolute(&wish.path),
        ..wish
    };
    let place = match Place::of_target(&wish) {
        Ok(place) => place,
        Err(error) => return send(host, &failed(&error)),
    };
    send(host, &GuestMessage::Done)?;
    let taken = |len: usize| {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        send(host, &GuestMessage::Taken(len))
    };
    let mut files = Files::new(place, ALL);
    let done = copy(&mut Incoming::new(frames, Stream::In, taken), &mut files);
    let answer = done.map_or_else(|error| failed(&error), |()| GuestMessage::Done);
    send(host, &answer)?;
    // It stops when it has heard it; what was on its way is not left unread.
    while frames.frame::<Piece>()?.is_some() {}
    Ok(())
}

/// As in Docker, a path is of the root.
fn absolute(path: &[u8]) -> Bytes {
    [b"/", path].concat()
}

fn failed(error: &io::Error) -> GuestMessage {
    GuestMessage::Failed(Failed {
        status: 125,
        reason: error.to_string(),
    })
}
