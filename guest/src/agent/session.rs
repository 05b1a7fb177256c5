//! One process and the connection that asked for it.

#![allow(unsafe_code, reason = "options of sockets, and poll")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use mayfly_protocol::agent::{
    DATA_MAX, Failed, Frame, Frames, GuestMessage, HostMessage, Process, Size, Stream, send,
    send_data,
};

use super::process::{self, Running};
use super::reaper::Reaper;
use super::setup::Disks;

/// How many of the host's connections there may be at once.
const SESSIONS_MAX: usize = 256;
/// How long a process waits for an attached host that takes nothing, before that is
/// disconnected.
const ATTACHED_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection, which several threads write to, a frame each.
#[derive(Clone)]
pub struct HostConnection(Arc<Mutex<File>>);

impl HostConnection {
    /// A connection to the host.
    pub fn new(host: File) -> Self {
        HostConnection(Arc::new(Mutex::new(host)))
    }

    fn say(&self, message: &GuestMessage) -> io::Result<()> {
        self.whole(|host| send(host, message))
    }

    fn write(&self, stream: Stream, data: &[u8]) -> io::Result<()> {
        self.whole(|host| send_data(host, stream, data))
    }

    /// Sends a frame. Nothing can follow one that was cut short.
    fn whole(&self, send: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let host = lock(&self.0);
        let sent = send(&host);
        if sent.is_err() {
            // SAFETY: an open descriptor.
            unsafe { libc::shutdown(host.as_raw_fd(), libc::SHUT_RDWR) };
        }
        sent
    }

    /// Waits no longer than this for a host that does not read.
    fn set_send_timeout(&self, timeout: Duration) -> io::Result<()> {
        let time = libc::timeval {
            tv_sec: timeout.as_secs().cast_signed(),
            tv_usec: timeout.subsec_micros().into(),
        };
        let len = size_of::<libc::timeval>() as libc::socklen_t;
        let host = lock(&self.0);
        let (level, name) = (libc::SOL_SOCKET, libc::SO_SNDTIMEO);
        // SAFETY: reads a live structure of that length.
        let result = unsafe {
            libc::setsockopt(host.as_raw_fd(), level, name, (&raw const time).cast(), len)
        };
        crate::system::check(result.into())
    }

    /// Tells why something was not done, and waits until that was heard.
    pub fn refuse(&self, frames: &mut Frames<impl Read>, failed: Failed) -> io::Result<()> {
        self.say(&GuestMessage::Failed(failed))?;
        while !matches!(
            frames.frame()?,
            None | Some(Frame::Message(HostMessage::Bye))
        ) {}
        Ok(())
    }

    fn is(&self, other: &HostConnection) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a process is to those that talk to it.
#[derive(Clone)]
struct Handle {
    pid: u32,
    /// Sends data, with the connection that is notified once they were written; no data are
    /// the end of the input.
    input: Option<Sender<(Vec<u8>, HostConnection)>>,
    terminal: Option<Arc<File>>,
    out: Output,
    err: Option<Output>,
    /// Those that get its output.
    hosts: Arc<Mutex<Subscribers>>,
}

/// The connections that get what a process writes.
struct Subscribers {
    hosts: Vec<HostConnection>,
    /// Its host has left it: its terminal and its input stay open.
    left: bool,
}

impl Subscribers {
    fn of(hosts: Vec<HostConnection>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Subscribers { hosts, left: false }))
    }
}

/// What the agent's connections share: the processes that the host asked for, and the disks.
pub struct AgentState {
    /// Starts them, and hears of their ends.
    pub reaper: Arc<Reaper>,
    main: Mutex<Option<Handle>>,
    /// The disks that are unmounted when the main process has ended.
    disks: Disks,
    /// The host's connections beside the first.
    others: Mutex<usize>,
    fewer: Condvar,
}

/// The right to one of the [`SESSIONS_MAX`] connections, which is given back when it is dropped.
pub struct ConnectionPermit(Arc<AgentState>);

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        *lock(&self.0.others) -= 1;
        self.0.fewer.notify_all();
    }
}

