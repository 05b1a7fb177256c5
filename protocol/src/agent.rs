//! What the host and the agent in the guest say to each other over a vsock
//! stream.
//!
//! A frame is a kind (one byte), a length (four bytes, little-endian) and that
//! many bytes: a message ([`HostMessage`], [`GuestMessage`]) as postcard writes
//! it, or data of a [`Stream`], of which none is its end. A connection begins
//! with the agent's [`GuestMessage::Hello`], whoever made it. The one that the
//! agent makes at boot, to [`PORT`] of the host, has the machine's [`Setup`] and
//! its main process; those that the host makes, to [`PORT`] of the guest, have a
//! request each.
//!
//! Files are copied on connections of their own: see [`crate::copy::wire`].
//!
//! Data to the guest wait for [`GuestMessage::Taken`]: at most [`WINDOW`] bytes
//! are on their way, so that what else is said never queues behind them.

use std::io::{self, Read, Write};
use std::net::IpAddr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The protocol's version, which must be the same on both ends.
pub const VERSION: u16 = 5;
/// The vsock port, of the host and of the guest.
pub const PORT: u32 = 1024;
/// How many bytes of standard input the guest has not taken yet, at most.
pub const WINDOW: usize = 256 << 10;
/// The most data in a frame.
pub const DATA_MAX: usize = 64 << 10;
/// A message is smaller; a longer one ends the connection.
const MESSAGE_MAX: usize = 4 << 20;

/// A string of the host's or the guest's system: any bytes but NUL.
pub type Bytes = Vec<u8>;

/// A stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Standard input.
    In,
    /// Standard output; all output, where there is a terminal.
    Out,
    /// Standard error.
    Err,
}

/// A message from the host to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    /// Makes the machine what its image says.
    Setup(Box<Setup>),
    /// Starts a process on this connection.
    Start(Box<Process>),
    /// The terminal changed its size.
    Resize(Size),
    /// Follows the machine's main process on this connection, too. If it has a
    /// terminal, that gets this size.
    Attach(Option<Size>),
    /// Signals this connection's process.
    Signal(i32),
    /// Signals the machine's main process.
    SignalMain(i32),
    /// Follows this connection's process no longer: it goes on. Nothing comes behind
    /// the answer.
    Detach,
    /// Nobody reads this stream any more: writing to it is to fail.
    Closed(Stream),
    /// All was read; the machine may be turned off.
    Bye,
    /// Sends a file or folder on this connection: pieces of [`crate::copy`] follow
    /// the answer.
    Pack {
        /// The path of the file or directory.
        path: Bytes,
        /// If it is a symbolic link, what that leads to.
        follow: bool,
        /// Holes of files are sent as such; else as zeroes.
        holes: bool,
    },
    /// Takes a file or folder from this connection: its pieces follow the answer.
    Unpack(Unpack),
    /// Instead of the machine's setup: ends this connection, and stops at the snapshot
    /// point (see [`crate::mailbox`]). The agent connects again from behind it.
    SnapshotPoint,
}

/// The destination of a file or directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unpack {
    /// A folder that is there, or the path of what is to be.
    pub path: Bytes,
    /// What it is called in a folder that is there; empty for what is in it to go
    /// there itself.
    pub name: Bytes,
    /// It is a folder.
    pub folder: bool,
    /// The path must be of a folder that is there.
    pub must_exist: bool,
}

/// A message from the agent to the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestMessage {
    /// The first word.
    Hello {
        /// Its [`VERSION`].
        version: u16,
    },
    /// Done: the machine is set up, the signal is sent, the process runs, or is
    /// followed no longer.
    Done,
    /// The number of bytes of standard input, or of pieces, that were taken.
    Taken(u32),
    /// The process ended, and all of its output was sent.
    Exited(Exit),
    /// It could not be done.
    Failed(Failed),
}

/// The end of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// As a shell's: its own, or 128 and the signal's number.
    pub status: u8,
    /// It was killed, or says so of its own process, after the kernel killed some
    /// for want of memory.
    pub out_of_memory: bool,
}

