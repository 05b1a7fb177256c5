//! What a console or a channel has of the host: opened by the supervisor, moved by the
//! VMM process.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use serde::{Deserialize, Serialize};

use super::terminal::RawTerminal;
use crate::config::HostEnd;
use crate::failure::{Failure, OrFail};
use crate::unix_socket::{self, Name};

/// Where output goes, where input comes from.
#[derive(Default)]
pub struct ConsoleFds {
    /// From the host.
    pub input: Option<File>,
    /// To the host.
    pub output: Option<File>,
    /// Where clients come, who then are both.
    pub listener: Option<UnixListener>,
    /// Output that its reader leaves lying may be lost.
    pub lossy: bool,
    /// The input is a user's keys, some of which are for the monitor.
    pub keys: bool,
    /// The last lines of the output are kept.
    pub tail: bool,
}

/// What [`ConsoleFds`] are without their files.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ConsoleFlags {
    input: bool,
    output: bool,
    listener: bool,
    lossy: bool,
    keys: bool,
    tail: bool,
}

impl ConsoleFds {
    /// What these are, and their files.
    pub fn into_parts(self) -> (ConsoleFlags, Vec<OwnedFd>) {
        let flags = ConsoleFlags {
            input: self.input.is_some(),
            output: self.output.is_some(),
            listener: self.listener.is_some(),
            lossy: self.lossy,
            keys: self.keys,
            tail: self.tail,
        };
        let files = [self.input, self.output].into_iter().flatten();
        let files = files.map(OwnedFd::from);
        let all = files.chain(self.listener.map(OwnedFd::from)).collect();
        (flags, all)
    }

    /// Puts them together again, taking as many files as they have.
    pub fn from_parts(flags: ConsoleFlags, files: &mut impl Iterator<Item = OwnedFd>) -> Self {
        let mut next = |there: bool| there.then(|| files.next()).flatten();
        ConsoleFds {
            input: next(flags.input).map(File::from),
            output: next(flags.output).map(File::from),
            listener: next(flags.listener).map(UnixListener::from),
            lossy: flags.lossy,
            keys: flags.keys,
            tail: flags.tail,
        }
    }
}

/// The ends, and what lasts as long as they do.
#[derive(Default)]
pub struct HostConsole {
    /// For who moves the bytes.
    pub fds: Option<ConsoleFds>,
    _name: Option<Name>,
    _terminal: Option<RawTerminal>,
    /// Keeps a pseudo-terminal from hanging up while nobody has it open.
    _slave: Option<File>,
}

impl HostConsole {
    /// Opens what the user chose. Called last of all that can fail: it creates
    /// files, and changes the terminal.
    pub fn open(end: &HostEnd, what: &str, flag: &str) -> Result<Self, Failure> {
        match end {
            HostEnd::None => Ok(HostConsole::of(ConsoleFds::default())),
            HostEnd::Stdio => HostConsole::stdio().or_host(flag),
            HostEnd::File(path) => {
                let file = OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(path)
                    .or_host(flag)?;
                Ok(HostConsole::of(ConsoleFds {
                    output: Some(file),
                    ..ConsoleFds::default()
                }))
            }
            HostEnd::Pty => HostConsole::pty(what).or_host(flag),
            HostEnd::Unix(path) => HostConsole::unix(path, flag),
        }
    }

    fn of(ends: ConsoleFds) -> Self {
        HostConsole {
            fds: Some(ends),
            ..HostConsole::default()
        }
    }

    fn stdio() -> io::Result<Self> {
        let input = duplicate(io::stdin()).ok(); // may be closed
        let output = duplicate(io::stdout()).ok().map(nonblocking);
        let terminal = match &input {
            Some(input) => RawTerminal::new(input)?,
            None => None,
        };
        let ends = ConsoleFds {
            keys: terminal.is_some(),
            input,
            output,
            ..ConsoleFds::default()
        };
        Ok(HostConsole {
            _terminal: terminal,
            ..HostConsole::of(ends)
        })
    }

    fn pty(what: &str) -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave = File::from(ioctl_tiocgptpeer(&master, flags)?);
        let name = std::fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd()))?;
        let input = File::from(master);
        set_nonblocking(&input)?;
        // The guest's own terminal echoes and edits.
        make_raw(&slave)?;
        eprintln!("mayfly: {what} is {}", name.display());
        Ok(HostConsole {
            _slave: Some(slave),
            ..HostConsole::of(ConsoleFds {
                output: Some(input.try_clone()?),
                input: Some(input),
                lossy: true,
                ..ConsoleFds::default()
            })
        })
    }

    fn unix(path: &Path, flag: &str) -> Result<Self, Failure> {
        let (listener, name) = unix_socket::listen(path, flag)?;
        Ok(HostConsole {
            _name: Some(name),
            ..HostConsole::of(ConsoleFds {
                listener: Some(listener),
                ..ConsoleFds::default()
            })
        })
    }
}

pub(super) fn set_nonblocking(file: &File) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags | OFlags::NONBLOCK)?)
}

fn duplicate(stream: impl AsFd) -> io::Result<File> {
    stream.as_fd().try_clone_to_owned().map(File::from)
}

/// A terminal's descriptor is shared with others, who want it to block: opened
/// anew, it need not. Pipes tell how much they take; files do not block.
fn nonblocking(output: File) -> File {
    if !output.is_terminal() {
        return output;
    }
    let reopened = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", output.as_raw_fd()));
    reopened.unwrap_or(output)
}

fn make_raw(terminal: &File) -> io::Result<()> {
    let mut settings = tcgetattr(terminal)?;
    settings.make_raw();
    Ok(tcsetattr(terminal, OptionalActions::Now, &settings)?)
}