impl AgentState {
    /// One without processes.
    pub fn new(reaper: Arc<Reaper>, disks: Disks) -> Arc<Self> {
        Arc::new(AgentState {
            reaper,
            main: Mutex::new(None),
            disks,
            others: Mutex::new(0),
            fewer: Condvar::new(),
        })
    }

    /// Counts a connection; none if there are too many.
    pub fn enter(self: &Arc<Self>) -> Option<ConnectionPermit> {
        let mut others = lock(&self.others);
        let room = *others < SESSIONS_MAX;
        *others += usize::from(room);
        room.then(|| ConnectionPermit(self.clone()))
    }

    /// Gives the others a moment to hear how their processes ended.
    fn wait_for_others(&self) {
        const GRACE_PERIOD: Duration = Duration::from_secs(1);
        let some = |others: &mut usize| *others > 0;
        drop(
            self.fewer
                .wait_timeout_while(lock(&self.others), GRACE_PERIOD, some),
        );
    }
}

/// One of the host's connections.
pub struct Session {
    host: HostConnection,
    state: Arc<AgentState>,
}

impl Session {
    /// A session on a connection.
    pub fn new(host: File, state: Arc<AgentState>) -> Self {
        Session {
            host: HostConnection::new(host),
            state,
        }
    }

    /// Runs the main process; with it, all others end.
    pub fn serve_main(self, frames: &mut Frames<impl Read>) -> io::Result<()> {
        match frames.message()? {
            HostMessage::Start(process) => self.serve_process(frames, *process, true),
            _ => Err(io::Error::other("not a process")),
        }
    }

    /// Runs a process until the host knows how it ended.
    pub fn serve_process(
        self,
        frames: &mut Frames<impl Read>,
        process: Process,
        main: bool,
    ) -> io::Result<()> {
        let reaper = &self.state.reaper;
        let running = match process::start(&process, reaper, main) {
            Ok(running) => running,
            Err(failed) => return self.host.refuse(frames, failed),
        };
        self.host.say(&GuestMessage::Done)?;
        let Running {
            started,
            input,
            output,
            errors,
            terminal,
        } = running;
        let handle = Handle {
            pid: started.child.id(),
            input: match input {
                Some(input) => Some(feed(input, terminal.is_some())?),
                None => None,
            },
            terminal: terminal.map(Arc::new),
            out: Output::new(output)?,
            err: errors.map(Output::new).transpose()?,
            hosts: Subscribers::of(vec![self.host.clone()]),
        };
        let ended = Arc::new(Event::new()?);
        let mut pumps = vec![pump(&handle.out, Stream::Out, &handle.hosts, &ended)?];
        if let Some(err) = &handle.err {
            pumps.push(pump(err, Stream::Err, &handle.hosts, &ended)?);
        }
        if main {
            *lock(&self.state.main) = Some(handle.clone());
        }
        let (hosts, state) = (handle.hosts.clone(), self.state.clone());
        let kept: Arc<Mutex<Option<Handle>>> = Arc::default();
        let until_its_end = kept.clone();
        let tell = move || {
            let exit = started.exit.recv();
            drop(lock(&until_its_end).take());
            let Ok(exit) = exit else {
                return;
            };
            if main {
                state.reaper.end_all();
                // However long it takes: the host waits only briefly once it knows of the end.
                state.disks.leave();
            }
            ended.tell();
            for pump in pumps {
                let _ = pump.join();
            }
            say_to_all(&hosts, &GuestMessage::Exited(exit));
        };
        thread::Builder::new().spawn(tell)?;
        let result = self.listen(frames, &handle, true);
        if lock(&handle.hosts).left {
            // Its terminal stays open, and its input.
            *lock(&kept) = Some(handle);
        }
        if main {
            // Whoever asked for it has gone.
            self.state.reaper.end_all();
            self.state.wait_for_others();
        }
        result
    }

