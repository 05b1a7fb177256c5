//! The host's end of a connection to the guest's agent. The guest may be
//! hostile: what it sends is only ever data, a status, or a refusal.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_devices::poll::ready;
use mayfly_protocol::agent::{
    DATA_MAX, Exit, Failed, Frame, Frames, GuestMessage, HostMessage, PORT, Process, Stream,
    Unpack, VERSION, WINDOW, send, send_data,
};
use mayfly_protocol::copy::wire::{Incoming, Outgoing};
use mayfly_protocol::copy::{Source, copy};
use mayfly_text::printable;

use super::detach::DetachKeys;
use crate::unix_socket;

/// The time that a guest has to let a user go.
const GRACE_PERIOD: Duration = Duration::from_secs(2);
/// Enough for what these threads call, with their buffers.
const STACK: usize = 256 << 10;

/// Why the agent did not do what it was to.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It hung up, or the connection failed.
    #[error("the connection to the guest: {0}")]
    Connection(io::Error),
    /// It speaks another version.
    #[error(
        "the guest's init speaks version {0} of the protocol, not {VERSION}; build the initramfs anew"
    )]
    Version(u16),
    /// It answers what it was not asked.
    #[error("the guest's answer makes no sense")]
    Nonsense,
    /// The command succeeded, but not all of its output was written.
    #[error("its output could not be written: {0}")]
    Lost(io::Error),
    /// It could not do it.
    #[error("{}", .0.reason)]
    Failed(Failed),
}

impl From<io::Error> for AgentError {
    fn from(error: io::Error) -> Self {
        AgentError::Connection(error)
    }
}

fn harmless(failed: Failed) -> Failed {
    Failed {
        reason: printable::line(&failed.reason),
        ..failed
    }
}

/// A file that others may have made not to block: then it is waited for.
pub struct BlockingFile(pub File);

impl BlockingFile {
    fn wait(&self, events: libc::c_short) {
        ready(self.0.as_raw_fd(), events, -1);
    }
}

impl Read for BlockingFile {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(data) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(libc::POLLIN),
                result => return result,
            }
        }
    }
}

impl Write for BlockingFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(data) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(libc::POLLOUT),
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Where a process's streams are on the host.
pub struct Streams {
    /// What it reads, if anything.
    pub input: Option<BlockingFile>,
    /// What a user types there to leave it.
    pub detach: Option<DetachKeys>,
    /// Where its output goes.
    pub output: Box<dyn Write + Send>,
    /// Where its errors go.
    pub errors: Box<dyn Write + Send>,
}

/// A connection of which all that is read comes until a time, however little comes at once.
struct Timed {
    stream: UnixStream,
    deadline: Option<Instant>,
}

impl Timed {
    fn new(stream: UnixStream, timeout: Option<Duration>) -> io::Result<Self> {
        let mut timed = Timed {
            stream,
            deadline: None,
        };
        timed.limit(timeout)?;
        Ok(timed)
    }

    /// Gives what is read from now on a timeout, or all the time that it takes.
    fn limit(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.stream.set_read_timeout(None)
    }
}

impl Read for Timed {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let Some(deadline) = self.deadline else {
            return self.stream.read(data);
        };
        let late = || io::Error::from(io::ErrorKind::TimedOut);
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(data).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => late(),
            _ => error,
        })
    }
}

/// A connection to the agent.
pub struct Agent {
    frames: Frames<Timed>,
    link: Link,
    /// How long it has to answer.
    timeout: Option<Duration>,
}

/// The part of a connection that others use at the same time.
#[derive(Clone)]
pub struct Link(Arc<Mutex<UnixStream>>);

impl Link {
    /// Sends a message.
    pub fn send(&self, message: &HostMessage) -> io::Result<()> {
        send(&*self.lock(), message)
    }

    fn send_data(&self, data: &[u8]) -> io::Result<()> {
        send_data(&*self.lock(), Stream::In, data)
    }

