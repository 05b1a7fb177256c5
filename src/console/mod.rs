//! The host's side of the guest's serial console.

mod escape;
mod tail;
mod terminal;

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use mayfly_devices::bus::lock;
use mayfly_devices::serial::Serial;

use crate::config::ConsoleConfig;
use crate::failure::{Failure, OrFail};
use escape::{Escape, HELP, Request};
use tail::Tail;
use terminal::RawTerminal;

/// A pipe that polls as writable takes this much without blocking.
const CHUNK: usize = libc::PIPE_BUF;
/// How many keys are held for a guest that does not take them; then keys are
/// lost, as on any terminal.
const HELD_MAX: usize = 4096;

/// The host's side: where output goes, where input comes from.
#[derive(Default)]
pub struct Console {
    input: Option<File>,
    output: Option<File>,
    /// Output that its reader leaves lying may be lost.
    lossy: bool,
    escape: Option<Escape>,
    /// What the user may not have seen.
    tail: Option<Tail>,
    /// Keys that were read, to see if they are for the monitor, and that the
    /// guest does not take yet.
    held: VecDeque<u8>,
    listener: Option<UnixListener>,
    _socket: Option<SocketFile>,
    _terminal: Option<RawTerminal>,
    /// Keeps a pseudo-terminal from hanging up while nobody has it open.
    _slave: Option<File>,
}

