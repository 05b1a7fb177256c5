//! The socket's side in the VM's process: a thread that accepts, and one for
//! each client. A client may send anything, and may stop reading.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use mayfly_devices::poll::{entry, poll};

use super::protocol::{Command, Event, Reply};
use crate::unix_socket::Name;

/// More clients at a time are disconnected.
const CLIENTS_MAX: usize = 16;
/// A longer line is no command.
const LINE_MAX: u64 = 16 << 10;
/// A client that takes longer to read a line loses its connection …
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// … as does one that takes longer to say what it wants.
const FIRST_TIMEOUT: Duration = Duration::from_secs(10);
/// The event loop answers at once, unless it is stuck.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Events that a slow client may lag behind; then it is let go.
const EVENTS_MAX: usize = 256;
/// What the end of the VM waits for clients to be told of it.
const GRACE_PERIOD: Duration = Duration::from_millis(500);
const STACK: usize = 256 << 10;

/// A command, and where its answer goes.
#[derive(Debug)]
pub struct Ask {
    /// What is asked.
    pub command: Command,
    /// Takes one answer.
    pub reply: SyncSender<Reply>,
    /// For [`Command::Events`].
    pub subscriber: Option<Subscriber>,
}

/// Someone who wants all events.
#[derive(Debug)]
pub struct Subscriber {
    events: SyncSender<Event>,
    here: Weak<()>,
}

/// Where they arrive.
pub struct Subscription {
    events: Receiver<Event>,
    _here: Arc<()>,
}

#[cfg(test)]
impl Subscription {
    /// All that came until nobody could tell more.
    pub fn all(self) -> Vec<Event> {
        self.events.iter().collect()
    }
}

impl Subscriber {
    /// Both ends.
    pub fn new() -> (Self, Subscription) {
        let (events, receiver) = mpsc::sync_channel(EVENTS_MAX);
        let here = Arc::new(());
        let subscriber = Subscriber {
            events,
            here: Arc::downgrade(&here),
        };
        let subscription = Subscription {
            events: receiver,
            _here: here,
        };
        (subscriber, subscription)
    }

    /// False if it has left, or lags behind too far.
    pub fn tell(&self, event: Event) -> bool {
        self.events.try_send(event).is_ok()
    }

    /// It has not left.
    pub fn is_here(&self) -> bool {
        self.here.strong_count() > 0
    }
}

/// The clients of now.
#[derive(Default)]
struct Clients {
    counts: Mutex<Counts>,
    fewer: Condvar,
}

#[derive(Default)]
struct Counts {
    connected: usize,
    /// Those that wait for an answer or an event.
    waiting: usize,
}

impl Clients {
    fn enter(self: &Arc<Self>) -> Option<Entry> {
        let mut counts = self.lock();
        if counts.connected >= CLIENTS_MAX {
            return None;
        }
        counts.connected += 1;
        Some(Entry(self.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client that is connected.
struct Entry(Arc<Clients>);

impl Entry {
    fn wait(&self) -> Waiting<'_> {
        self.0.lock().waiting += 1;
        Waiting(&self.0)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.0.lock().connected -= 1;
    }
}

/// A client that waits.
struct Waiting<'a>(&'a Clients);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.lock().waiting -= 1;
        self.0.fewer.notify_all();
    }
}

/// The server. Its threads end with the process; the socket with this.
pub struct Server {
    _name: Name,
    clients: Arc<Clients>,
}

