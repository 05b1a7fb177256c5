//! A socket that carries Ethernet frames, each behind its length in four bytes,
//! big end first: QEMU's and passt's framing. There are no packet headers, and
//! so no offloads.
//!
//! The guest's frames are copied, judged if there is a filter, and sent together when
//! the guest has no more for now, or there are many. When the socket does not take them,
//! the next ones wait in the guest.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::filter::{FrameFilter, Verdict};
use super::packet::{HEADER, Incoming, PACKET_MAX};
use crate::number;
use crate::virtio::chain::Chain;

/// The length in front of a frame.
const PREFIX: usize = 4;
/// The largest frame.
const FRAME_MAX: usize = PACKET_MAX - HEADER;
/// The smallest: an Ethernet header.
const FRAME_MIN: usize = 14;
/// A frame's packet header is written over its length, and what was before it.
const SLACK: usize = HEADER - PREFIX;
/// Frames of several sizes are read at once.
const INBOX: usize = SLACK + 2 * (PREFIX + FRAME_MAX);
/// Frames that are sent together, and one more.
const OUTBOX: usize = BATCH + PREFIX + FRAME_MAX;
/// Bytes that are sent without waiting for the end of the guest's frames.
const BATCH: usize = 64 << 10;
/// Answers of a filter that may wait for the guest.
const ANSWERS_MAX: usize = 64;

/// What came of a look into the inbox.
enum Look {
    /// A frame is whole: its size in bytes.
    Frame(usize),
    Nothing,
    Lost(String),
}

/// What was read of the socket, and is not used up.
#[derive(Default)]
struct Inbox {
    /// [`INBOX`] bytes, from the first on.
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Inbox {
    fn look(&mut self, mut socket: &UnixStream) -> Look {
        if self.bytes.is_empty() {
            self.bytes.resize(INBOX, 0);
            (self.start, self.end) = (SLACK, SLACK);
        }
        loop {
            let ahead = self.bytes.get(self.start..self.end).unwrap_or_default();
            if let Some(prefix) = ahead.first_chunk::<PREFIX>() {
                let len = u32::from_be_bytes(*prefix) as usize;
                if !(1..=FRAME_MAX).contains(&len) {
                    return Look::Lost(format!("its peer sends a frame of {len} bytes"));
                }
                if ahead.len() - PREFIX >= len {
                    return Look::Frame(len);
                }
            }
            if self.start == self.end {
                (self.start, self.end) = (SLACK, SLACK);
            } else if self.bytes.len() - self.start < PREFIX + FRAME_MAX {
                self.bytes.copy_within(self.start..self.end, SLACK);
                (self.start, self.end) = (SLACK, SLACK + self.end - self.start);
            }
            // There is room: what is there is less than a frame.
            match socket.read(self.bytes.get_mut(self.end..).unwrap_or_default()) {
                Ok(0) => return Look::Lost("its peer has ended".into()),
                Ok(len) => self.end += len,
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => return Look::Nothing,
                    _ => return Look::Lost(format!("receiving: {error}")),
                },
            }
        }
    }

    /// The frame that was looked at.
    fn frame(&self, len: usize) -> &[u8] {
        let from = self.start + PREFIX;
        self.bytes.get(from..from + len).unwrap_or_default()
    }

    /// The same, behind room for its packet header.
    fn packet(&mut self, len: usize) -> &mut [u8] {
        let from = self.start + PREFIX;
        let packet = self.bytes.get_mut(from - HEADER..from + len);
        packet.unwrap_or_default()
    }

    fn used(&mut self, len: usize) {
        self.start += PREFIX + len;
    }
}

