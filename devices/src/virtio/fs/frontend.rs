//! What the VM's side of vhost-user says (QEMU's `docs/interop/vhost-user.rst`).
//!
//! A backend answers every message, and all of them in a time: one that is silent,
//! or says something else, is one that failed. `vhost`'s own frontend would wait.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::number;
use crate::poll::{entry, poll};
use crate::virtio::queues::Ring;
use crate::virtio::{GuestMemory, feature};

/// Messages, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    SetVringEnable = 18,
}

/// A header: request, flags, and the length of what follows, four bytes each.
pub(super) const HEADER: usize = 12;
pub(super) const VERSION: u32 = 1;
pub(super) const REPLY: u32 = 1 << 2;
pub(super) const NEED_REPLY: u32 = 1 << 3;
/// What all answers have behind their header.
const ANSWER: u32 = 8;
/// The feature bit that says that there are protocol features.
pub(super) const PROTOCOL_FEATURES: u64 = 1 << 30;
/// The protocol feature of acknowledging all messages.
pub(super) const REPLY_ACK: u64 = 1 << 3;
/// The most that a table of memory holds.
const REGIONS_MAX: usize = 8;

/// Why a backend is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// It closed its socket.
    #[error("the backend has ended")]
    Ended,
    /// The backend sent no answer in time.
    #[error("the backend does not answer")]
    Silent,
    /// Whoever waited was told to wait no longer.
    #[error("interrupted")]
    Interrupted,
    /// It says what makes no sense.
    #[error("the backend does not keep to vhost-user")]
    Nonsense,
    /// It does not do what it was told.
    #[error("the backend refused what it was told")]
    Refused,
    /// It is too old, or for something else.
    #[error("the backend lacks what is needed: virtio 1, and acknowledging messages")]
    Unfit,
    /// Nobody else can map the guest's memory.
    #[error("guest memory is not shared")]
    Private,
}

impl From<io::Error> for BackendError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => BackendError::Silent,
            _ => BackendError::Ended,
        }
    }
}

/// A backend that answered, and how to talk to it.
///
/// It is used by vCPUs' threads, too, which may make few system calls: it does not
/// block, and what it reads comes as from a file.
pub struct Frontend {
    socket: UnixStream,
    answers: File,
    features: u64,
    deadline: Instant,
    /// Waits end when this is readable.
    interrupt: Option<RawFd>,
}

impl Frontend {
    /// Greets a backend, which has `timeout` to answer all there is to ask.
    /// Should a descriptor become readable meanwhile, that is over.
    pub fn greet(
        socket: UnixStream,
        timeout: Duration,
        interrupt: Option<BorrowedFd>,
    ) -> Result<Self, BackendError> {
        socket.set_nonblocking(true)?;
        let mut frontend = Frontend {
            answers: OwnedFd::from(socket.try_clone()?).into(),
            socket,
            features: 0,
            deadline: Instant::now() + timeout,
            interrupt: interrupt.map(|fd| fd.as_raw_fd()),
        };
        let features = frontend.ask(Request::GetFeatures, &[])?;
        let needed = PROTOCOL_FEATURES | feature(VIRTIO_F_VERSION_1);
        if features & needed != needed {
            return Err(BackendError::Unfit);
        }
        frontend.features = features & !PROTOCOL_FEATURES;
        if frontend.ask(Request::GetProtocolFeatures, &[])? & REPLY_ACK == 0 {
            return Err(BackendError::Unfit);
        }
        // The one message without an answer: the next has one for both.
        let message = &REPLY_ACK.to_le_bytes();
        frontend.send(Request::SetProtocolFeatures, 0, message, &[])?;
        frontend.tell(Request::SetOwner, &[], &[])?;
        frontend.interrupt = None;
        Ok(frontend)
    }