impl Server {
    /// Serves clients, whose commands go to `ask`.
    pub fn start(
        listener: UnixListener,
        name: Name,
        ask: impl Fn(Ask) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let clients = Arc::new(Clients::default());
        let (ask, entries) = (Arc::new(ask), clients.clone());
        listener.set_nonblocking(false)?;
        spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else {
                    // Out of descriptors, most likely; they come back.
                    thread::sleep(Duration::from_millis(100));
                    continue;
                };
                let Some(entry) = entries.enter() else {
                    let _ = say(&client, &Reply::Error("too many clients".into()));
                    continue;
                };
                let ask = ask.clone();
                // Without a thread, the client is disconnected.
                let _ = spawn(move || {
                    let _ = serve(&client, &entry, &*ask, FIRST_TIMEOUT);
                });
            }
        })?;
        Ok(Server {
            _name: name,
            clients,
        })
    }

    /// Gives clients a moment to be told of the end. What they wait for must
    /// be answered or dropped already.
    pub fn close(self) {
        let waiting = |counts: &mut Counts| counts.waiting > 0;
        let clients = &self.clients;
        let _ = clients
            .fewer
            .wait_timeout_while(clients.lock(), GRACE_PERIOD, waiting);
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new().name("control".into());
    thread.stack_size(STACK).spawn(work).map(drop)
}

fn say(client: &UnixStream, line: &impl serde::Serialize) -> io::Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    let mut client = client;
    client.write_all(text.as_bytes())
}

fn serve(client: &UnixStream, entry: &Entry, ask: &dyn Fn(Ask), first: Duration) -> io::Result<()> {
    client.set_write_timeout(Some(WRITE_TIMEOUT))?;
    client.set_read_timeout(Some(first))?;
    let mut reader = BufReader::new(client);
    loop {
        let mut line = Vec::new();
        let len = (&mut reader).take(LINE_MAX).read_until(b'\n', &mut line)?;
        if len == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') && len as u64 == LINE_MAX {
            return say(client, &Reply::Error("the line is too long".into()));
        }
        let command = match serde_json::from_slice(&line) {
            Ok(command) => command,
            Err(error) => {
                say(client, &Reply::Error(format!("not a command: {error}")))?;
                continue;
            }
        };
        // It may have more to say, and nobody knows when.
        client.set_read_timeout(None)?;
        let _waiting = entry.wait();
        let (reply, answer) = mpsc::sync_channel(1);
        let mut events = None;
        let subscriber = (command == Command::Events {}).then(|| {
            let (subscriber, subscription) = Subscriber::new();
            events = Some(subscription);
            subscriber
        });
        ask(Ask {
            command,
            reply,
            subscriber,
        });
        let answer = match answer.recv_timeout(ANSWER_TIMEOUT) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) => Reply::Error("the VM has ended".into()),
            Err(RecvTimeoutError::Timeout) => Reply::Error("the VM does not answer".into()),
        };
        say(client, &answer)?;
        if let Some(events) = events {
            return tell(client, &events.events);
        }
    }
}

