//! What the agent does with the connections between it and the host.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::thread;

use mayfly_protocol::agent::{Failed, Frames, GuestMessage, HostMessage, PORT, VERSION, send};

use super::reaper::Reaper;
use super::session::{AgentState, HostConnection, Session};
use super::{copies, disks, setup, snapshot, vsock};

/// The status of what mayfly's own part failed to do.
const STATUS_FAILED: u8 = 125;

/// What comes of a connection to the host.
#[derive(Debug, PartialEq, Eq)]
enum Served {
    /// All is done.
    End,
    /// The machine is to stop at the snapshot point.
    SnapshotPoint,
}

/// Serves the host until the main process has ended and the host knows. At the snapshot
/// point, `settle` is called first: all that a clone should have is there when it returns.
pub fn run(settle: impl Fn()) -> Result<(), String> {
    let mut frames = Vec::new();
    loop {
        let host =
            vsock::connect_to_host(PORT).map_err(|error| format!("reaching the host: {error}"))?;
        match serve_or_tell(&host, &frames)? {
            Served::End => return Ok(()),
            Served::SnapshotPoint => {
                vsock::end(host);
                settle();
                frames = snapshot::pause()?;
                disks::wait_for_all();
            }
        }
    }
}

/// Serves the host, whose first frames are there already, and tells it why that failed.
fn serve_or_tell(host: &File, first: &[u8]) -> Result<Served, String> {
    let mut frames = Frames::new(first.chain(host));
    serve_main(host, &mut frames).map_err(|error| {
        let reason = format!("talking to the host: {error}");
        // Where the connection still stands, the user hears it by that: who looks at a
        // console?
        let failed = Failed {
            status: STATUS_FAILED,
            reason: format!("the guest's init failed: {reason}"),
        };
        if let Ok(host) = host.try_clone() {
            let _ = HostConnection::new(host).refuse(&mut frames, failed);
        }
        reason
    })
}

fn serve_main(host: &File, frames: &mut Frames<impl Read>) -> io::Result<Served> {
    send(host, &GuestMessage::Hello { version: VERSION })?;
    let setup = match frames.message()? {
        HostMessage::Setup(setup) => setup,
        HostMessage::SnapshotPoint => return Ok(Served::SnapshotPoint),
        _ => return Err(io::Error::other("the machine's setup comes first")),
    };
    if let Err(reason) = setup::prepare(&setup) {
        let failed = Failed {
            status: STATUS_FAILED,
            reason,
        };
        HostConnection::new(host.try_clone()?).refuse(frames, failed)?;
        return Ok(Served::End);
    }
    let reaper = Reaper::start()?;
    // Before the host may connect.
    let listener = vsock::listen(PORT)?;
    send(host, &GuestMessage::Done)?;
    let state = AgentState::new(reaper, setup::Disks::of(&setup));
    let clients = state.clone();
    let accept = move || listen(&listener, &clients);
    thread::Builder::new().spawn(accept)?;
    let session = Session::new(host.try_clone()?, state);
    session.serve_main(frames)?;
    Ok(Served::End)
}

/// Serves each of the host's connections on a thread of its own.
fn listen(listener: &vsock::Listener, state: &Arc<AgentState>) {
    loop {
        let connection = match listener.accept() {
            Ok(connection) => connection,
            Err(_) => {
                thread::sleep(std::time::Duration::from_millis(100));
                continue;
            }
        };
        let Some(place) = state.enter() else {
            continue;
        };
        let state = state.clone();
        // Without a thread, the host is disconnected.
        let _ = thread::Builder::new().spawn(move || {
            let _place = place;
            let _ = serve(connection, state);
        });
    }
}

fn serve(host: File, state: Arc<AgentState>) -> io::Result<()> {
    send(&host, &GuestMessage::Hello { version: VERSION })?;
    let mut frames = Frames::new(host.try_clone()?);
    match frames.message()? {
        HostMessage::Start(process) => {
            Session::new(host, state).serve_process(&mut frames, *process, false)
        }
        HostMessage::Attach(size) => Session::new(host, state).serve_attached(&mut frames, size),
        HostMessage::Pack {
            path,
            follow,
            holes,
        } => copies::send_from(&host, &path, follow, holes),
        HostMessage::Unpack(wish) => copies::take(&host, &mut frames, wish),
        HostMessage::SignalMain(signal) => {
            state.reaper.signal_main(signal);
            send(&host, &GuestMessage::Done)
        }
        _ => Err(io::Error::other("not a request")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_host_hears_why_the_agent_failed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = thread::spawn(move || {
            let mut first = Vec::new();
            send(&mut first, &HostMessage::SignalMain(1)).unwrap();
            serve_or_tell(&OwnedFd::from(theirs).into(), &first)
        });
        send(&ours, &HostMessage::Bye).unwrap();
        let mut frames = Frames::new(&ours);
        let hello = frames.message::<GuestMessage>().unwrap();
        assert_eq!(hello, GuestMessage::Hello { version: VERSION });
        let GuestMessage::Failed(failed) = frames.message().unwrap() else {
            panic!("no word of it");
        };
        let why = "talking to the host: the machine's setup comes first";
        assert_eq!(failed.status, STATUS_FAILED);
        assert_eq!(failed.reason, format!("the guest's init failed: {why}"));
        assert_eq!(agent.join().unwrap(), Err(why.to_owned()));
    }

    #[test]
    fn the_snapshot_point_is_there_instead_of_a_setup() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&ours, &HostMessage::SnapshotPoint).unwrap();
        let served = serve_or_tell(&OwnedFd::from(theirs).into(), &[]);
        assert_eq!(served, Ok(Served::SnapshotPoint));
        let mut frames = Frames::new(&ours);
        let hello = frames.message::<GuestMessage>().unwrap();
        assert_eq!(hello, GuestMessage::Hello { version: VERSION });
        // Nothing else was said.
        assert!(frames.message::<GuestMessage>().is_err());
    }
}
