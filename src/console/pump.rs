//! Moves the bytes between the guest's lines and the host.

use super::ends::{ConsoleFds, set_nonblocking};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use mayfly_devices::bus::lock;
use mayfly_devices::char_device::{CharDevice, TerminalSize};
use mayfly_devices::poll::ready;
use rustix::net::{RecvFlags, recv};
use vmm_sys_util::eventfd::EventFd;

use super::escape::{Escape, HELP, Request};
use super::tail::Tail;
use super::terminal;

/// A pipe that polls as writable takes this much without blocking.
const CHUNK: usize = libc::PIPE_BUF;
/// How many keys are held for a guest that does not take them, so that those for the
/// monitor are seen all the same: more than anybody pastes. The rest waits.
const HELD_MAX: usize = 1 << 20;
/// How many keys are read at once.
const KEYS_MAX: usize = 4096;
/// What a line moves before others have their turn: a guest that never stops
/// sending, and a reader that keeps up, would have it all.
const TURN: usize = 64 << 10;

/// How many clients are let in, or disconnected, before others have their turn.
const CLIENTS_TURN: usize = 64;

/// What came of looking for clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// There is a new one, and so there are new sources.
    pub client: bool,
    /// More may wait: it is to be called again.
    pub more: bool,
}

/// What came of moving bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pumped {
    /// All that could be moved was; something will tell of more.
    All,
    /// There is more: it is to be called again.
    More,
    /// The user wants out.
    Quit,
}

/// The guest's side of a console or a channel.
pub struct Connection {
    /// What it is, for messages.
    pub name: String,
    /// The guest's ends. In this order they give output; the last takes
    /// the input.
    pub lines: Vec<Arc<Mutex<dyn CharDevice>>>,
    /// They have output, or room for input.
    pub host_event: EventFd,
}

/// The host's side: where output goes, where input comes from.
#[derive(Default)]
pub struct Console {
    lines: Vec<Arc<Mutex<dyn CharDevice>>>,
    /// What the guest's side was told: that there is somebody, and its size.
    connected: bool,
    size: Option<TerminalSize>,
    /// What is over, such as a client: the event loop still watches it.
    left: Vec<File>,
    input: Option<File>,
    output: Option<File>,
    /// What it is, for messages.
    name: String,
    /// The user knows that output is lost.
    warned: bool,
    /// Output that its reader leaves lying may be lost.
    lossy: bool,
    escape: Option<Escape>,
    /// What the user may not have seen.
    tail: Option<Tail>,
    /// Keys that were read, to see if they are for the monitor, and that the
    /// guest does not take yet.
    held: VecDeque<u8>,
    listener: Option<UnixListener>,
}

impl Console {
    /// A console on what is the host's of it.
    pub fn new(connection: &Connection, ends: ConsoleFds) -> Self {
        Console {
            lines: connection.lines.clone(),
            name: connection.name.clone(),
            tail: ends.tail.then(Tail::default),
            escape: ends.keys.then(Escape::default),
            lossy: ends.lossy,
            input: ends.input,
            output: ends.output,
            listener: ends.listener,
            ..Console::default()
        }
    }

    /// The descriptors that wake [`Console::pump`] up. Those that epoll does
    /// not know, such as files, need no waking.
    pub fn sources(&self) -> impl Iterator<Item = RawFd> {
        let input = self.input.as_ref().map(File::as_raw_fd);
        let output = self.output.as_ref().map(File::as_raw_fd);
        let listener = self.listener.as_ref().map(UnixListener::as_raw_fd);
        [input, output, listener].into_iter().flatten()
    }

    /// Takes a waiting client, one at a time: others are disconnected. They wait
    /// for one that left, if the guest has not taken all that it sent.
    pub fn accept(&mut self) -> Accepted {
        let mut accepted = Accepted::default();
        for _ in 0..CLIENTS_TURN {
            let Some(listener) = &self.listener else {
                return accepted;
            };
            if self.is_leaving() {
                return accepted;
            }
            let Ok((client, _)) = listener.accept() else {
                return accepted;
            };
            accepted.client |= self.welcome(client);
        }
        accepted.more = true;
        accepted
    }

    fn welcome(&mut self, client: UnixStream) -> bool {
        let client = File::from(OwnedFd::from(client));
        if self.input.is_none()
            && set_nonblocking(&client).is_ok()
            && let Ok(output) = client.try_clone()
        {
            self.output = Some(output);
            self.input = Some(client);
            return true;
        }
        false
    }

