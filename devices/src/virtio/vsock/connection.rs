//! One connection: a stream of the host on one side, credit and packets of the
//! guest on the other (virtio 1.2, 5.10.6.3 and following).

use std::io::{self, Write};
use std::net;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bitflags::bitflags;
use rustix::io::retry_on_intr;
use rustix::net::SendFlags;
use vmm_sys_util::epoll::EventSet;

use super::backlog::Backlog;
use super::limits::PACKET_MAX;
use super::packet::{HEADER, Header, Op, Shutdown};
use crate::number;
use crate::virtio::chain::Buffer;
use crate::virtio::transfer;

/// A credit update is sent once the guest is behind by this fraction of its credit.
const CREDIT_STEP: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The host asked the guest, which did not answer yet.
    Requested,
    /// Bytes may flow.
    Open,
    /// The guest has gone, having sent all it wanted: that is still delivered.
    Orphan,
}

/// Whether the guest is notified of a connection's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest gets a reset.
    Reset,
    /// The guest knows, or never heard of it.
    Silent,
}

bitflags! {
    /// Packets that are to be sent to the guest.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Pending: u8 {
        const REQUEST = 1;
        const RESPONSE = 2;
        const CREDIT_UPDATE = 4;
    }
}

/// A packet for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The operation.
    pub op: Op,
    /// With [`Op::Shutdown`].
    pub flags: Shutdown,
    /// With [`Op::Data`], how much was written behind the header.
    pub len: u32,
}

impl From<Op> for Packet {
    fn from(op: Op) -> Self {
        Packet {
            op,
            flags: Shutdown::empty(),
            len: 0,
        }
    }
}

/// A connection.
pub struct Connection {
    stream: UnixStream,
    state: State,
    pending: Pending,
    over: Option<End>,
    /// When the connection is ended, if nothing happens before.
    deadline: Option<Instant>,

    /// What the guest can hold, and says to have passed on, of what it was sent.
    guest_buffer: u32,
    guest_forwarded: u32,
    sent: u32,
    /// Its credit is used up, and it was asked for more.
    asked: bool,

    /// What the stream took, and what the guest knows of that.
    forwarded: u32,
    told: u32,
    backlog: Backlog,

    /// What either side will not do any more, and what the guest knows of the
    /// host's side.
    guest_shut: Shutdown,
    host_shut: Shutdown,
    told_shut: Shutdown,

    /// The stream may have bytes, an end or an error.
    readable: bool,
    /// Its peer has gone …
    hung_up: bool,
    /// … without having read all.
    broken: bool,

    /// It is in the list of those that have packets for the guest.
    pub scheduled: bool,
    /// Its stream is watched for output.
    pub watched: bool,
}

impl Connection {
    fn new(stream: UnixStream, credit: usize, state: State, pending: Pending) -> Self {
        Connection {
            stream,
            state,
            pending,
            over: None,
            deadline: None,
            guest_buffer: 0,
            guest_forwarded: 0,
            sent: 0,
            asked: false,
            forwarded: 0,
            told: 0,
            backlog: Backlog::new(credit),
            guest_shut: Shutdown::empty(),
            host_shut: Shutdown::empty(),
            told_shut: Shutdown::empty(),
            readable: false,
            hung_up: false,
            broken: false,
            scheduled: false,
            watched: false,
        }
    }

    /// One that the guest is to be asked for, until a deadline. The guest may have so
    /// many bytes under way to its peer.
    pub fn requested(stream: UnixStream, credit: usize, deadline: Instant) -> Self {
        Connection {
            deadline: Some(deadline),
            ..Connection::new(stream, credit, State::Requested, Pending::REQUEST)
        }
    }

    /// One that the guest asked for, and the host accepted.
    pub fn accepted(stream: UnixStream, credit: usize) -> Self {
        Connection::new(stream, credit, State::Open, Pending::RESPONSE)
    }

    /// How many bytes of the guest's it may come to hold.
    pub fn guest_credit(&self) -> usize {
        self.backlog.capacity()
    }

    /// The stream's descriptor.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// It is over.
    pub fn over(&self) -> Option<End> {
        self.over
    }

    /// The guest has gone.
    pub fn is_orphan(&self) -> bool {
        self.state == State::Orphan
    }