/// Why something could not be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// 125, or 126 and 127 for a command as a shell's.
    pub status: u8,
    /// One line.
    pub reason: String,
}

/// A terminal's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// The number of lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// What a machine is to be before its main process starts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// The lengths of the layers, lowest first, in bytes: they follow each other
    /// on the first disk.
    pub layers: Vec<u64>,
    /// The folder of each layer that has its files; empty for the uppermost.
    pub layer_root: String,
    /// The disk that takes what is written; memory, if there is none.
    pub scratch: Option<String>,
    /// Nothing may be written.
    pub read_only: bool,
    /// The machine's name.
    pub hostname: String,
    /// Other names that it knows the addresses of.
    pub hosts: Vec<(String, IpAddr)>,
    /// Its network, if it has one.
    pub net: Option<Net>,
    /// The other mounts, in order.
    pub mounts: Vec<Mount>,
    /// The main process's folder, made if it is missing.
    pub folder: Bytes,
    /// Settings of its kernel, in order.
    pub sysctls: Vec<Sysctl>,
}

/// A setting of the guest's kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sysctl {
    /// As the user wrote it, for what is said of it.
    pub name: String,
    /// Its file below `/proc/sys`.
    pub path: String,
    /// The value to be written.
    pub value: Bytes,
}

/// A network device, and what lies behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Net {
    /// Addresses, with the lengths of their networks' prefixes.
    pub addresses: Vec<(IpAddr, u8)>,
    /// The gateways for all other addresses.
    pub gateways: Vec<IpAddr>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
    /// Domains in which names are looked up.
    pub search: Vec<String>,
    /// How they are looked up (`resolv.conf(5)`).
    pub options: Vec<String>,
}

/// Something that is mounted in the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The mount point: an absolute path.
    pub target: Bytes,
    /// The source of the mount.
    pub source: Source,
    /// Nothing may be written there.
    pub read_only: bool,
}

/// The source of a mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A tmpfs.
    Tmpfs {
        /// Such as `size=64m`.
        options: String,
        /// Nothing there may be executed.
        no_exec: bool,
    },
    /// A folder of the host, by its virtio-fs tag.
    Folder(String),
    /// A disk with an ext4 file system.
    Disk(String),
    /// The same; if it is empty, it gets what the image has there.
    Volume(String),
    /// The image's directory itself, which stays writable in a machine whose root is not.
    AnonymousVolume,
}

/// A process to start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The program and its arguments.
    pub arguments: Vec<Bytes>,
    /// All of its environment, but for `HOME`, which the user has.
    pub environment: Vec<(Bytes, Bytes)>,
    /// Its folder, which is made if it is missing.
    pub folder: Bytes,
    /// `USER[:GROUP]`, by names or numbers; root if empty.
    pub user: String,
    /// Groups that it is in beside the user's, by names or numbers.
    pub groups: Vec<String>,
    /// Its resource limits.
    pub limits: Vec<Limit>,
    /// No program that it executes gives it privileges.
    pub no_new_privileges: bool,
    /// It has a terminal of a size.
    pub terminal: Option<Size>,
    /// Its standard input comes from here.
    pub input: bool,
}

/// A limit of a process (`setrlimit(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// The resource, by Linux' number.
    pub resource: u8,
    /// The limit that holds; the largest number is no limit.
    pub soft: u64,
    /// The most that the process may set it to.
    pub hard: u64,
}

/// A frame that came over a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a, M> {
    /// A message.
    Message(M),
    /// Data of a stream, or its end.
    Data(Stream, &'a [u8]),
}

const MESSAGE: u8 = 0;
const IN: u8 = 1;
const OUT: u8 = 2;
const ERR: u8 = 3;
const HEADER: usize = 5;

fn header(kind: u8, len: usize) -> io::Result<[u8; HEADER]> {
    let len = u32::try_from(len).map_err(io::Error::other)?;
    let [a, b, c, d] = len.to_le_bytes();
    Ok([kind, a, b, c, d])
}