/// Frames, each with its length in front, that are sent together.
#[derive(Default)]
struct Outbox {
    /// [`OUTBOX`] bytes, from the first frame on.
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Outbox {
    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn len(&self) -> usize {
        self.end - self.start
    }

    /// It has room for a frame, however large.
    fn has_room(&self) -> bool {
        self.len() <= OUTBOX - (PREFIX + FRAME_MAX)
    }

    /// Copies a frame of the guest's to the end, and returns it; none without room.
    fn push(&mut self, chain: &Chain, len: usize) -> Option<&[u8]> {
        if self.bytes.is_empty() {
            self.bytes.resize(OUTBOX, 0);
        }
        if self.end + PREFIX + len > OUTBOX {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.len());
        }
        let room = self.bytes.get_mut(self.end..self.end + PREFIX + len)?;
        let (prefix, frame) = room.split_first_chunk_mut::<PREFIX>()?;
        *prefix = number::length(len).to_be_bytes();
        // What the guest takes away meanwhile is sent as it was before.
        chain.readable.read_at(HEADER, frame);
        self.end += PREFIX + len;
        Some(frame)
    }

    /// Takes the last frame, of a length, away again.
    fn pop(&mut self, len: usize) {
        self.end -= PREFIX + len;
    }

    fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Sends as much as the socket takes.
    fn flush(&mut self, mut socket: &UnixStream) -> io::Result<()> {
        while !self.is_empty() {
            let rest = self.bytes.get(self.start..self.end).unwrap_or_default();
            match socket.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => self.start += len,
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => return Ok(()),
                    _ => return Err(error),
                },
            }
        }
        self.clear();
        Ok(())
    }
}

/// What waits for the guest.
enum Waiting {
    /// A frame in the inbox: its size in bytes.
    Frame(usize),
    /// A packet of the filter's.
    Answer(Vec<u8>),
}

/// The link, which is lost for good when the peer ends or sends nonsense.
enum Link {
    Up,
    Lost(Option<String>),
}

pub struct Stream {
    socket: UnixStream,
    /// Readable when it was asked to tell of room, and there is some.
    room: Epoll,
    link: Link,
    inbox: Inbox,
    outbox: Outbox,
    waiting: Option<Waiting>,
    filter: Option<Box<dyn FrameFilter>>,
    answers: VecDeque<Vec<u8>>,
    /// Expires when the filter has a frame of its own for the guest, and when that is.
    timer: TimerFd,
    timer_set_to: Option<Instant>,
}