    /// Its stream must be watched for output.
    pub fn wants_output(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// When the connection is ended: one that only waits for the other side has `linger`.
    pub fn deadline(&mut self, linger: Duration) -> Option<Instant> {
        let lingers = self.is_orphan() || self.guest_shut.is_all() || self.told_shut.is_all();
        if lingers && self.deadline.is_none() {
            self.deadline = Some(Instant::now() + linger);
        }
        self.deadline
    }

    /// Ends it if its deadline has passed.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.abort();
        }
    }

    /// Ends it, and notifies the guest if that knows of it.
    pub fn abort(&mut self) {
        let unknown = self.is_orphan() || self.pending.contains(Pending::REQUEST);
        self.over = Some(if unknown { End::Silent } else { End::Reset });
    }

    // What the guest sends.

    /// The credit that comes with every packet. A guest that tells more than it
    /// was sent has a negative credit, which is none.
    pub fn credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.guest_room() > 0 {
            self.asked = false;
        }
    }

    /// How many bytes the guest can hold. The counters wrap around.
    fn guest_room(&self) -> u32 {
        let held = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(held)
    }

    /// The guest accepts: the client gets the host's port.
    pub fn response(&mut self, port: u32) {
        if self.state != State::Requested || self.pending.contains(Pending::REQUEST) {
            return self.abort();
        }
        self.state = State::Open;
        self.deadline = None;
        self.readable = true;
        // Nothing was written to the stream yet: a line has room.
        let mut line = [0; 32];
        let mut rest = line.as_mut_slice();
        let written = writeln!(rest, "OK {port}");
        let left = rest.len();
        let said = line.get(..line.len() - left).unwrap_or_default();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = retry_on_intr(|| rustix::net::send(&self.stream, said, flags));
        if written.is_err() || sent != Ok(said.len()) {
            self.abort();
        }
    }

    /// The guest sends `len` bytes, which lie at an offset of a buffer.
    pub fn data(&mut self, buffer: &Buffer, offset: usize, len: usize) {
        let sound = self.state == State::Open
            && !self.guest_shut.contains(Shutdown::SEND)
            && buffer.len() >= offset
            && len <= buffer.len() - offset
            && len <= self.backlog.room();
        if !sound {
            return self.abort();
        }
        if self.host_shut.contains(Shutdown::RECEIVE) {
            return self.forward(len); // to nobody: the guest is being told
        }
        let mut done = 0;
        while done < len && self.backlog.is_empty() {
            match transfer::send(&self.stream, buffer, offset + done, len - done) {
                Ok(0) => break,
                Ok(sent) => {
                    self.forward(sent);
                    done += sent;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    self.forward(len - done);
                    return self.deaf(&error);
                }
            }
        }
        if done < len {
            self.backlog.push(buffer, offset + done, len - done);
        }
    }

    /// Bytes have left; the guest must know before it runs out of credit.
    fn forward(&mut self, len: usize) {
        // At most the buffer's size.
        self.forwarded = self.forwarded.wrapping_add(number::length(len));
        let behind = self.forwarded.wrapping_sub(self.told) as usize;
        if behind >= self.backlog.capacity() / CREDIT_STEP {
            self.pending.insert(Pending::CREDIT_UPDATE);
        }
    }

    /// The guest asks for its credit.
    pub fn credit_request(&mut self) {
        self.pending.insert(Pending::CREDIT_UPDATE);
    }

    /// The guest will not send or receive any more.
    pub fn shutdown(&mut self, flags: Shutdown) {
        if self.state != State::Open {
            return self.abort();
        }
        let news = flags.difference(self.guest_shut);
        self.guest_shut.insert(flags);
        if news.contains(Shutdown::RECEIVE) {
            // Fails if the peer has gone.
            let _ = self.stream.shutdown(net::Shutdown::Read);
            self.conclude();
        }
        if news.contains(Shutdown::SEND) {
            self.advance();
        }
    }

    /// The guest breaks the connection. If it has sent all it wanted, that is
    /// still delivered.
    pub fn guest_reset(&mut self) {
        if self.guest_shut.contains(Shutdown::SEND) && !self.backlog.is_empty() {
            self.state = State::Orphan;
            self.pending = Pending::empty();
            self.deadline = None;
        } else {
            self.over = Some(End::Silent);
        }
    }

    // What the host does.

    /// The stream is ready for something.
    pub fn event(&mut self, events: EventSet) {
        let gone = EventSet::HANG_UP | EventSet::ERROR;
        if events.intersects(gone | EventSet::IN | EventSet::READ_HANG_UP) {
            self.readable = true;
        }
        if events.intersects(gone) {
            self.hung_up = true;
            if self.state == State::Requested {
                return self.abort();
            }
            self.conclude();
        }
        if events.intersects(gone | EventSet::OUT) {
            self.flush();
        }
    }

    /// Delivers what was held back.
    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            match self.backlog.send(&self.stream) {
                Ok(0) => return,
                Ok(sent) => {
                    self.forward(sent);
                    self.deadline = None; // if it lingers, the time begins anew
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.forward(self.backlog.len());
                    return self.deaf(&error);
                }
            }
        }
        self.advance();
    }

    /// The peer does not read any more.
    fn deaf(&mut self, error: &io::Error) {
        self.broken |= error.raw_os_error() == Some(libc::ECONNRESET);
        self.backlog.clear();
        self.host_shut.insert(Shutdown::RECEIVE);
        self.conclude();
        self.advance();
    }

    /// When nothing more comes from the peer, nor goes to it, all is over for it.
    fn conclude(&mut self) {
        let mute =
            self.host_shut.contains(Shutdown::SEND) || self.guest_shut.contains(Shutdown::RECEIVE);
        if mute && (self.hung_up || self.host_shut.contains(Shutdown::RECEIVE)) {
            self.host_shut = Shutdown::all();
        }
    }

    /// All was delivered: what the guest ended, ends here.
    fn advance(&mut self) {
        if !self.backlog.is_empty() {
        } else if self.state == State::Orphan {
            self.over = Some(End::Silent);
        } else if self.guest_shut.is_all() {
            self.over = Some(End::Reset);
        } else if self.guest_shut.contains(Shutdown::SEND) {
            let _ = self.stream.shutdown(net::Shutdown::Write);
        }
    }

    // What the guest is sent.

    /// There is a packet for the guest, or there may be.
    pub fn due(&self) -> bool {
        !self.pending.is_empty()
            || self.state == State::Open
                && (self.told_shut != self.host_shut
                    || self.may_read() && (self.guest_room() > 0 || !self.asked))
    }

    fn may_read(&self) -> bool {
        self.readable
            && !self.host_shut.contains(Shutdown::SEND)
            && !self.guest_shut.contains(Shutdown::RECEIVE)
    }

    /// The next packet for the guest; data is written to the buffer, behind
    /// where the header will be. When there is none, nothing is due.
    pub fn next(&mut self, buffer: &Buffer) -> Option<Packet> {
        for (pending, op) in [
            (Pending::REQUEST, Op::Request),
            (Pending::RESPONSE, Op::Response),
        ] {
            if self.pending.contains(pending) {
                self.pending.remove(pending);
                self.readable |= op == Op::Response;
                return Some(op.into());
            }
        }
        if self.state == State::Open {
            if let Some(packet) = self.shutdown_packet().or_else(|| self.read(buffer)) {
                return Some(packet);
            }
            if self.over.is_some() {
                return None;
            }
        }
        let update = self.pending.contains(Pending::CREDIT_UPDATE);
        update.then_some(Op::CreditUpdate.into())
    }

    /// Every packet tells the credit.
    pub fn fill(&mut self, header: &mut Header) {
        self.pending.remove(Pending::CREDIT_UPDATE);
        self.told = self.forwarded;
        header.buf_alloc = number::length(self.backlog.capacity());
        header.fwd_cnt = self.forwarded;
    }

    fn shutdown_packet(&mut self) -> Option<Packet> {
        (self.told_shut != self.host_shut).then(|| {
            self.told_shut = self.host_shut;
            Packet {
                flags: self.host_shut,
                ..Op::Shutdown.into()
            }
        })
    }

    /// Reads the stream straight into the guest's buffer.
    fn read(&mut self, buffer: &Buffer) -> Option<Packet> {
        if !self.may_read() {
            return None;
        }
        let len = (self.guest_room() as usize)
            .min(buffer.len().saturating_sub(HEADER))
            .min(PACKET_MAX);
        if len == 0 {
            let again = std::mem::replace(&mut self.asked, true);
            return (!again).then_some(Op::CreditRequest.into());
        }
        match transfer::receive(&self.stream, buffer, HEADER, len) {
            Ok(0) if self.broken => self.abort(),
            Ok(0) => {
                self.host_shut.insert(Shutdown::SEND);
                self.conclude();
                return self.shutdown_packet();
            }
            Ok(len) => {
                let len = number::length(len);
                self.sent = self.sent.wrapping_add(len);
                return Some(Packet {
                    len,
                    ..Op::Data.into()
                });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(_) => self.abort(),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_wraps_around_and_a_lie_is_none() {
        let (stream, _peer) = UnixStream::pair().unwrap();
        let mut connection = Connection::accepted(stream, 4096);
        connection.sent = 10; // after 4 GiB
        let mut room = |buf_alloc, fwd_cnt| {
            connection.credit(&Header {
                buf_alloc,
                fwd_cnt,
                ..Default::default()
            });
            connection.guest_room()
        };
        assert_eq!(room(100, 10), 100);
        assert_eq!(room(100, u32::MAX - 9), 80);
        assert_eq!(room(20, u32::MAX - 9), 0);
        assert_eq!(room(19, u32::MAX - 9), 0); // it shrank
        assert_eq!(room(u32::MAX, 11), 0); // more than it was sent
        assert_eq!(room(0, 10), 0);
    }
}