    /// Follows the main process, too.
    pub fn serve_attached(
        self,
        frames: &mut Frames<impl Read>,
        size: Option<Size>,
    ) -> io::Result<()> {
        let Some(handle) = lock(&self.state.main).clone() else {
            let reason = "the machine has no process yet".to_owned();
            return self.host.refuse(
                frames,
                Failed {
                    status: 125,
                    reason,
                },
            );
        };
        self.host.set_send_timeout(ATTACHED_TIMEOUT)?;
        self.host.say(&GuestMessage::Done)?;
        if let (Some(terminal), Some(size)) = (&handle.terminal, size) {
            process::resize(terminal, size);
        }
        lock(&handle.hosts).hosts.push(self.host.clone());
        let result = self.listen(frames, &handle, false);
        self.leave(&handle);
        result
    }

    /// Sends no more of a process's output.
    fn leave(&self, process: &Handle) {
        let others = |host: &HostConnection| !host.is(&self.host);
        lock(&process.hosts).hosts.retain(others);
    }

    /// Does what the host says until it has nothing more to say. A process that
    /// belongs to the host is notified when its readers go.
    fn listen(
        &self,
        frames: &mut Frames<impl Read>,
        process: &Handle,
        owner: bool,
    ) -> io::Result<()> {
        let mut input = process.input.clone();
        loop {
            match frames.frame()? {
                None | Some(Frame::Message(HostMessage::Bye)) => return Ok(()),
                // The process has others to read from.
                Some(Frame::Data(Stream::In, [])) if !owner => input = None,
                Some(Frame::Data(Stream::In, data)) => {
                    if let Some(sender) = &input {
                        // The window bounds what waits.
                        let _ = sender.send((data.to_vec(), self.host.clone()));
                    }
                    if data.is_empty() {
                        input = None;
                    }
                }
                Some(Frame::Message(HostMessage::Resize(size))) => {
                    if let Some(terminal) = &process.terminal {
                        process::resize(terminal, size);
                    }
                }
                Some(Frame::Message(HostMessage::Signal(signal))) => {
                    self.state.reaper.signal(process.pid, signal);
                }
                Some(Frame::Message(HostMessage::Detach)) => {
                    lock(&process.hosts).left |= owner;
                    self.leave(process);
                    return self.host.say(&GuestMessage::Done);
                }
                Some(Frame::Message(HostMessage::Closed(_))) if !owner => return Ok(()),
                Some(Frame::Message(HostMessage::Closed(_))) if process.terminal.is_some() => {
                    // As when a terminal's window is closed. What else it writes is
                    // still taken, so that it does not wait for ever.
                    self.state.reaper.signal(process.pid, libc::SIGHUP);
                }
                Some(Frame::Message(HostMessage::Closed(stream))) => match (stream, &process.err) {
                    (Stream::Err, Some(err)) => err.close(),
                    _ => process.out.close(),
                },
                Some(_) => return Err(io::Error::other("not a request to a process")),
            }
        }
    }
}

/// Tells how a process ended. Whoever asked for it comes last: when it has heard of
/// the main one's end, the machine is turned off.
fn say_to_all(hosts: &Mutex<Subscribers>, message: &GuestMessage) {
    let now = lock(hosts).hosts.clone();
    for host in now.iter().rev() {
        let _ = host.say(message);
    }
}

/// Sends what a process writes, until nobody writes any more; after its end, until there
/// is nothing more. What it left behind goes on, as what is without a host does: what
/// that writes is taken, and goes nowhere.
fn pump(
    output: &Output,
    stream: Stream,
    hosts: &Arc<Mutex<Subscribers>>,
    ended: &Arc<Event>,
) -> io::Result<JoinHandle<()>> {
    let (output, hosts, ended) = (output.clone(), hosts.clone(), ended.clone());
    thread::Builder::new().spawn(move || {
        let mut buffer = vec![0; DATA_MAX];
        loop {
            let len = match output.read(&mut buffer, ended.fd()) {
                Taken::Data(len) => len,
                Taken::End => break,
                Taken::Left => {
                    output.drain_apart();
                    break;
                }
            };
            let data = buffer.get(..len).unwrap_or_default();
            // Not under the lock: one that does not read holds up the others'
            // output for a while, but nobody who comes or goes.
            let now = lock(&hosts).hosts.clone();
            let gone = |host: &HostConnection| host.write(stream, data).is_err();
            let gone: Vec<HostConnection> = now.into_iter().filter(gone).collect();
            let mut subscribers = lock(&hosts);
            let here = |host: &HostConnection| !gone.iter().any(|it| it.is(host));
            subscribers.hosts.retain(here);
        }
    })
}

