//! The host's end of the TCP that a comparison measures: it echoes, takes and gives, for as
//! long as one engine is measured.
//!
//! Who calls may be hostile, be it the instance or anybody who reaches this host: nothing is
//! done for those who do not begin with the secret of [`Meeting`], and little for those who
//! do. See `mayfly_protocol::peer` for what is said.

mod addresses;
#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_protocol::peer::{CHUNK, LAST, Meeting, SECRET, Task};
use ring::rand::{SecureRandom, SystemRandom};
use rustix::event::{PollFd, PollFlags, poll};

/// How often a thread that waits for a byte checks whether all is over.
const TICK: Duration = Duration::from_millis(100);
/// The bytes that are echoed at once.
const ECHO: usize = 4096;

/// Where an engine's connections come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A process of this host makes them: the command itself, or what stands in for the
    /// instance's network.
    Host,
    /// Anywhere: the instance has an address that is not the host's.
    Anywhere,
}

/// The limits for connections.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// The secret comes in this time.
    greeting: Duration,
    /// A connection is over after this time,
    life: Duration,
    /// and after this number of bytes, in both directions together.
    bytes: u64,
    /// The number of connections at the same time,
    at_once: usize,
    /// and in all.
    total: usize,
}

const LIMITS: Limits = Limits {
    greeting: Duration::from_secs(10),
    life: Duration::from_secs(30),
    bytes: 64 << 30,
    at_once: 8,
    total: 256,
};

/// Listens, until it is dropped.
pub struct Peer {
    meeting: Meeting,
    /// Is closed to end it.
    stop: Option<io::PipeWriter>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Peer {
    /// Starts to listen.
    pub fn start(origin: Origin) -> io::Result<Self> {
        Peer::limited(origin, LIMITS)
    }

    fn limited(origin: Origin, limits: Limits) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        listener.set_nonblocking(true)?;
        let mut meeting = Meeting {
            port: listener.local_addr()?.port(),
            addresses: addresses::own(),
            question: [0; SECRET],
            answer: [0; SECRET],
        };
        for secret in [&mut meeting.question, &mut meeting.answer] {
            let filled = SystemRandom::new().fill(secret);
            filled.map_err(|_| io::Error::other("no random numbers"))?;
        }
        let (stopped, stop) = io::pipe()?;
        let server = Server {
            origin,
            limits,
            meeting: meeting.clone(),
            over: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
        };
        let thread = thread::Builder::new()
            .name("peer".into())
            .spawn(move || server.run(listener, &stopped))?;
        Ok(Peer {
            meeting,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// The argument for the probe.
    pub fn meeting(&self) -> &Meeting {
        &self.meeting
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Server {
    origin: Origin,
    limits: Limits,
    meeting: Meeting,
    over: AtomicBool,
    connections: AtomicUsize,
}

impl Server {
    fn run(&self, listener: TcpListener, stopped: &io::PipeReader) {
        thread::scope(|scope| {
            let mut served = 0;
            // Who has called often enough finds nobody any more.
            let mut listener = Some(listener);
            while !self.stopped(listener.as_ref(), stopped) {
                let Some(there) = &listener else { continue };
                let (stream, from) = match there.accept() {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        if !passing(&error) {
                            // No descriptors, perhaps: the caller is still there then.
                            thread::sleep(TICK);
                        }
                        continue;
                    }
                };
                if !self.welcome(&stream, from.ip()) {
                    continue;
                }
                served += 1;
                if served == self.limits.total {
                    listener = None;
                }
                if let Some(place) = Place::take(&self.connections, self.limits.at_once) {
                    let serve = move || {
                        // The reason why the peer closed it does not matter.
                        let _ = self.serve(stream);
                        drop(place);
                    };
                    let _ = thread::Builder::new().spawn_scoped(scope, serve);
                }
            }
            self.over.store(true, Ordering::Relaxed);
        });
    }

    /// Waits for somebody who calls; true at the end.
    fn stopped(&self, listener: Option<&TcpListener>, stopped: &io::PipeReader) -> bool {
        let mut polls = vec![PollFd::new(stopped, PollFlags::IN)];
        polls.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
        match poll(&mut polls, None) {
            Ok(_) => polls.first().is_none_or(|it| !it.revents().is_empty()),
            Err(error) => error != rustix::io::Errno::INTR,
        }
    }

    /// A connection that the host makes to itself has one address at both ends, and nobody
    /// else's can: the kernel takes no packet from outside that bears its own address.
    fn welcome(&self, stream: &TcpStream, from: IpAddr) -> bool {
        let own = stream.local_addr().is_ok_and(|own| own.ip() == from);
        self.origin == Origin::Anywhere || own || from.is_loopback()
    }

    fn serve(&self, stream: TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(TICK))?;
        stream.set_nodelay(true)?;
        let mut line = Line {
            stream,
            until: Instant::now() + self.limits.greeting,
            left: self.limits.bytes,
            over: &self.over,
        };
        let mut greeting = [0; SECRET + 1];
        line.fill(&mut greeting)?;
        let [question @ .., task] = greeting;
        let task = Task::of(task).filter(|_| question == self.meeting.question);
        let task = task.ok_or(io::ErrorKind::PermissionDenied)?;
        line.until = Instant::now() + self.limits.life;
        line.put(&self.meeting.answer)?;
        match task {
            Task::Echo => line.echo(),
            Task::Sink => line.sink(),
            Task::Source => line.source(),
        }
    }
}

/// One of the connections at the same time.
struct Place<'a>(&'a AtomicUsize);

impl<'a> Place<'a> {
    fn take(taken: &'a AtomicUsize, of: usize) -> Option<Self> {
        // Only one thread takes places.
        if taken.load(Ordering::Acquire) >= of {
            return None;
        }
        taken.fetch_add(1, Ordering::AcqRel);
        Some(Place(taken))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A connection, within its limits.
struct Line<'a> {
    stream: TcpStream,
    until: Instant,
    left: u64,
    over: &'a AtomicBool,
}

impl Line<'_> {
    fn echo(&mut self) -> io::Result<()> {
        let mut bytes = [0; ECHO];
        loop {
            let len = self.take(&mut bytes)?;
            self.put(bytes.get(..len).unwrap_or(&[]))?;
        }
    }

    fn sink(&mut self) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK];
        loop {
            self.fill(&mut chunk)?;
            if chunk.first() == Some(&LAST) {
                return self.put(&[0]);
            }
        }
    }