/// Sends a message.
pub fn send(mut to: impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut frame = vec![0; HEADER];
    frame = postcard::to_extend(message, frame).map_err(io::Error::other)?;
    let len = frame.len().saturating_sub(HEADER);
    if len > MESSAGE_MAX {
        return Err(io::Error::other("the message is too long"));
    }
    for (target, source) in frame.iter_mut().zip(header(MESSAGE, len)?) {
        *target = source;
    }
    to.write_all(&frame)
}

/// Sends data of a stream; none are its end.
pub fn send_data(mut to: impl Write, stream: Stream, data: &[u8]) -> io::Result<()> {
    let kind = match stream {
        Stream::In => IN,
        Stream::Out => OUT,
        Stream::Err => ERR,
    };
    debug_assert!(data.len() <= DATA_MAX);
    let mut frame = Vec::with_capacity(HEADER + data.len());
    frame.extend_from_slice(&header(kind, data.len())?);
    frame.extend_from_slice(data);
    to.write_all(&frame)
}

/// Takes a connection apart into frames.
pub struct Frames<R> {
    from: R,
    payload: Vec<u8>,
}

impl<R: Read> Frames<R> {
    /// The frames of a connection.
    pub fn new(from: R) -> Self {
        Frames {
            from,
            payload: Vec::new(),
        }
    }

    /// The connection that they come from.
    pub fn source(&mut self) -> &mut R {
        &mut self.from
    }