impl Stream {
    pub fn new(socket: UnixStream, filter: Option<Box<dyn FrameFilter>>) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let room = Epoll::new()?;
        let never = EpollEvent::new(EventSet::ONE_SHOT, 0);
        room.ctl(ControlOperation::Add, socket.as_raw_fd(), never)?;
        Ok(Stream {
            socket,
            room,
            link: Link::Up,
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            waiting: None,
            filter,
            answers: VecDeque::new(),
            timer: TimerFd::new().map_err(io::Error::from)?,
            timer_set_to: None,
        })
    }

    pub fn source(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    pub fn room_source(&self) -> RawFd {
        self.room.as_raw_fd()
    }

    pub fn timer_source(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Takes the frames of the filter's own that are due.
    pub fn handle_timer(&mut self) {
        // Disarming forgets that it expired, and does not block as reading may.
        let _ = self.timer.clear();
        self.timer_set_to = None;
        let now = Instant::now();
        // What does not fit is lost, as the timer would expire for ever.
        while let Some(frame) = self.filter.as_mut().and_then(|it| it.take_due(now)) {
            self.answer(Verdict::Answer(frame));
        }
        self.set_timer();
    }

    /// Sets the timer to when the filter has a frame of its own.
    fn set_timer(&mut self) {
        let due = self.filter.as_ref().and_then(|filter| filter.next_due());
        if due == self.timer_set_to {
            return;
        }
        self.timer_set_to = due;
        let set = match due {
            // No time at all would stop it.
            Some(due) => {
                let wait = due.saturating_duration_since(Instant::now());
                self.timer.reset(wait.max(Duration::from_millis(1)), None)
            }
            None => self.timer.clear(),
        };
        if let Err(error) = set {
            log::warn!("network: setting a timer: {error}");
        }
    }

    /// What is half sent or half read stays: the peer counts on it.
    pub fn reset(&mut self) {
        self.forget();
        self.answers.clear();
    }

    pub fn poll(&mut self) -> Incoming {
        if self.waiting.is_some() {
            return Incoming::Packet;
        }
        if let Some(answer) = self.answers.pop_front() {
            self.waiting = Some(Waiting::Answer(answer));
            return Incoming::Packet;
        }
        if !self.is_up() {
            return Incoming::Nothing;
        }
        match self.inbox.look(&self.socket) {
            Look::Frame(len) => {
                let frame = self.inbox.frame(len);
                let admitted =
                    |filter: &mut Box<dyn FrameFilter>| filter.incoming(frame, Instant::now());
                if len < FRAME_MIN || !self.filter.as_mut().is_none_or(admitted) {
                    self.inbox.used(len);
                    return Incoming::Lost;
                }
                self.set_timer();
                self.waiting = Some(Waiting::Frame(len));
                Incoming::Packet
            }
            Look::Nothing => Incoming::Nothing,
            Look::Lost(reason) => {
                self.lose(reason);
                Incoming::Nothing
            }
        }
    }

    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    pub fn packet(&mut self) -> &[u8] {
        match &mut self.waiting {
            Some(Waiting::Frame(len)) => {
                let packet = self.inbox.packet(*len);
                if let Some(header) = packet.first_chunk_mut::<HEADER>() {
                    *header = [0; HEADER];
                }
                packet
            }
            Some(Waiting::Answer(packet)) => packet,
            None => &[],
        }
    }

    pub fn forget(&mut self) {
        if let Some(Waiting::Frame(len)) = self.waiting.take() {
            self.inbox.used(len);
        }
    }

    pub fn has_answers(&self) -> bool {
        !self.answers.is_empty()
    }

    /// Makes room for another frame, if there is none. If that takes longer, the source of
    /// room tells when to come again.
    pub fn has_room(&mut self) -> bool {
        if self.is_up() && !self.outbox.has_room() {
            self.flush();
        }
        !self.is_up() || self.outbox.has_room()
    }

    pub fn send(&mut self, chain: &Chain) -> bool {
        let len = chain.readable.len().saturating_sub(HEADER);
        if !self.is_up() || !(FRAME_MIN..=FRAME_MAX).contains(&len) {
            return false;
        }
        let Some(frame) = self.outbox.push(chain, len) else {
            return false;
        };
        let verdict = match &mut self.filter {
            Some(filter) => filter.outgoing(frame, Instant::now()),
            None => Verdict::Pass,
        };
        if verdict != Verdict::Pass {
            self.outbox.pop(len);
            self.answer(verdict);
            return false;
        }
        if self.outbox.len() >= BATCH {
            self.flush();
        }
        self.is_up()
    }

    fn answer(&mut self, verdict: Verdict) {
        if let Verdict::Answer(frame) = verdict
            && self.answers.len() < ANSWERS_MAX
            && (FRAME_MIN..=FRAME_MAX).contains(&frame.len())
        {
            let mut packet = vec![0; HEADER];
            packet.extend(frame);
            self.answers.push_back(packet);
        }
    }

    /// Sends what was collected.
    pub fn flush(&mut self) {
        if self.outbox.is_empty() || !self.is_up() {
            return;
        }
        if let Err(error) = self.outbox.flush(&self.socket) {
            return self.lose(format!("sending: {error}"));
        }
        if !self.outbox.is_empty() {
            // The last one may still be unread.
            let mut told = [EpollEvent::default()];
            let _ = self.room.wait(0, &mut told);
            let once = EpollEvent::new(EventSet::OUT | EventSet::ONE_SHOT, 0);
            let armed = self
                .room
                .ctl(ControlOperation::Modify, self.socket.as_raw_fd(), once);
            if let Err(error) = armed {
                self.lose(format!("waiting: {error}"));
            }
        }
    }

    fn is_up(&self) -> bool {
        matches!(self.link, Link::Up)
    }

    fn lose(&mut self, reason: String) {
        if self.is_up() {
            self.link = Link::Lost(Some(reason));
            self.outbox.clear();
        }
    }

    pub fn take_loss(&mut self) -> Option<String> {
        match &mut self.link {
            Link::Up => None,
            Link::Lost(reason) => reason.take(),
        }
    }

    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let lost = u64::from(!self.is_up());
        let filter = self.filter.as_ref().map(|filter| filter.counters());
        let filter = filter.unwrap_or_default().into_iter();
        filter.chain([("link_losses", lost)]).collect()
    }
}