    /// The client left, but not all that it sent was taken.
    fn is_leaving(&self) -> bool {
        let hung_up = |file: &File| ready(file.as_raw_fd(), 0, 0);
        self.input.as_ref().is_some_and(hung_up) || self.input.is_some() && self.output.is_none()
    }

    /// The descriptors that are no sources any more. They are open until these
    /// are dropped.
    pub fn take_left(&mut self) -> Vec<File> {
        std::mem::take(&mut self.left)
    }

    /// Moves what can be moved without blocking.
    pub fn pump(&mut self) -> Pumped {
        self.tell_size();
        self.tell_connected();
        let mut more = false;
        for line in self.lines.clone() {
            more |= self.pump_output(&*line);
        }
        let quit = match self.lines.last().cloned() {
            Some(line) => self.pump_input(&*line),
            None => false,
        };
        self.tell_connected();
        match (quit, more) {
            (true, _) => Pumped::Quit,
            (false, true) => Pumped::More,
            (false, false) => Pumped::All,
        }
    }

    /// Tells the guest's side the terminal's size, if it changed. A
    /// pseudo-terminal's other end may change it and does not say so: this is
    /// looked at whenever something moves.
    fn tell_size(&mut self) {
        let files = [&self.input, &self.output];
        let size = files.into_iter().flatten().find_map(terminal::size);
        if let (Some(size), Some(line)) = (size, self.lines.last())
            && self.size != Some(size)
        {
            self.size = Some(size);
            lock(line).resized(size);
        }
    }

    fn tell_connected(&mut self) {
        let connected = self.input.is_some() || self.output.is_some();
        if let Some(line) = self.lines.last()
            && self.connected != connected
        {
            self.connected = connected;
            lock(line).connected(connected);
        }
    }

    /// The client left, or closed its half: it gets nothing more.
    fn client_left(&mut self) {
        self.left.extend(self.input.take());
        self.left.extend(self.output.take());
    }

    /// Nobody reads any more, though there may be input; or a file is full, and
    /// may have room again.
    fn output_failed(&mut self, error: &io::Error) {
        if self.listener.is_some() || error.kind() == io::ErrorKind::BrokenPipe {
            self.left.extend(self.output.take());
        } else if !std::mem::replace(&mut self.warned, true) {
            log::warn!("{}: {error}; output is lost", self.name);
        }
    }

    /// True if it stopped though there may be more.
    fn pump_output(&mut self, line: &Mutex<dyn CharDevice>) -> bool {
        let mut chunk = [0; CHUNK];
        let mut moved = 0;
        while moved < TURN {
            let len = {
                let line = lock(line);
                let output = line.output();
                let len = output.len().min(CHUNK);
                chunk[..len].copy_from_slice(&output[..len]);
                len
            };
            if len == 0 {
                return false;
            }
            let done = match &mut self.output {
                None => len,
                Some(file) if !ready(file.as_raw_fd(), libc::POLLOUT, 0) => {
                    if self.lossy {
                        len
                    } else {
                        return false;
                    }
                }
                Some(file) => match file.write(&chunk[..len]) {
                    Ok(written) => written,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                    // A terminal may be ready for less than it is given.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        if self.lossy {
                            len
                        } else {
                            return false;
                        }
                    }
                    Err(error) => {
                        self.output_failed(&error);
                        len // the guest goes on
                    }
                },
            };
            if let Some(tail) = &mut self.tail {
                tail.push(&chunk[..done]);
            }
            lock(line).output_done(done);
            moved += done;
        }
        true
    }

    fn pump_input(&mut self, line: &Mutex<dyn CharDevice>) -> bool {
        loop {
            let room = lock(line).input_room();
            let deliver: Vec<u8> = self.held.drain(..room.min(self.held.len())).collect();
            lock(line).input(&deliver);
            let room = room - deliver.len();
            let want = if self.escape.is_some() {
                KEYS_MAX.min(HELD_MAX.saturating_sub(self.held.len()))
            } else {
                room
            };
            let Some(file) = &mut self.input else {
                return false;
            };
            if !ready(file.as_raw_fd(), libc::POLLIN, 0) {
                return false;
            }
            if want == 0 {
                if self.listener.is_some() && is_over(file) {
                    self.client_left();
                }
                return false;
            }
            let mut data = vec![0; want];
            match file.read(&mut data) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Ok(0) | Err(_) => {
                    match self.listener {
                        Some(_) => self.client_left(),
                        None => self.left.extend(self.input.take()),
                    }
                    return false;
                }
                Ok(len) => data.truncate(len),
            }
            let Some(escape) = &mut self.escape else {
                lock(line).input(&data);
                continue;
            };
            match escape.filter(&mut data) {
                Some(Request::Quit) => return true,
                Some(Request::Help) => drop(write!(io::stderr(), "{HELP}")),
                None => {}
            }
            self.held.extend(data);
        }
    }

    /// The guest's last lines, if they went where the user may not see them.
    pub fn last_lines(&self) -> Vec<String> {
        self.tail.as_ref().map(Tail::lines).unwrap_or_default()
    }

    /// Passes on what is left at the end; waits for a slow reader, not for ever.
    pub fn flush(&mut self) {
        const TIMEOUT_MS: i32 = 2000;
        for line in self.lines.clone() {
            loop {
                let _ = self.pump_output(&*line);
                let Some(file) = &self.output else { return };
                if lock(&line).output().is_empty()
                    || !ready(file.as_raw_fd(), libc::POLLOUT, TIMEOUT_MS)
                {
                    break;
                }
            }
        }
    }
}