    /// The next frame; none at the end. What breaks the rules is an error.
    pub fn frame<M: DeserializeOwned>(&mut self) -> io::Result<Option<Frame<'_, M>>> {
        let mut header = [0; HEADER];
        let mut len = 0;
        while let Some(rest) = header.get_mut(len..).filter(|rest| !rest.is_empty()) {
            match self.from.read(rest) {
                Ok(0) if len == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let [kind, length @ ..] = header;
        let len = u32::from_le_bytes(length) as usize;
        let stream = match kind {
            MESSAGE => None,
            IN => Some(Stream::In),
            OUT => Some(Stream::Out),
            ERR => Some(Stream::Err),
            _ => return Err(broken("a frame of no known kind")),
        };
        if len > stream.map_or(MESSAGE_MAX, |_| DATA_MAX) {
            return Err(broken("a frame that is too long"));
        }
        self.read_payload(len)?;
        let payload = self.payload.get(..len).unwrap_or_default();
        match stream {
            Some(stream) => Ok(Some(Frame::Data(stream, payload))),
            None => {
                let message = postcard::from_bytes(payload);
                let message = message.map_err(|_| broken("a message that is none"))?;
                Ok(Some(Frame::Message(message)))
            }
        }
    }

    /// Reads a number of bytes, in pieces as large as they come. The payload keeps the size of the
    /// largest frame so far, and grows by what really comes, not by what was announced.
    fn read_payload(&mut self, len: usize) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let end = len.min(done + DATA_MAX);
            if self.payload.len() < end {
                self.payload.resize(end, 0);
            }
            let room = self.payload.get_mut(done..end).unwrap_or_default();
            match self.from.read(room) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(more) => done += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The next message, where there may be no data.
    pub fn message<M: DeserializeOwned>(&mut self) -> io::Result<M> {
        match self.frame()? {
            Some(Frame::Message(message)) => Ok(message),
            Some(Frame::Data(..)) => Err(broken("data where a message belongs")),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn setup() -> HostMessage {
        HostMessage::Setup(Box::new(Setup {
            layers: vec![4096, 1 << 40],
            hostname: "a".into(),
            net: Some(Net {
                addresses: vec![("10.0.2.15".parse().unwrap(), 24)],
                ..Net::default()
            }),
            mounts: vec![Mount {
                target: b"/\xff".to_vec(),
                source: Source::Folder("v0".into()),
                read_only: true,
            }],
            ..Setup::default()
        }))
    }

    #[test]
    fn what_is_sent_arrives() {
        let mut wire = Vec::new();
        send(&mut wire, &setup()).unwrap();
        send_data(&mut wire, Stream::In, b"abc").unwrap();
        send_data(&mut wire, Stream::Err, b"").unwrap();
        send(&mut wire, &HostMessage::Signal(15)).unwrap();
        let mut frames = Frames::new(&wire[..]);
        assert_eq!(frames.message::<HostMessage>().unwrap(), setup());
        let next = frames.frame::<HostMessage>().unwrap();
        assert_eq!(next, Some(Frame::Data(Stream::In, b"abc")));
        let next = frames.frame::<HostMessage>().unwrap();
        assert_eq!(next, Some(Frame::Data(Stream::Err, b"")));
        let next = frames.frame().unwrap();
        assert_eq!(next, Some(Frame::Message(HostMessage::Signal(15))));
        assert_eq!(frames.frame::<HostMessage>().unwrap(), None);
    }

    #[test]
    fn what_breaks_the_rules_is_refused() {
        let mut cut = Vec::new();
        send(&mut cut, &setup()).unwrap();
        for wire in [
            &[9, 0, 0, 0, 0][..],
            &[MESSAGE, 0xff, 0xff, 0xff, 0xff, 1],
            &[OUT, 1, 0, 1, 0, 1],
            &[MESSAGE, 1, 0, 0, 0, 99],
            &[MESSAGE, 0],
            &[OUT, 1, 0, 0, 0],
            &cut[..cut.len() - 1],
        ] {
            assert!(
                Frames::new(wire).frame::<HostMessage>().is_err(),
                "{wire:?}"
            );
        }
        assert!(
            Frames::new(&[OUT, 0, 0, 0, 0][..])
                .message::<HostMessage>()
                .is_err()
        );
        assert!(Frames::new(&[][..]).message::<HostMessage>().is_err());
    }

    /// Reads that yield as much as they like.
    struct Pieces<'a>(&'a [u8], std::iter::Cycle<std::slice::Iter<'a, usize>>);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let most = buffer.len().min(*self.1.next().unwrap());
            self.0.read(&mut buffer[..most])
        }
    }

    fn says() -> impl Strategy<Value = GuestMessage> {
        let failed = (any::<u8>(), ".{0,40}");
        prop_oneof![
            any::<u16>().prop_map(|version| GuestMessage::Hello { version }),
            any::<u32>().prop_map(GuestMessage::Taken),
            failed.prop_map(|(status, reason)| GuestMessage::Failed(Failed { status, reason })),
        ]
    }

    proptest! {
        #[test]
        fn what_is_said_arrives_in_any_pieces(
            said in prop::collection::vec((says(), prop::collection::vec(any::<u8>(), 0..300)), 0..8),
            pieces in prop::collection::vec(1usize..20, 1..5),
        ) {
            let mut wire = Vec::new();
            for (message, data) in &said {
                send(&mut wire, message).unwrap();
                send_data(&mut wire, Stream::Out, data).unwrap();
            }
            let mut frames = Frames::new(Pieces(&wire, pieces.iter().cycle()));
            for (message, data) in said {
                prop_assert_eq!(frames.message::<GuestMessage>().unwrap(), message);
                let frame = frames.frame::<GuestMessage>().unwrap();
                prop_assert_eq!(frame, Some(Frame::Data(Stream::Out, &data)));
            }
            prop_assert_eq!(frames.frame::<GuestMessage>().unwrap(), None);
        }

        #[test]
        fn garbage_ends(wire in prop::collection::vec(any::<u8>(), 0..512)) {
            let mut frames = Frames::new(&wire[..]);
            while let Ok(Some(_)) = frames.frame::<HostMessage>() {}
            let mut frames = Frames::new(&wire[..]);
            while let Ok(Some(_)) = frames.frame::<GuestMessage>() {}
        }

        #[test]
        fn garbled_messages_end(at in 0usize..80, bit in 0u8..8) {
            let mut wire = Vec::new();
            send(&mut wire, &setup()).unwrap();
            let at = at % wire.len();
            wire[at] ^= 1 << bit;
            let mut frames = Frames::new(&wire[..]);
            while let Ok(Some(_)) = frames.frame::<HostMessage>() {}
        }
    }
}