    fn source(&mut self) -> io::Result<()> {
        let chunk = vec![0; CHUNK];
        loop {
            self.put(&chunk)?;
        }
    }

    /// Reads some.
    fn take(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.share(into.len())?;
        let into = into.get_mut(..len).unwrap_or(&mut []);
        match self.patiently(|mut stream| stream.read(into))? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            len => Ok(len),
        }
    }

    fn fill(&mut self, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let len = self.take(into)?;
            into = into.get_mut(len..).unwrap_or(&mut []);
        }
        Ok(())
    }

    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let len = self.share(bytes.len())?;
            let now = bytes.get(..len).unwrap_or(&[]);
            let len = self.patiently(|mut stream| stream.write(now))?;
            bytes = bytes.get(len..).unwrap_or(&[]);
        }
        Ok(())
    }

    /// The part of `len` bytes that it may still have.
    fn share(&self, len: usize) -> io::Result<usize> {
        match self.left {
            0 => Err(io::ErrorKind::QuotaExceeded.into()),
            left => Ok(usize::try_from(left).unwrap_or(usize::MAX).min(len)),
        }
    }

    /// Tries until something is done, or the connection's time is over.
    fn patiently(
        &mut self,
        mut act: impl FnMut(&TcpStream) -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            if self.over.load(Ordering::Relaxed) || Instant::now() >= self.until {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match act(&self.stream) {
                Err(error) if passing(&error) => {}
                Err(error) => return Err(error),
                Ok(len) => {
                    self.left = self.left.saturating_sub(len as u64);
                    return Ok(len);
                }
            }
        }
    }
}

/// It may go better the next time.
fn passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, TimedOut, WouldBlock};
    let kind = error.kind();
    [ConnectionAborted, Interrupted, TimedOut, WouldBlock].contains(&kind)
}