/// Writes what comes from the host to a process; nothing is the end of it.
fn feed(mut input: File, terminal: bool) -> io::Result<Sender<(Vec<u8>, HostConnection)>> {
    let (sender, receiver): (_, Receiver<(Vec<u8>, HostConnection)>) = mpsc::channel();
    thread::Builder::new().spawn(move || {
        let mut alive = true;
        for (data, host) in receiver {
            if data.is_empty() {
                if terminal {
                    // What a user types there.
                    let _ = input.write_all(&[END_OF_TRANSMISSION]);
                    continue;
                }
                return;
            }
            // A process that reads no more needs no more.
            alive = alive && input.write_all(&data).is_ok();
            let taken = u32::try_from(data.len()).unwrap_or(u32::MAX);
            // A host that has disconnected needs no answer.
            let _ = host.say(&GuestMessage::Taken(taken));
        }
    })?;
    Ok(sender)
}

/// Ctrl-D.
const END_OF_TRANSMISSION: u8 = 4;

/// What was read of a process's output.
enum Taken {
    /// That many bytes.
    Data(usize),
    /// Nothing, and there will be nothing.
    End,
    /// Nothing, though others than the process may write.
    Left,
}

/// Our end of what a process writes, until it is closed.
#[derive(Clone)]
struct Output {
    file: Arc<Mutex<Option<Arc<File>>>>,
    closed: Arc<Event>,
}

impl Output {
    fn new(file: File) -> io::Result<Self> {
        Ok(Output {
            file: Arc::new(Mutex::new(Some(Arc::new(file)))),
            closed: Arc::new(Event::new()?),
        })
    }

    fn close(&self) {
        *lock(&self.file) = None;
        self.closed.tell();
    }

    /// Reads on a thread of its own, for nobody, until nobody writes.
    fn drain_apart(&self) {
        let output = self.clone();
        // Without a thread, those that write get an error.
        let drain = move || {
            let mut buffer = vec![0; DATA_MAX];
            // What has ended is behind it.
            const NEVER: RawFd = -1;
            while let Taken::Data(_) = output.read(&mut buffer, NEVER) {}
        };
        let _ = thread::Builder::new().spawn(drain);
    }

    /// Waits for data.
    fn read(&self, buffer: &mut [u8], ended: RawFd) -> Taken {
        let mut over = false;
        loop {
            let Some(file) = lock(&self.file).clone() else {
                return Taken::End;
            };
            let entry = |fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            };
            // After the end, only what is there already.
            let mut entries = [
                entry(file.as_raw_fd()),
                entry(self.closed.fd()),
                entry(if over { -1 } else { ended }),
            ];
            let timeout = if over { 0 } else { -1 };
            // SAFETY: three live entries.
            let ready = unsafe { libc::poll(entries.as_mut_ptr(), 3, timeout) };
            if ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return Taken::End;
            }
            if entries[0].revents != 0 {
                return match (&*file).read(buffer) {
                    Ok(0) => Taken::End,
                    Ok(len) => Taken::Data(len),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    // A terminal that nobody has open any more.
                    Err(_) => Taken::End,
                };
            }
            if over {
                return Taken::Left;
            }
            over = entries[2].revents != 0;
        }
    }
}

/// Something that happens once, which threads wait for by `poll`.
struct Event {
    reader: io::PipeReader,
    writer: Mutex<Option<io::PipeWriter>>,
}

