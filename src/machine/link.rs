//! What the keeper and the machine's process say to each other.
//!
//! Either is one message of a pair of sockets: whole, or not there. The machine's
//! process may have been taken over by its guest: the keeper takes nothing it says
//! for more than words.

use std::io::{self, ErrorKind, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags,
    SocketFlags, SocketType, recvmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::run::Ending;
use crate::console::Nature;
use crate::control::{Command, Event, Reply};
use crate::failure::{Class, Failure};
use crate::net::host::HostNetworks;
use crate::sandbox::Report;

/// The longest message; a longer one could not be sent at once.
const MESSAGE_MAX: usize = 160 << 10;
/// The most descriptors that come with one (Linux' `SCM_MAX_FD`).
const FILES_MAX: usize = 253;

/// What the keeper says.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// Let the guest run. With it come a file for the log, if there is to be one,
    /// and those of the console and the channels.
    Start {
        /// There is a file for the log.
        log: bool,
        /// The console, then the channels.
        ends: Vec<Nature>,
    },
    /// The user asks for something.
    Ask {
        /// Marks the answer.
        id: u64,
        /// What.
        command: Command,
    },
    /// A signal is to end the machine.
    Signal(i32),
    /// The host's networks are these now.
    HostNetworks {
        /// A part of them.
        part: HostNetworks,
        /// Another part follows.
        more: bool,
    },
    /// The terminal has another size.
    Resized,
    /// End it, now.
    End,
}

/// What the machine's process says.
#[derive(Debug, Serialize, Deserialize)]
pub enum Word {
    /// All is ready to start.
    Built,
    /// The sandbox is closed.
    Closed(Report),
    /// Nothing can fail any more, and the guest is about to run.
    Running,
    /// It can't be.
    Failed {
        /// Whose fault it is.
        class: Class,
        /// The reason, for the user.
        message: String,
    },
    /// An answer.
    Reply {
        /// To that question.
        id: u64,
        /// The answer.
        reply: Reply,
    },
    /// Something happened.
    Event(Event),
    /// It is over.
    Ended(Ending),
}

impl From<Failure> for Word {
    fn from(failure: Failure) -> Self {
        Word::Failed {
            class: failure.class,
            message: failure.to_string(),
        }
    }
}

/// One end of a pair of sockets that carry messages.
#[derive(Debug)]
pub struct Link(OwnedFd);

impl ScmSocket for Link {
    fn socket_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
impl From<Link> for OwnedFd {
    fn from(link: Link) -> Self {
        link.0
    }
}

impl Link {
    /// Both ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (one, other) = socketpair(AddressFamily::UNIX, kind, flags, None)?;
        Ok((Link(one), Link(other)))
    }

    /// Neither end sends or hears anything any more.
    pub fn shut_down(&self) {
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }

    /// Another descriptor of this end.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Link)
    }

    /// Sends a message; waits while the other end lags behind.
    pub fn send(&self, message: &impl Serialize, files: &[OwnedFd]) -> io::Result<()> {
        let text = encode(message)?;
        if files.is_empty() {
            return self.write(&text);
        }
        let files: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        self.send_with_fds(&[&text[..]], &files)
            .map(drop)
            .map_err(io::Error::from)
    }

    /// A thread with few system calls has this one.
    fn write(&self, text: &[u8]) -> io::Result<()> {
        retry_on_intr(|| rustix::io::write(&self.0, text))?;
        Ok(())
    }

    /// Sends a message if that needs no waiting.
    pub fn try_send(&self, message: &impl Serialize) -> io::Result<()> {
        let text = encode(message)?;
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        retry_on_intr(|| rustix::net::send(&self.0, &text, flags))?;
        Ok(())
    }

    /// Waits for a message; none if the other end is closed.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<T>> {
        let mut text = vec![0; MESSAGE_MAX];
        // Without room for descriptors, none are taken.
        let mut read = || retry_on_intr(|| rustix::io::read(&self.0, &mut text[..]));
        // Linux says first, and once, that the other end closed with something unread;
        // what that one had sent comes after.
        let len = match read() {
            Err(Errno::CONNRESET) => read(),
            len => len,
        }?;
        match text.get(..len) {
            None | Some([]) => Ok(None),
            Some(text) => Ok(Some(serde_json::from_slice(text)?)),
        }
    }

    /// A message that lies there already, if there is one. That the other end is
    /// closed is an error.
    pub fn try_receive<T: DeserializeOwned>(&self) -> io::Result<Option<T>> {
        let mut text = vec![0; MESSAGE_MAX];
        let got = retry_on_intr(|| rustix::net::recv(&self.0, &mut text[..], RecvFlags::DONTWAIT));
        match got.map(|(len, _)| text.get(..len)) {
            Ok(None | Some([])) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(Some(text)) => Ok(Some(serde_json::from_slice(text)?)),
            Err(Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for a message that brings descriptors.
    pub fn receive_with_files<T: DeserializeOwned>(&self) -> io::Result<(T, Vec<OwnedFd>)> {
        let mut text = vec![0; MESSAGE_MAX];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = retry_on_intr(|| {
            recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut text)],
                &mut control,
                flags,
            )
        })?;
        let len = received.bytes;
        if received.flags.contains(ReturnFlags::CTRUNC) {
            // This process may have no more descriptors.
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        let mut files = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(all) = message {
                files.extend(all);
            }
        }
        match text.get(..len) {
            None | Some([]) => Err(ErrorKind::UnexpectedEof.into()),
            Some(text) => Ok((serde_json::from_slice(text)?, files)),
        }
    }
}

fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let text = serde_json::to_vec(message)?;
    match text.len() {
        0..=MESSAGE_MAX => Ok(text),
        len => Err(io::Error::new(
            ErrorKind::FileTooLarge,
            format!("a message of {len} bytes is too long"),
        )),
    }
}

/// What the machine's process can have done outside: this and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Errand {
    /// Connect to the host's socket of a port of vsock.
    Connect(u32),
    /// End the helper with a number.
    EndHelper(usize),
}

/// What came of it: with [`Errand::Connect`], a descriptor comes along.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Done {
    /// It is done.
    Done,
    /// It is not, for this error of Linux.
    Failed(i32),
}

/// Has errands done, one at a time.
#[derive(Debug)]
pub struct Errands(Mutex<Link>);

impl Errands {
    /// Over a link of its own.
    pub fn new(link: Link) -> Self {
        Errands(Mutex::new(link))
    }

    fn link(&self) -> MutexGuard<'_, Link> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects the guest to a port of the host's.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let link = self.link();
        link.send(&Errand::Connect(port), &[])?;
        match link.receive_with_files()? {
            (Done::Done, files) => match files.into_iter().next() {
                Some(file) => Ok(file.into()),
                None => Err(ErrorKind::InvalidData.into()),
            },
            (Done::Failed(error), _) => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Ends a helper, and waits until it has ended.
    pub fn end_helper(&self, index: usize) {
        let link = self.link();
        if link.send(&Errand::EndHelper(index), &[]).is_ok() {
            let _ = link.receive::<Done>();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn messages_are_whole_and_bring_files() {
        let (one, other) = Link::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let sent = Order::Ask {
            id: 7,
            command: Command::Pause {},
        };
        one.send(&sent, &[writer.into()]).unwrap();
        one.try_send(&Order::End).unwrap();
        let (got, files): (Order, _) = other.receive_with_files().unwrap();
        assert!(matches!(got, Order::Ask { id: 7, .. }));
        let mut file = File::from(files.into_iter().next().unwrap());
        file.write_all(b"x").unwrap();
        drop(file);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        assert!(matches!(other.try_receive().unwrap(), Some(Order::End)));
        assert!(other.try_receive::<Order>().unwrap().is_none());
        drop(one);
        assert!(other.receive::<Order>().unwrap().is_none());
        assert!(other.try_receive::<Order>().is_err());
    }

    #[test]
    fn last_words_are_heard_of_one_that_did_not_listen() {
        let (one, other) = Link::pair().unwrap();
        one.try_send(&Order::Resized).unwrap();
        other.send(&Word::Built, &[]).unwrap();
        drop(other);
        assert!(matches!(one.receive().unwrap(), Some(Word::Built)));
        assert!(one.receive::<Word>().unwrap().is_none());
    }

    #[test]
    fn what_is_too_long_is_not_sent() {
        let (one, other) = Link::pair().unwrap();
        let reply = |len| Word::Reply {
            id: 1,
            reply: Reply::Error("x".repeat(len)),
        };
        assert!(one.send(&reply(MESSAGE_MAX), &[]).is_err());
        one.send(&reply(MESSAGE_MAX - 100), &[]).unwrap();
        let got = other.receive::<Word>().unwrap().unwrap();
        assert!(matches!(got, Word::Reply { id: 1, .. }));
    }

    #[test]
    fn nonsense_is_an_error() {
        let (one, other) = Link::pair().unwrap();
        one.send(&"nonsense", &[]).unwrap();
        assert!(other.receive::<Word>().is_err());
    }

    #[test]
    fn errands_bring_a_socket_or_an_error() {
        let (ours, theirs) = Link::pair().unwrap();
        let keeper = std::thread::spawn(move || {
            let (stream, mut far) = UnixStream::pair().unwrap();
            far.write_all(b"hello").unwrap();
            let errand = theirs.receive::<Errand>().unwrap().unwrap();
            assert_eq!(errand, Errand::Connect(80));
            theirs.send(&Done::Done, &[stream.into()]).unwrap();
            theirs.receive::<Errand>().unwrap().unwrap();
            theirs.send(&Done::Failed(libc::ECONNREFUSED), &[]).unwrap();
        });
        let errands = Errands::new(ours);
        let mut text = [0; 5];
        errands.connect(80).unwrap().read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
        let refused = errands.connect(81).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        keeper.join().unwrap();
    }
}