    fn lock(&self) -> MutexGuard<'_, UnixStream> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    /// Hears the agent's first word.
    pub fn greet(stream: UnixStream) -> Result<Self, AgentError> {
        let timed = Timed::new(stream.try_clone()?, None)?;
        Agent::hear(timed, stream, None)
    }

    fn hear(
        timed: Timed,
        stream: UnixStream,
        timeout: Option<Duration>,
    ) -> Result<Self, AgentError> {
        let mut frames = Frames::new(timed);
        match frames.message()? {
            GuestMessage::Hello { version: VERSION } => {}
            GuestMessage::Hello { version } => return Err(AgentError::Version(version)),
            _ => return Err(AgentError::Nonsense),
        }
        Ok(Agent {
            frames,
            link: Link(Arc::new(Mutex::new(stream))),
            timeout,
        })
    }

    /// Connects to the agent of a machine that runs, by its vsock's socket.
    pub fn connect(socket: &Path) -> Result<Self, AgentError> {
        const TIMEOUT: Duration = Duration::from_secs(10);
        const ANSWER_MAX: usize = 64;
        let stream = unix_socket::connect_blocking(socket)?;
        let mut timed = Timed::new(stream.try_clone()?, Some(TIMEOUT))?;
        (&stream).write_all(format!("CONNECT {PORT}\n").as_bytes())?;
        let mut answer = Vec::new();
        // Byte by byte: what follows is the agent's.
        while answer.len() < ANSWER_MAX && !answer.ends_with(b"\n") {
            let mut byte = [0];
            timed.read_exact(&mut byte)?;
            answer.extend(byte);
        }
        if !answer.starts_with(b"OK ") || !answer.ends_with(b"\n") {
            return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
        }
        // It has the same time for what it is asked; not for a process.
        Agent::hear(timed, stream, Some(TIMEOUT))
    }

    /// Sends a message, from which on the answer has its time.
    fn say(&mut self, message: &HostMessage) -> io::Result<()> {
        self.frames.source().limit(self.timeout)?;
        self.link.send(message)
    }

    /// What others may use while this follows a process.
    pub fn link(&self) -> Link {
        self.link.clone()
    }

    /// Asks for something that is done at once, or not.
    pub fn ask(&mut self, message: &HostMessage) -> Result<(), AgentError> {
        self.say(message)?;
        self.hear_done()
    }

    /// Hears whether what was asked for is done.
    pub fn hear_done(&mut self) -> Result<(), AgentError> {
        match self.frames.message()? {
            GuestMessage::Done => Ok(()),
            GuestMessage::Failed(failed) => Err(AgentError::Failed(harmless(failed))),
            _ => Err(AgentError::Nonsense),
        }
    }

    /// Starts a process.
    pub fn start(&mut self, process: Process) -> Result<(), AgentError> {
        self.ask(&HostMessage::Start(Box::new(process)))
    }

    /// Leaves a process that runs; what it wrote until then is nobody's.
    pub fn leave(&mut self) -> Result<(), AgentError> {
        self.say(&HostMessage::Detach)?;
        loop {
            match self.frames.frame()? {
                Some(Frame::Message(GuestMessage::Done | GuestMessage::Exited(_))) => return Ok(()),
                Some(Frame::Message(GuestMessage::Failed(failed))) => {
                    return Err(AgentError::Failed(harmless(failed)));
                }
                Some(Frame::Data(Stream::Out | Stream::Err, _)) => {}
                Some(_) => return Err(AgentError::Nonsense),
                None => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            }
        }
    }

    /// The entries of what was asked for, with holes of files as such if that was asked
    /// for, too.
    pub fn entries(&mut self, holes: bool) -> io::Result<impl Source> {
        self.frames.source().limit(None)?;
        let incoming = Incoming::new(&mut self.frames, Stream::Out, |_| Ok(()));
        Ok(match holes {
            true => incoming,
            false => incoming.without_holes(),
        })
    }