/// Passes events on until the VM ends, or the client does.
fn tell(client: &UnixStream, events: &Receiver<Event>) -> io::Result<()> {
    const LOOK: Duration = Duration::from_secs(5);
    loop {
        match events.recv_timeout(LOOK) {
            Ok(event) => say(client, &event)?,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) if gone(client) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// The client hung up.
fn gone(client: &UnixStream) -> bool {
    let mut entries = [entry(client.as_raw_fd(), 0)];
    let ready = poll(&mut entries, 0).is_ok_and(|ready| ready > 0);
    ready
        && entries
            .iter()
            .any(|entry| entry.revents & libc::POLLHUP != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::folder::Folder;

    fn start() -> (tempfile::TempDir, Server, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let (listener, name) = Folder::at(&path).listen("vm").unwrap();
        let place = path.join("vm.sock");
        let server = Server::start(listener, name, |ask: Ask| {
            if let Some(subscriber) = ask.subscriber {
                ask.reply.send(Reply::done()).unwrap();
                assert!(subscriber.tell(Event::now("one", None)));
            } else if ask.command != (Command::Nmi {}) {
                let text = format!("{:?}", ask.command);
                ask.reply.send(Reply::Ok(text.into())).unwrap();
            }
        })
        .unwrap();
        (folder, server, place)
    }

    fn lines(stream: &UnixStream) -> std::io::Lines<BufReader<UnixStream>> {
        BufReader::new(stream.try_clone().unwrap()).lines()
    }

    #[test]
    fn garbage_is_refused_and_the_next_line_served() {
        let (_folder, _server, place) = start();
        let mut stream = UnixStream::connect(&place).unwrap();
        let mut answers = lines(&stream);
        let deep = format!(
            "{{\"command\":\"limit\",\"limits\":{}\n",
            "[".repeat(10_000)
        );
        for garbage in [
            &b"hello\n"[..],
            b"\xff\xfe\x00\n",
            b"\n",
            b"{\"command\":7}\n",
            deep.as_bytes(),
        ] {
            stream.write_all(garbage).unwrap();
            let answer = answers.next().unwrap().unwrap();
            assert!(answer.starts_with(r#"{"error":"not a command"#), "{answer}");
        }
        stream.write_all(b"{\"command\":\"pause\"}\n").unwrap();
        assert_eq!(answers.next().unwrap().unwrap(), r#"{"ok":"Pause"}"#);
        // Dropped without an answer.
        stream.write_all(b"{\"command\":\"nmi\"}\n").unwrap();
        assert!(answers.next().unwrap().unwrap().contains("has ended"));
        stream.write_all(&vec![b'x'; LINE_MAX as usize]).unwrap();
        assert!(answers.next().unwrap().unwrap().contains("too long"));
        assert!(answers.next().is_none());
    }

    #[test]
    fn only_so_many_clients_at_a_time() {
        let (_folder, _server, place) = start();
        let ask = |mut stream: &UnixStream| {
            stream.write_all(b"{\"command\":\"info\"}\n")?;
            lines(stream).next().unwrap_or(Ok(String::new()))
        };
        let streams: Vec<_> = (0..CLIENTS_MAX)
            .map(|_| UnixStream::connect(&place).unwrap())
            .collect();
        for stream in &streams {
            assert!(ask(stream).unwrap().contains("Info"));
        }
        let one_more = UnixStream::connect(&place).unwrap();
        let refused = lines(&one_more).next().unwrap().unwrap();
        assert!(refused.contains("too many clients"), "{refused}");
        drop(streams);
        let answered = || {
            let stream = UnixStream::connect(&place).unwrap();
            ask(&stream).is_ok_and(|answer| answer.contains("Info"))
        };
        while !answered() {
            thread::yield_now();
        }
    }

    #[test]
    fn a_client_that_says_nothing_is_disconnected() {
        let clients = Arc::new(Clients::default());
        let first = Duration::from_millis(20);
        let ask = |ask: Ask| ask.reply.send(Reply::done()).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let entry = clients.enter().unwrap();
        assert!(serve(&ours, &entry, &ask, first).is_err());
        // With its first command it has all the time.
        theirs.write_all(b"{\"command\":\"pause\"}\n").unwrap();
        thread::scope(|scope| {
            let serving = scope.spawn(|| serve(&ours, &entry, &ask, first));
            thread::sleep(5 * first);
            assert!(!serving.is_finished());
            drop(theirs);
            let _ = serving.join().unwrap();
        });
    }

    #[test]
    fn a_subscriber_that_left_is_known_to_have() {
        let (subscriber, subscription) = Subscriber::new();
        assert!(subscriber.is_here());
        for _ in 0..EVENTS_MAX {
            assert!(subscriber.tell(Event::now("some", None)));
        }
        assert!(!subscriber.tell(Event::now("too many", None)));
        drop(subscription);
        assert!(!subscriber.is_here());
    }

    #[test]
    fn events_follow_until_the_end_and_the_socket_goes() {
        let (_folder, server, place) = start();
        let mut stream = UnixStream::connect(&place).unwrap();
        stream.write_all(b"{\"command\":\"events\"}\n").unwrap();
        let got: Vec<_> = lines(&stream).map(Result::unwrap).collect();
        assert_eq!(got[0], r#"{"ok":null}"#);
        let event: Event = serde_json::from_str(&got[1]).unwrap();
        assert_eq!((event.event.as_str(), got.len()), ("one", 2));
        server.close();
        assert!(!place.exists());
    }
}