/// A socket's name, removed with it.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Console {
    /// Opens what the user chose. Called last of all that can fail: it creates
    /// files, and changes the terminal.
    pub fn open(config: &ConsoleConfig) -> Result<Self, Failure> {
        let mut console = Console::of(config)?;
        console.tail = (*config != ConsoleConfig::Stdio).then(Tail::default);
        Ok(console)
    }

    fn of(config: &ConsoleConfig) -> Result<Self, Failure> {
        match config {
            ConsoleConfig::None => Ok(Console::default()),
            ConsoleConfig::Stdio => Console::stdio().or_host("--console stdio"),
            ConsoleConfig::File(path) => {
                let file = OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(path)
                    .or_host(format_args!("--console file={}", path.display()))?;
                Ok(Console {
                    output: Some(file),
                    ..Default::default()
                })
            }
            ConsoleConfig::Pty => Console::pty().or_host("--console pty"),
            ConsoleConfig::Unix(path) => Console::unix(path),
        }
    }

    fn stdio() -> io::Result<Self> {
        let input = duplicate(libc::STDIN_FILENO).ok(); // may be closed
        let output = duplicate(libc::STDOUT_FILENO).ok();
        let terminal = match &input {
            Some(input) => RawTerminal::new(input)?,
            None => None,
        };
        Ok(Console {
            escape: terminal.as_ref().map(|_| Escape::default()),
            input,
            output,
            _terminal: terminal,
            ..Default::default()
        })
    }

    fn pty() -> io::Result<Self> {
        let (mut master, mut slave) = (-1, -1);
        let null = std::ptr::null_mut();
        // SAFETY: writes two descriptors; the other arguments may be null.
        if unsafe { libc::openpty(&mut master, &mut slave, null, null as _, null as _) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: two new descriptors, that nothing else owns.
        let (master, slave) =
            unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        let slave = File::from(slave);
        let name = std::fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd()))?;
        let input = File::from(master);
        // The guest's own terminal echoes and edits.
        make_raw(&slave)?;
        eprintln!("mayfly: console is {}", name.display());
        Ok(Console {
            output: Some(input.try_clone()?),
            input: Some(input),
            lossy: true,
            _slave: Some(slave),
            ..Default::default()
        })
    }

    fn unix(path: &Path) -> Result<Self, Failure> {
        let flag = format!("--console unix={}", path.display());
        if let Ok(metadata) = path.symlink_metadata() {
            if !metadata.file_type().is_socket() || UnixStream::connect(path).is_ok() {
                return Err(Failure::config(format!(
                    "{flag}: exists already; remove it or choose another name"
                )));
            }
            // Left by one that was killed: nobody listens.
            std::fs::remove_file(path).or_host(&flag)?;
        }
        let listener = UnixListener::bind(path).or_host(&flag)?;
        let socket = SocketFile(path.to_owned());
        listener.set_nonblocking(true).or_host(&flag)?;
        Ok(Console {
            listener: Some(listener),
            _socket: Some(socket),
            ..Default::default()
        })
    }

    /// The descriptors that wake [`Console::pump`] up. Those that epoll does
    /// not know, such as files, need no waking.
    pub fn sources(&self) -> impl Iterator<Item = RawFd> {
        let input = self.input.as_ref().map(File::as_raw_fd);
        let output = self.output.as_ref().map(File::as_raw_fd);
        let listener = self.listener.as_ref().map(UnixListener::as_raw_fd);
        [input, output, listener].into_iter().flatten()
    }

    /// Takes a waiting client; true if the sources changed.
    pub fn accept(&mut self) -> bool {
        let Some(Ok((client, _))) = self.listener.as_ref().map(UnixListener::accept) else {
            return false;
        };
        let client = File::from(OwnedFd::from(client));
        match (self.input.is_none(), client.try_clone()) {
            (true, Ok(output)) => {
                self.output = Some(output);
                self.input = Some(client);
                true
            }
            _ => false, // one at a time: this one is hung up on
        }
    }

    /// Moves what can be moved without blocking. True if the user wants out.
    pub fn pump(&mut self, serial: &Mutex<Serial>) -> bool {
        self.pump_output(serial);
        self.pump_input(serial)
    }

    fn pump_output(&mut self, serial: &Mutex<Serial>) {
        let mut chunk = [0; CHUNK];
        loop {
            let len = {
                let serial = lock(serial);
                let output = serial.output();
                let len = output.len().min(CHUNK);
                chunk[..len].copy_from_slice(&output[..len]);
                len
            };
            if len == 0 {
                return;
            }
            let done = match &mut self.output {
                None => len,
                Some(file) if !ready(file.as_raw_fd(), libc::POLLOUT) => {
                    if self.lossy {
                        len
                    } else {
                        return;
                    }
                }
                Some(file) => match file.write(&chunk[..len]) {
                    Ok(written) => written,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                    Err(_) => {
                        // Nobody reads any more; the guest goes on.
                        self.output = None;
                        len
                    }
                },
            };
            if let Some(tail) = &mut self.tail {
                tail.push(&chunk[..done]);
            }
            lock(serial).output_done(done);
        }
    }

    fn pump_input(&mut self, serial: &Mutex<Serial>) -> bool {
        loop {
            let room = lock(serial).input_room();
            let deliver: Vec<u8> = self.held.drain(..room.min(self.held.len())).collect();
            lock(serial).input(&deliver);
            let room = room - deliver.len();
            let want = if self.escape.is_some() {
                HELD_MAX
            } else {
                room
            };
            let Some(file) = &mut self.input else {
                return false;
            };
            if want == 0 || !ready(file.as_raw_fd(), libc::POLLIN) {
                return false;
            }
            let mut data = vec![0; want];
            match file.read(&mut data) {
                Ok(0) | Err(_) => {
                    self.input = None;
                    if self.listener.is_some() {
                        self.output = None;
                    }
                    return false;
                }
                Ok(len) => data.truncate(len),
            }
            let Some(escape) = &mut self.escape else {
                lock(serial).input(&data);
                continue;
            };
            match escape.filter(&mut data) {
                Some(Request::Quit) => return true,
                Some(Request::Help) => eprint!("{HELP}"),
                None => {}
            }
            let space = HELD_MAX - self.held.len();
            self.held.extend(data.iter().take(space));
        }
    }

    /// The guest's last lines, if they went where the user may not see them.
    pub fn last_lines(&self) -> Vec<String> {
        self.tail.as_ref().map(Tail::lines).unwrap_or_default()
    }

    /// Passes on what is left at the end; waits for a slow reader, not for ever.
    pub fn flush(&mut self, serial: &Mutex<Serial>) {
        const PATIENCE_MS: i32 = 2000;
        loop {
            self.pump_output(serial);
            let Some(file) = &self.output else { return };
            if lock(serial).output().is_empty()
                || !poll(file.as_raw_fd(), libc::POLLOUT, PATIENCE_MS)
            {
                return;
            }
        }
    }
}

fn duplicate(fd: RawFd) -> io::Result<File> {
    // SAFETY: the descriptor is only borrowed for this call.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    fd.try_clone_to_owned().map(File::from)
}

fn make_raw(terminal: &File) -> io::Result<()> {
    let mut settings = std::mem::MaybeUninit::<libc::termios>::uninit();
    let fd = terminal.as_raw_fd();
    // SAFETY: fills in the structure, or fails.
    if unsafe { libc::tcgetattr(fd, settings.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above succeeded.
    let mut settings = unsafe { settings.assume_init() };
    // SAFETY: changes a live structure.
    unsafe { libc::cfmakeraw(&mut settings) };
    // SAFETY: reads a live structure.
    match unsafe { libc::tcsetattr(fd, libc::TCSANOW, &settings) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn ready(fd: RawFd, events: libc::c_short) -> bool {
    poll(fd, events, 0)
}

/// True if the descriptor is ready, or broken: then the operation will tell.
fn poll(fd: RawFd, events: libc::c_short, timeout_ms: i32) -> bool {
    let mut entry = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: one live entry.
    unsafe { libc::poll(&mut entry, 1, timeout_ms) > 0 }
}