    /// Sends files, as far as the guest takes them, and hears what became of them.
    pub fn bring(&mut self, wish: Unpack, source: &mut impl Source) -> io::Result<()> {
        let failed = |error| match error {
            AgentError::Connection(error) => error,
            error => io::Error::other(error),
        };
        self.ask(&HostMessage::Unpack(wish)).map_err(failed)?;
        self.frames.source().limit(None)?;
        let stream = self.link.lock();
        let mut sent = 0_usize;
        let frames = &mut self.frames;
        let mut answer = |sent: &mut usize| match frames.message()? {
            GuestMessage::Taken(len) => {
                *sent = sent.saturating_sub(len as usize);
                Ok(false)
            }
            GuestMessage::Done => Ok(true),
            GuestMessage::Failed(failed) => Err(io::Error::other(failed.reason)),
            _ => Err(io::Error::other(AgentError::Nonsense)),
        };
        let before = |len| {
            while sent + len > WINDOW {
                if answer(&mut sent)? {
                    return Err(io::Error::other(AgentError::Nonsense));
                }
            }
            sent += len;
            Ok(())
        };
        copy(source, &mut Outgoing::new(&*stream, Stream::In, before))?;
        while !answer(&mut sent)? {}
        Ok(())
    }

    /// Moves a process's bytes until it ends, and all of its output is out. Nothing
    /// is returned if the user left it.
    pub fn follow(&mut self, streams: Streams) -> Result<Option<Exit>, AgentError> {
        self.frames.source().limit(None)?;
        let window = Arc::new(Window::default());
        let detaches = streams.detach.is_some();
        if let Some(input) = streams.input {
            let (link, window, keys) = (self.link.clone(), window.clone(), streams.detach);
            // It may wait for ever for what nobody types: it ends with the process.
            thread::Builder::new()
                .name("input".into())
                .stack_size(STACK)
                .spawn(move || feed(input, keys, &link, &window))?;
        }
        let mut output = Some(streams.output);
        let mut errors = Some(streams.errors);
        let mut lost = None;
        loop {
            match self.frames.frame()? {
                None => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Some(Frame::Data(stream, data)) => {
                    let target = match stream {
                        Stream::In => return Err(AgentError::Nonsense),
                        Stream::Out => &mut output,
                        Stream::Err => &mut errors,
                    };
                    let written = target.as_mut().map(|target| target.write_all(data));
                    if let Some(Err(error)) = written {
                        // As in a pipeline: whoever writes to it gets an error.
                        *target = None;
                        let _ = self.link.send(&HostMessage::Closed(stream));
                        if error.kind() != io::ErrorKind::BrokenPipe {
                            lost = Some(error);
                        }
                    }
                }
                Some(Frame::Message(GuestMessage::Taken(len))) => window.grow(len),
                Some(Frame::Message(GuestMessage::Done)) if detaches => return Ok(None),
                Some(Frame::Message(GuestMessage::Exited(exit))) => {
                    for target in [output, errors].iter_mut().flatten() {
                        let _ = target.flush();
                    }
                    return match lost {
                        Some(error) if exit.status == 0 => Err(AgentError::Lost(error)),
                        _ => Ok(Some(exit)),
                    };
                }
                Some(Frame::Message(GuestMessage::Failed(failed))) => {
                    return Err(AgentError::Failed(harmless(failed)));
                }
                Some(_) => return Err(AgentError::Nonsense),
            }
        }
    }
}