impl Event {
    fn new() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        Ok(Event {
            reader,
            writer: Mutex::new(Some(writer)),
        })
    }

    /// Readable, as it is at its end, from when it has happened.
    fn fd(&self) -> RawFd {
        self.reader.as_raw_fd()
    }

    fn tell(&self) {
        *lock(&self.writer) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use mayfly_protocol::agent::Exit;

    const SEND_TIMEOUT: Duration = Duration::from_millis(100);

    fn host() -> (HostConnection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (HostConnection::new(OwnedFd::from(ours).into()), theirs)
    }

    #[test]
    fn a_host_that_does_not_read_is_disconnected() {
        let (owner, reads) = host();
        let (attached, stalls) = host();
        attached.set_send_timeout(SEND_TIMEOUT).unwrap();
        let hosts = Subscribers::of(vec![owner, attached]);
        let (reader, mut writer) = io::pipe().unwrap();
        let output = Output::new(OwnedFd::from(reader).into()).unwrap();
        let ended = Arc::new(Event::new().unwrap());
        let pump = pump(&output, Stream::Out, &hosts, &ended).unwrap();
        const LEN: usize = 4 << 20;
        let process = thread::spawn(move || writer.write_all(&vec![7; LEN]));
        pumped(reads, LEN);
        process.join().unwrap().unwrap();
        pump.join().unwrap();
        assert_eq!(lock(&hosts).hosts.len(), 1);
        // It gets what was sent before, and then the end.
        io::copy(&mut &stalls, &mut io::sink()).unwrap();
    }

    /// Reads `len` bytes of what a process wrote, as its host.
    fn pumped(reads: UnixStream, len: usize) {
        let mut frames = Frames::new(reads);
        let mut read = 0;
        while read < len {
            match frames.frame::<GuestMessage>().unwrap() {
                Some(Frame::Data(Stream::Out, data)) => read += data.len(),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn what_a_process_left_behind_may_write_on() {
        let (owner, reads) = host();
        let hosts = Subscribers::of(vec![owner]);
        let (reader, mut writer) = io::pipe().unwrap();
        let output = Output::new(OwnedFd::from(reader).into()).unwrap();
        let ended = Arc::new(Event::new().unwrap());
        let pump = pump(&output, Stream::Out, &hosts, &ended).unwrap();
        writer.write_all(b"said").unwrap();
        pumped(reads, 4);
        ended.tell();
        // The host need not wait for it.
        pump.join().unwrap();
        drop((output, hosts));
        writer.write_all(&vec![7; 1 << 20]).unwrap();
    }

    #[test]
    fn a_process_whose_host_has_gone_goes_on() {
        let (owner, reads) = host();
        drop(reads);
        let hosts = Subscribers::of(vec![owner]);
        let (reader, mut writer) = io::pipe().unwrap();
        let output = Output::new(OwnedFd::from(reader).into()).unwrap();
        let ended = Arc::new(Event::new().unwrap());
        let pump = pump(&output, Stream::Out, &hosts, &ended).unwrap();
        writer.write_all(&vec![7; 1 << 20]).unwrap();
        drop(writer);
        pump.join().unwrap();
        // Unless the host said that nobody reads.
        let (reader, mut writer) = io::pipe().unwrap();
        let output = Output::new(OwnedFd::from(reader).into()).unwrap();
        output.close();
        assert!(writer.write_all(b"x").is_err());
    }

    #[test]
    fn who_asked_for_a_process_hears_of_its_end_last() {
        let (owner, reads) = host();
        let (attached, _stalls) = host();
        attached.set_send_timeout(SEND_TIMEOUT).unwrap();
        while attached.0.lock().unwrap().write(&[0; DATA_MAX]).is_ok() {}
        let hosts = Subscribers::of(vec![owner, attached]);
        let message = GuestMessage::Exited(Exit {
            status: 3,
            out_of_memory: false,
        });
        let start = Instant::now();
        let (theirs, said) = (hosts.clone(), message.clone());
        let speaker = thread::spawn(move || say_to_all(&theirs, &said));
        let heard: GuestMessage = Frames::new(reads).message().unwrap();
        assert_eq!(heard, message);
        assert!(start.elapsed() >= SEND_TIMEOUT / 2);
        speaker.join().unwrap();
    }
}