/// A socket's peer left, or closed its half, and all that it sent was taken.
fn is_over(socket: &File) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    recv(socket, &mut [0; 1], flags) == Ok((0, 0))
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::super::ends::HostConsole;
    use super::*;
    use crate::config::HostEnd;
    use crate::unix_socket;

    /// A guest that always has more to say.
    struct Endless;

    impl CharDevice for Endless {
        fn output(&self) -> &[u8] {
            &[b'x'; CHUNK]
        }
        fn output_done(&mut self, _: usize) {}
        fn input_room(&self) -> usize {
            0
        }
        fn input(&mut self, _: &[u8]) {}
    }

    /// A guest that takes as many bytes as it has room for, and writes some.
    #[derive(Default)]
    struct Slow {
        room: usize,
        got: Vec<u8>,
        says: Vec<u8>,
    }

    impl Slow {
        fn with_room(room: usize) -> Self {
            Slow {
                room,
                ..Default::default()
            }
        }
    }

    impl CharDevice for Slow {
        fn output(&self) -> &[u8] {
            &self.says
        }
        fn output_done(&mut self, count: usize) {
            self.says.drain(..count);
        }
        fn input_room(&self) -> usize {
            self.room
        }
        fn input(&mut self, data: &[u8]) {
            self.room -= data.len();
            self.got.extend(data);
        }
    }

    #[test]
    fn what_is_over_is_handed_to_who_watches_it() {
        let (input, writer) = io::pipe().unwrap();
        let (reader, output) = io::pipe().unwrap();
        let fds = [input.as_raw_fd(), output.as_raw_fd()];
        let mut console = endless(Console {
            input: Some(File::from(OwnedFd::from(input))),
            output: Some(File::from(OwnedFd::from(output))),
            ..Default::default()
        });
        let left = |console: &mut Console| {
            let left = console.take_left();
            left.iter().map(File::as_raw_fd).collect::<Vec<_>>()
        };
        drop(reader);
        console.pump();
        assert_eq!(left(&mut console), [fds[1]]);
        drop(writer);
        console.lines = vec![Arc::new(Mutex::new(Slow::with_room(1)))];
        console.pump();
        assert_eq!(left(&mut console), [fds[0]]);
    }

    #[test]
    fn what_a_client_sent_before_it_left_arrives() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (listener, _name) = unix_socket::listen(&path, "--x").unwrap();
        let line = Arc::new(Mutex::new(Slow::with_room(10)));
        let mut console = Console {
            lines: vec![line.clone()],
            listener: Some(listener),
            ..Console::default()
        };
        let mut client = UnixStream::connect(&path).unwrap();
        console.accept();
        client.write_all(&[7; 25]).unwrap();
        drop(client);
        for got in [10, 20, 25] {
            lock(&line).says = b"ok".to_vec();
            console.pump();
            assert_eq!(lock(&line).got, vec![7; got]);
            assert!(lock(&line).says.is_empty());
            lock(&line).room = 10;
        }
        console.pump();
        assert!(console.input.is_none() && console.output.is_none());
    }

    #[test]
    fn a_paste_waits_for_the_guest_and_keys_of_the_monitor_do_not() {
        let (input, mut keys) = io::pipe().unwrap();
        let line = Arc::new(Mutex::new(Slow::default()));
        let mut console = Console {
            lines: vec![line.clone()],
            input: Some(File::from(OwnedFd::from(input))),
            escape: Some(Escape::default()),
            ..Console::default()
        };
        let paste: Vec<u8> = (0..HELD_MAX + 30_000)
            .map(|it| (it % 251) as u8 + 2)
            .collect();
        let typed = paste.clone();
        let typist = std::thread::spawn(move || {
            keys.write_all(&typed).unwrap();
            keys
        });
        // The guest takes nothing for a while, and then some at a time.
        while console.held.len() < HELD_MAX {
            assert_eq!(console.pump(), Pumped::All);
        }
        while lock(&line).got.len() < paste.len() {
            lock(&line).room = 5_000;
            assert_eq!(console.pump(), Pumped::All);
        }
        assert!(lock(&line).got == paste);
        let mut keys = typist.join().unwrap();
        lock(&line).room = 0;
        keys.write_all(b"not taken\x01x").unwrap();
        assert_eq!(console.pump(), Pumped::Quit);
    }

    #[test]
    fn the_next_client_waits_for_one_that_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (listener, _name) = unix_socket::listen(&path, "--x").unwrap();
        let line = Arc::new(Mutex::new(Slow::default()));
        let mut console = Console {
            lines: vec![line.clone()],
            listener: Some(listener),
            ..Console::default()
        };
        // Which said nothing, while the guest does not listen …
        let first = UnixStream::connect(&path).unwrap();
        assert!(console.accept().client);
        console.pump();
        drop(first);
        console.pump();
        // … or something.
        let mut second = UnixStream::connect(&path).unwrap();
        assert!(console.accept().client);
        second.write_all(b"second").unwrap();
        drop(second);
        console.pump();
        let mut third = UnixStream::connect(&path).unwrap();
        third.write_all(b"third").unwrap();
        assert!(!console.accept().client);
        lock(&line).room = 100;
        console.pump();
        assert!(console.accept().client);
        console.pump();
        assert_eq!(lock(&line).got, b"secondthird");
        // Beside one that is there, others are disconnected.
        let mut fourth = UnixStream::connect(&path).unwrap();
        assert!(!console.accept().client);
        assert_eq!(fourth.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn clients_without_end_leave_others_their_turn() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (listener, _name) = unix_socket::listen(&path, "--x").unwrap();
        let mut console = Console {
            listener: Some(listener),
            ..Console::default()
        };
        let clients: Vec<_> = (0..CLIENTS_TURN + 1)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        let [first, second] = [(); 2].map(|()| console.accept());
        assert!(first.client && first.more);
        assert!(!second.client && !second.more);
        let last = clients.last().unwrap();
        assert_eq!((&*last).read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_file_without_room_is_kept() {
        let line = Arc::new(Mutex::new(Slow::default()));
        let mut console = Console {
            lines: vec![line.clone()],
            output: Some(OpenOptions::new().write(true).open("/dev/full").unwrap()),
            ..Default::default()
        };
        for _ in 0..2 {
            lock(&line).says = b"lost".to_vec();
            console.pump();
            assert!(lock(&line).says.is_empty());
            assert!(console.output.is_some() && console.warned);
        }
    }

    fn endless(console: Console) -> Console {
        Console {
            lines: vec![Arc::new(Mutex::new(Endless))],
            ..console
        }
    }

    #[test]
    fn a_terminal_that_nobody_reads_blocks_nobody() {
        let opened = HostConsole::open(&HostEnd::Pty, "console", "--console").unwrap();
        let connection = Connection {
            name: "console".into(),
            lines: Vec::new(),
            host_event: EventFd::new(0).unwrap(),
        };
        let mut console = endless(Console::new(&connection, opened.fds.unwrap()));
        for _ in 0..10 {
            assert_eq!(console.pump(), Pumped::More); // it loses output
        }
    }

    #[test]
    fn a_reader_that_keeps_up_leaves_others_their_turn() {
        let output = OpenOptions::new().write(true).open("/dev/null").unwrap();
        let mut console = endless(Console {
            output: Some(output),
            ..Default::default()
        });
        assert_eq!(console.pump(), Pumped::More);
    }

    #[test]
    fn a_slow_reader_stops_the_output() {
        let (reader, writer) = io::pipe().unwrap();
        let mut console = endless(Console {
            output: Some(File::from(OwnedFd::from(writer))),
            ..Default::default()
        });
        while console.pump() == Pumped::More {}
        assert_eq!(console.pump(), Pumped::All);
        drop(reader);
    }
}