/// Sends what the host's side types, as far as the guest takes it.
fn feed(mut input: BlockingFile, mut keys: Option<DetachKeys>, link: &Link, window: &Window) {
    let mut buffer = vec![0; DATA_MAX];
    let mut passed = Vec::new();
    loop {
        let room = window.wait().min(buffer.len());
        let Some(target) = buffer.get_mut(..room) else {
            return;
        };
        let len = match input.read(target) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => 0,
        };
        let mut data = buffer.get(..len).unwrap_or_default();
        let mut leave = false;
        if let (Some(keys), 1..) = (&mut keys, len) {
            passed.clear();
            leave = keys.filter(data, &mut passed);
            data = &passed;
        }
        window.shrink(data.len());
        // What was held back may be more than a frame; nothing would be the end.
        let mut frames = data.chunks(DATA_MAX);
        if frames.any(|data| link.send_data(data).is_err()) {
            return;
        }
        if leave {
            let _ = link.send(&HostMessage::Detach);
            // The answer ends this process, or a guest that gives none is disconnected.
            thread::sleep(GRACE_PERIOD);
            let _ = link.lock().shutdown(Shutdown::Both);
            return;
        }
        if len == 0 {
            let _ = link.send_data(&[]);
            return;
        }
    }
}

/// How many bytes the guest has not taken.
#[derive(Default)]
struct Window {
    sent: Mutex<usize>,
    taken: Condvar,
}

impl Window {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for room, and returns how much there is.
    fn wait(&self) -> usize {
        let full = |sent: &mut usize| *sent >= WINDOW;
        let sent = self.taken.wait_while(self.lock(), full);
        WINDOW - *sent.unwrap_or_else(PoisonError::into_inner)
    }

    fn shrink(&self, len: usize) {
        *self.lock() += len;
    }

