//! A pair of sockets that carry messages.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The longest message; a longer one could not be sent at once.
const MESSAGE_MAX: usize = 160 << 10;
/// The most descriptors that come with one (Linux' `SCM_MAX_FD`).
const FILES_MAX: usize = 253;

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

impl From<OwnedFd> for Link {
    fn from(socket: OwnedFd) -> Self {
        Link(socket)
    }
}

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

    /// Sends a message that brings descriptors, if that needs no waiting.
    pub fn try_send_with_files(
        &self,
        message: &impl Serialize,
        files: &[OwnedFd],
    ) -> io::Result<()> {
        let text = encode(message)?;
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut room = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(ErrorKind::InvalidInput.into());
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let text = [IoSlice::new(&text)];
        retry_on_intr(|| sendmsg(&self.0, &text, &mut control, flags))?;
        Ok(())
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::super::messages::{FromVmm, Origin, ToVmm};
    use super::*;
    use crate::control::{Command, Reply};

    #[test]
    fn messages_are_whole_and_bring_files() {
        let (one, other) = Link::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let sent = ToVmm::Ask {
            id: 7,
            command: Command::Pause {},
        };
        one.send(&sent, &[writer.into()]).unwrap();
        one.try_send(&ToVmm::End).unwrap();
        let (got, files): (ToVmm, _) = other.receive_with_files().unwrap();
        assert!(matches!(got, ToVmm::Ask { id: 7, .. }));
        let mut file = File::from(files.into_iter().next().unwrap());
        file.write_all(b"x").unwrap();
        drop(file);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        assert!(matches!(other.try_receive().unwrap(), Some(ToVmm::End)));
        assert!(other.try_receive::<ToVmm>().unwrap().is_none());
        drop(one);
        assert!(other.receive::<ToVmm>().unwrap().is_none());
        assert!(other.try_receive::<ToVmm>().is_err());
    }

    #[test]
    fn last_words_are_heard_of_one_that_did_not_listen() {
        let (one, other) = Link::pair().unwrap();
        one.try_send(&ToVmm::Resized).unwrap();
        other.send(&FromVmm::Built(Origin::Boot), &[]).unwrap();
        drop(other);
        assert!(matches!(one.receive().unwrap(), Some(FromVmm::Built(_))));
        assert!(one.receive::<FromVmm>().unwrap().is_none());
    }

    #[test]
    fn what_is_too_long_is_not_sent() {
        let (one, other) = Link::pair().unwrap();
        let reply = |len| FromVmm::Reply {
            id: 1,
            reply: Reply::Error("x".repeat(len)),
        };
        assert!(one.send(&reply(MESSAGE_MAX), &[]).is_err());
        one.send(&reply(MESSAGE_MAX - 100), &[]).unwrap();
        let got = other.receive::<FromVmm>().unwrap().unwrap();
        assert!(matches!(got, FromVmm::Reply { id: 1, .. }));
    }

    #[test]
    fn nonsense_is_an_error() {
        let (one, other) = Link::pair().unwrap();
        one.send(&"nonsense", &[]).unwrap();
        assert!(other.receive::<FromVmm>().is_err());
    }
}