    /// Goes on with a backend that another process greeted, which offered these features.
    pub fn resume(socket: UnixStream, features: u64) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Frontend {
            answers: OwnedFd::from(socket.try_clone()?).into(),
            socket,
            features,
            deadline: Instant::now(),
            interrupt: None,
        })
    }

    /// Gives the connection to another process, with the features that the backend offers.
    pub fn into_parts(self) -> (UnixStream, u64) {
        (self.socket, self.features)
    }

    /// The features that it offers.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Where it is seen that the backend has gone.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// From now on, all answers must come within this time.
    pub fn give_time(&mut self, timeout: Duration) {
        self.deadline = Instant::now() + timeout;
    }

    /// Tells what the driver chose, and where the guest's memory is.
    pub fn set_up(&mut self, acked: u64, memory: &GuestMemory) -> Result<(), BackendError> {
        let features = acked | PROTOCOL_FEATURES;
        self.tell(Request::SetFeatures, &features.to_le_bytes(), &[])?;
        let (mut table, mut files) = (Vec::new(), Vec::new());
        for region in memory.iter() {
            let file = region.file_offset().ok_or(BackendError::Private)?;
            for number in [
                region.start_addr().raw_value(),
                region.len(),
                region.as_ptr() as u64,
                file.start(),
            ] {
                table.extend_from_slice(&number.to_le_bytes());
            }
            files.push(file.file().as_raw_fd());
        }
        if files.len() > REGIONS_MAX {
            return Err(BackendError::Unfit);
        }
        // A number, and four bytes of nothing.
        let mut message = (files.len() as u64).to_le_bytes().to_vec();
        message.append(&mut table);
        self.tell(Request::SetMemTable, &message, &files)
    }

    /// Gives it a queue, which it runs from then on, and what it tells of used
    /// chains by.
    pub fn start(&mut self, index: u32, ring: &Ring, call: RawFd) -> Result<(), BackendError> {
        let state = |number: u32| [index.to_le_bytes(), number.to_le_bytes()].concat();
        let file = u64::from(index).to_le_bytes();
        self.tell(Request::SetVringNum, &state(ring.size.into()), &[])?;
        self.tell(Request::SetVringBase, &state(0), &[])?;
        let mut addresses = state(0);
        // The order is not the rings' own; the last is a log, which is not kept.
        for address in [ring.descriptors, ring.used, ring.available, 0] {
            addresses.extend_from_slice(&address.to_le_bytes());
        }
        self.tell(Request::SetVringAddr, &addresses, &[])?;
        self.tell(Request::SetVringCall, &file, &[call])?;
        self.tell(Request::SetVringKick, &file, &[ring.kick.as_raw_fd()])?;
        self.tell(Request::SetVringEnable, &state(1), &[])
    }

    /// Takes a queue back: when this succeeds, the backend does not touch it any
    /// more.
    pub fn stop(&mut self, index: u32) -> Result<(), BackendError> {
        let message = [index.to_le_bytes(), 0u32.to_le_bytes()].concat();
        let answer = self.ask(Request::GetVringBase, &message)?;
        // The lower half of what is an index, and a position.
        match number::halves(answer).0 == index {
            true => Ok(()),
            false => Err(BackendError::Nonsense),
        }
    }

    /// Says something that is acknowledged.
    fn tell(&mut self, what: Request, data: &[u8], fds: &[RawFd]) -> Result<(), BackendError> {
        self.send(what, NEED_REPLY, data, fds)?;
        match self.answer(what)? {
            0 => Ok(()),
            _ => Err(BackendError::Refused),
        }
    }

    fn ask(&mut self, what: Request, data: &[u8]) -> Result<u64, BackendError> {
        self.send(what, 0, data, &[])?;
        self.answer(what)
    }

    fn send(
        &mut self,
        what: Request,
        flags: u32,
        data: &[u8],
        fds: &[RawFd],
    ) -> Result<(), BackendError> {
        self.wait(libc::POLLOUT)?;
        let len = number::length(data.len());
        let mut message = Vec::with_capacity(HEADER + data.len());
        for number in [what as u32, VERSION | flags, len] {
            message.extend_from_slice(&number.to_le_bytes());
        }
        message.extend_from_slice(data);
        let sent = self.socket.send_with_fds(&[&message[..]], fds);
        match sent.map_err(io::Error::from)? {
            sent if sent == message.len() => Ok(()),
            // A backend that has left a whole buffer unread does not answer.
            _ => Err(BackendError::Silent),
        }
    }

    /// Takes an answer. Descriptors that come with it are closed by the kernel.
    fn answer(&mut self, to: Request) -> Result<u64, BackendError> {
        let mut bytes = [0; HEADER + ANSWER as usize];
        let mut len = 0;
        while let Some(rest) = bytes.get_mut(len..).filter(|rest| !rest.is_empty()) {
            self.wait(libc::POLLIN)?;
            match self.answers.read(rest) {
                Ok(0) => return Err(BackendError::Ended),
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let [a, b, c, d, e, f, g, h, i, j, k, l, answer @ ..] = bytes;
        let request = u32::from_le_bytes([a, b, c, d]);
        let flags = u32::from_le_bytes([e, f, g, h]);
        let len = u32::from_le_bytes([i, j, k, l]);
        match request == to as u32 && flags == VERSION | REPLY && len == ANSWER {
            true => Ok(u64::from_le_bytes(answer)),
            false => Err(BackendError::Nonsense),
        }
    }

    /// Waits until the socket is ready, or broken.
    fn wait(&self, events: libc::c_short) -> Result<(), BackendError> {
        loop {
            // Rounded up: it must not become nothing.
            let left = self.left()?.as_millis().saturating_add(1);
            let left = libc::c_int::try_from(left).unwrap_or(libc::c_int::MAX);
            let mut entries = [
                entry(self.socket.as_raw_fd(), events),
                entry(self.interrupt.unwrap_or(-1), libc::POLLIN),
            ];
            match poll(&mut entries, left) {
                Ok(0) => return Err(BackendError::Silent),
                Ok(_) if entries[1].revents != 0 => return Err(BackendError::Interrupted),
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The time left for an answer.
    fn left(&self) -> Result<Duration, BackendError> {
        let left = self.deadline.checked_duration_since(Instant::now());
        // None at all would be for ever.
        let left = left.filter(|left| !left.is_zero());
        left.ok_or(BackendError::Silent)
    }
}