    /// The guest took some: never more than it was sent.
    fn grow(&self, len: u32) {
        let mut sent = self.lock();
        *sent = sent.saturating_sub(len as usize);
        self.taken.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_protocol::copy::wire::{ENTRY_WEIGHT, Piece};
    use mayfly_protocol::copy::{Data, Entry, Kind};
    use std::sync::mpsc;

    /// A guest that does as it is told here.
    fn guest(
        act: impl FnOnce(UnixStream) + Send + 'static,
    ) -> (Result<Agent, AgentError>, thread::JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let guest = thread::spawn(move || act(theirs));
        (Agent::greet(ours), guest)
    }

    fn hello(stream: &UnixStream) {
        send(stream, &GuestMessage::Hello { version: VERSION }).unwrap();
    }

    fn exited(stream: &UnixStream, status: u8) {
        let exit = Exit {
            status,
            out_of_memory: false,
        };
        send(stream, &GuestMessage::Exited(exit)).unwrap();
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Gone;

    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn streams(
        output: impl Write + Send + 'static,
        errors: impl Write + Send + 'static,
    ) -> Streams {
        Streams {
            input: None,
            detach: None,
            output: Box::new(output),
            errors: Box::new(errors),
        }
    }

    #[test]
    fn output_and_errors_stay_apart() {
        let (agent, guest) = guest(|stream| {
            hello(&stream);
            send_data(&stream, Stream::Out, b"out").unwrap();
            send_data(&stream, Stream::Err, b"err").unwrap();
            send_data(&stream, Stream::Out, b"put").unwrap();
            exited(&stream, 7);
        });
        let (out, err) = (Sink::default(), Sink::default());
        let exit = agent.unwrap().follow(streams(out.clone(), err.clone()));
        assert_eq!(exit.unwrap().unwrap().status, 7);
        assert_eq!(*out.0.lock().unwrap(), b"output");
        assert_eq!(*err.0.lock().unwrap(), b"err");
        guest.join().unwrap();
    }

    #[test]
    fn a_reader_that_has_gone_is_told_to_the_guest() {
        let (agent, guest) = guest(|stream| {
            hello(&stream);
            send_data(&stream, Stream::Out, b"out").unwrap();
            let mut frames = Frames::new(stream.try_clone().unwrap());
            let message: HostMessage = frames.message().unwrap();
            assert_eq!(message, HostMessage::Closed(Stream::Out));
            exited(&stream, 141);
        });
        let exit = agent.unwrap().follow(streams(Gone, Sink::default()));
        assert_eq!(exit.unwrap().unwrap().status, 141);
        guest.join().unwrap();
    }

    #[test]
    fn output_that_is_lost_is_no_success() {
        let (agent, guest) = guest(|stream| {
            hello(&stream);
            send_data(&stream, Stream::Out, b"out").unwrap();
            exited(&stream, 0);
        });
        let full = File::options().write(true).open("/dev/full").unwrap();
        let lost = agent
            .unwrap()
            .follow(streams(BlockingFile(full), Sink::default()));
        assert!(matches!(lost, Err(AgentError::Lost(_))), "{lost:?}");
        guest.join().unwrap();
    }

    #[test]
    fn a_guest_s_reason_is_one_harmless_line() {
        let reason = format!("\x1b[2J{}\nforged", "a".repeat(500));
        let told = harmless(Failed { status: 1, reason }).reason;
        assert!(told.starts_with("?[2Jaaa") && told.len() == 200, "{told}");
    }

    #[test]
    fn a_user_leaves_a_guest_even_if_it_does_not_answer() {
        for answers in [true, false] {
            let (reader, mut writer) = io::pipe().unwrap();
            let (agent, guest) = guest(move |stream| {
                hello(&stream);
                let mut frames = Frames::new(stream.try_clone().unwrap());
                let typed = frames.frame::<HostMessage>().unwrap().unwrap();
                assert_eq!(typed, Frame::Data(Stream::In, b"a"));
                let message: HostMessage = frames.message().unwrap();
                assert_eq!(message, HostMessage::Detach);
                if answers {
                    send(&stream, &GuestMessage::Done).unwrap();
                }
                assert_eq!(frames.frame::<HostMessage>().unwrap(), None);
            });
            let mut streams = streams(io::sink(), io::sink());
            streams.input = Some(BlockingFile(std::os::fd::OwnedFd::from(reader).into()));
            streams.detach = DetachKeys::parse("ctrl-p,q").unwrap();
            writer.write_all(b"a\x10qrest").unwrap();
            let left = agent.unwrap().follow(streams);
            assert_eq!(matches!(left, Ok(None)), answers, "{left:?}");
            guest.join().unwrap();
        }
    }

    #[test]
    fn a_guest_that_never_comes_to_an_answer_is_left() {
        let endless: [fn(&UnixStream) -> io::Result<()>; 2] = [
            |stream| send_data(stream, Stream::Out, b"more"),
            // A frame's header, and a byte of it now and then.
            |mut stream| {
                thread::sleep(Duration::from_millis(5));
                stream.write_all(&[0])
            },
        ];
        let header: &[u8] = &[2, 0, 0xf0, 0, 0];
        for (begins, more) in [&[], header].into_iter().zip(endless) {
            let (agent, guest) = guest(move |stream| {
                hello(&stream);
                (&stream).write_all(begins).unwrap();
                while more(&stream).is_ok() {}
            });
            let mut agent = agent.unwrap();
            agent.timeout = Some(Duration::from_millis(200));
            let AgentError::Connection(error) = agent.leave().unwrap_err() else {
                panic!();
            };
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            drop(agent);
            guest.join().unwrap();
        }
    }

    /// A file without an end.
    struct Endless(bool);

    impl Data for Endless {}

    impl Source for Endless {
        fn next(&mut self) -> io::Result<Option<Entry>> {
            Ok(std::mem::replace(&mut self.0, false).then(|| Entry {
                path: Vec::new(),
                kind: Kind::File(u64::MAX),
                mode: 0o644,
                uid: 0,
                gid: 0,
                mtime: 0,
                xattrs: Vec::new(),
                sparse: false,
            }))
        }
    }

    impl Read for Endless {
        fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
            data.fill(7);
            Ok(data.len())
        }
    }

    #[test]
    fn files_wait_for_a_guest_and_stop_when_it_cannot_have_them() {
        let (agent, guest) = guest(|stream| {
            hello(&stream);
            let mut frames = Frames::new(stream.try_clone().unwrap());
            let message: HostMessage = frames.message().unwrap();
            assert!(matches!(message, HostMessage::Unpack(_)), "{message:?}");
            send(&stream, &GuestMessage::Done).unwrap();
            let mut come = 0;
            // A frame more has no room.
            while come + DATA_MAX <= WINDOW {
                match frames.frame::<Piece>().unwrap().unwrap() {
                    Frame::Message(Piece::Entry(_)) => come += ENTRY_WEIGHT,
                    Frame::Data(Stream::In, data) => come += data.len(),
                    other => panic!("{other:?}"),
                }
            }
            let timeout = Some(Duration::from_millis(200));
            stream.set_read_timeout(timeout).unwrap();
            assert!(frames.frame::<Piece>().is_err());
            let failed = Failed {
                status: 125,
                reason: "full".into(),
            };
            send(&stream, &GuestMessage::Failed(failed)).unwrap();
        });
        let result = agent.unwrap().bring(Unpack::default(), &mut Endless(true));
        assert_eq!(result.unwrap_err().to_string(), "full");
        guest.join().unwrap();
    }

    #[test]
    fn input_waits_for_a_guest_that_does_not_take_it() {
        let (reader, mut writer) = io::pipe().unwrap();
        let (told, got) = mpsc::channel();
        let (agent, guest) = guest(move |stream| {
            hello(&stream);
            let mut frames = Frames::new(stream.try_clone().unwrap());
            let mut len = 0;
            while len < WINDOW {
                match frames.frame::<HostMessage>().unwrap().unwrap() {
                    Frame::Data(Stream::In, data) => len += data.len(),
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(len, WINDOW);
            // Nothing more comes by itself.
            let timeout = Some(Duration::from_millis(200));
            stream.set_read_timeout(timeout).unwrap();
            assert!(frames.frame::<HostMessage>().is_err());
            stream.set_read_timeout(None).unwrap();
            send(&stream, &GuestMessage::Taken(WINDOW as u32)).unwrap();
            let mut frames = Frames::new(stream.try_clone().unwrap());
            loop {
                match frames.frame::<HostMessage>().unwrap().unwrap() {
                    Frame::Data(Stream::In, []) => break,
                    Frame::Data(Stream::In, data) => len += data.len(),
                    other => panic!("{other:?}"),
                }
            }
            told.send(len).unwrap();
            exited(&stream, 0);
        });
        let feeder = thread::spawn(move || writer.write_all(&vec![7; WINDOW + 1000]));
        let mut streams = streams(Sink::default(), Sink::default());
        streams.input = Some(BlockingFile(File::from(std::os::fd::OwnedFd::from(reader))));
        agent.unwrap().follow(streams).unwrap();
        feeder.join().unwrap().unwrap();
        assert_eq!(got.recv().unwrap(), WINDOW + 1000);
        guest.join().unwrap();
    }

    #[test]
    fn a_guest_that_talks_nonsense_is_refused() {
        let (agent, _) = guest(|stream| {
            send(&stream, &GuestMessage::Hello { version: 99 }).unwrap();
        });
        assert!(matches!(agent, Err(AgentError::Version(99))));
        let (agent, _) = guest(|stream| send(&stream, &GuestMessage::Done).unwrap());
        assert!(matches!(agent, Err(AgentError::Nonsense)));
        let (agent, _) = guest(drop);
        assert!(matches!(agent, Err(AgentError::Connection(_))));
        for nonsense in [Stream::In, Stream::Out] {
            let (agent, guest) = guest(move |stream| {
                hello(&stream);
                match nonsense {
                    Stream::In => send_data(&stream, Stream::In, b"x").unwrap(),
                    _ => send(&stream, &GuestMessage::Done).unwrap(),
                }
            });
            let followed = agent
                .unwrap()
                .follow(streams(Sink::default(), Sink::default()));
            assert!(matches!(followed, Err(AgentError::Nonsense)));
            guest.join().unwrap();
        }
    }
}
