//! Unix sockets and their names: a name is taken once, one that a killed process
//! left is replaced, and it is removed by whoever made it and nobody else.

use std::fs::{self, File, Metadata, TryLockError};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::failure::file_refusal;
use crate::failure::{Failure, OrFail};

/// How many clients may wait; Linux takes fewer if it likes.
const BACKLOG: i32 = 1024;

/// A folder is locked only for as long as a name is given; but anybody who may
/// read it can lock it.
const LOCK_TIMEOUT: Duration = Duration::from_secs(3);

/// A socket without a name, that does not block.
pub fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

/// Connects without waiting for the listener to accept.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let (socket, address) = (socket()?, Address::new(path)?);
    rustix::net::connect(&socket, &address.address)?;
    Ok(socket.into())
}

/// Connects; the connection blocks, and so may this.
pub fn connect_blocking(path: &Path) -> io::Result<UnixStream> {
    let address = Address::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    retry_on_intr(|| rustix::net::connect(&socket, &address.address))?;
    Ok(socket.into())
}

/// A listener at a new path, which blocks.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let address = Address::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &address.address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Where a socket is. A path that is too long for Linux goes by way of its folder.
struct Address {
    address: SocketAddrUnix,
    /// Open until the address was used.
    _folder: Option<File>,
}

impl Address {
    fn new(path: &Path) -> io::Result<Self> {
        match SocketAddrUnix::new(path) {
            Ok(address) => Ok(Address {
                address,
                _folder: None,
            }),
            Err(Errno::NAMETOOLONG) => Address::by_folder(path),
            Err(error) => Err(error.into()),
        }
    }

    fn by_folder(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let folder = path.parent().filter(|folder| *folder != Path::new(""));
        let mut options = File::options();
        options
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY);
        let folder = options.open(folder.unwrap_or(Path::new(".")))?;
        let short = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
        Ok(Address {
            address: SocketAddrUnix::new(short.join(name))?,
            _folder: Some(folder),
        })
    }
}

/// How long a socket's own name may be in a folder whose path has any length: what remains of
/// Linux' `sockaddr_un`, with the largest descriptor's number.
pub const OWN_NAME_MAX: usize = 108 - 1 - "/proc/self/fd/2147483647/".len();

/// True if there is a socket, left by a VM that was killed.
pub fn check_free(path: &Path, flag: &str) -> Result<bool, Failure> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(file_refusal(&error, flag)),
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => {
            return Err(Failure::config(format!(
                "{flag}: exists already, and is not a socket; choose another name"
            )));
        }
    }
    match connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(file_refusal(&error, flag))
        }
        _ => Err(Failure::config(format!(
            "{flag}: a process that runs listens there; choose another name"
        ))),
    }
}

/// Removes a socket that a process which was killed has left, and none that somebody listens
/// on. One that has not quite ended is waited for.
pub fn remove_leftover(path: &Path, timeout: Duration) -> Result<(), Failure> {
    const AGAIN: Duration = Duration::from_millis(10);
    let flag = path.display().to_string();
    let deadline = Instant::now() + timeout;
    loop {
        let lock = lock(folder_of(path), timeout, &flag)?;
        match check_free(path, &flag) {
            Ok(true) => return fs::remove_file(path).or_host(flag),
            Err(_) if Instant::now() < deadline => {}
            other => return other.map(drop),
        }
        drop(lock);
        thread::sleep(AGAIN);
    }
}

/// Where a name is.
fn folder_of(path: &Path) -> &Path {
    let folder = path.parent().filter(|parent| *parent != Path::new(""));
    folder.unwrap_or(Path::new("."))
}

/// Makes a socket with a name, and listens. It does not block.
pub fn listen(path: &Path, flag: &str) -> Result<(UnixListener, Name), Failure> {
    let listener = socket().map(UnixListener::from).or_host(flag)?;
    let name = Name::give(&listener, path, flag)?;
    Ok((listener, name))
}

/// A socket's name, removed with this unless it is another's by now.
pub struct Name {
    path: PathBuf,
    identity: (u64, u64),
}

impl Name {
    /// Gives a socket its name, and listens.
    pub fn give(socket: &UnixListener, path: &Path, flag: &str) -> Result<Self, Failure> {
        // Who looks whether a socket is a leftover must not see a new one.
        let _lock = lock(folder_of(path), LOCK_TIMEOUT, flag)?;
        if check_free(path, flag)? {
            fs::remove_file(path).or_host(flag)?;
        }
        let address = Address::new(path).or_host(flag)?;
        rustix::net::bind(socket, &address.address).or_host(flag)?;
        let name = Name {
            path: path.to_owned(),
            identity: identity(&path.symlink_metadata().or_host(flag)?),
        };
        rustix::net::listen(socket, BACKLOG).or_host(flag)?;
        Ok(name)
    }
}

/// Locks a folder, until the file is closed.
fn lock(folder: &Path, timeout: Duration, flag: &str) -> Result<File, Failure> {
    const AGAIN: Duration = Duration::from_millis(10);
    let file = File::open(folder).or_host(flag)?;
    let deadline = Instant::now() + timeout;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(AGAIN),
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::host(format!(
                    "{flag}: another process keeps the folder {} locked; choose another",
                    folder.display()
                )));
            }
            Err(TryLockError::Error(error)) => return Err(error).or_host(flag),
        }
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

impl Drop for Name {
    fn drop(&mut self) {
        let ours = |metadata: Metadata| identity(&metadata) == self.identity;
        if self.path.symlink_metadata().is_ok_and(ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_another_locks_is_waited_for_and_then_named() {
        let folder = tempfile::tempdir().unwrap();
        let timeout = Duration::from_millis(30);
        let other = lock(folder.path(), timeout, "--x").unwrap();
        let message = lock(folder.path(), timeout, "--x").unwrap_err().to_string();
        let name = folder.path().to_str().unwrap();
        assert!(
            message.contains("--x") && message.contains(name),
            "{message}"
        );
        let path = folder.path().join("v");
        thread::scope(|scope| {
            let waiting = scope.spawn(|| listen(&path, "--x").map(drop));
            thread::sleep(timeout);
            assert!(!waiting.is_finished());
            drop(other);
            waiting.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_folder_may_be_deep() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("d".repeat(200)).join("e".repeat(200));
        fs::create_dir_all(&deep).unwrap();
        let path = deep.join("v".repeat(OWN_NAME_MAX));
        let (_listener, name) = listen(&path, "--x").unwrap();
        assert!(path.exists());
        connect(&path).unwrap();
        connect_blocking(&path).unwrap();
        drop(name);
        assert!(!path.exists());
        let long = deep.join("v".repeat(OWN_NAME_MAX + 20));
        assert!(listen(&long, "--x").is_err());
    }

    #[test]
    fn a_name_is_taken_once_and_a_leftover_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v");
        let new = || UnixListener::from(socket().unwrap());
        let (first, second) = (new(), new());
        assert!(!check_free(&path, "--x").unwrap());
        let name = Name::give(&first, &path, "--x").unwrap();
        let refused = |failure: Failure| {
            let message = failure.to_string();
            assert!(message.contains("choose another name"), "{message}");
        };
        refused(Name::give(&second, &path, "--x").err().unwrap());
        refused(check_free(&path, "--x").err().unwrap());
        // Killed: the name stays, nobody listens.
        drop(first);
        std::mem::forget(name);
        assert!(check_free(&path, "--x").unwrap());
        // Only what nobody listens on is removed for another.
        std::mem::forget(Name::give(&second, &path, "--x").unwrap());
        assert!(remove_leftover(&path, Duration::ZERO).is_err() && path.exists());
        drop(second);
        remove_leftover(&path, Duration::ZERO).unwrap();
        assert!(!path.exists());
        remove_leftover(&path, Duration::ZERO).unwrap();
        let third = new();
        let name = Name::give(&third, &path, "--x").unwrap();
        // Another's file is left alone.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(name);
        assert!(path.exists());
        refused(check_free(&path, "--x").err().unwrap());
        assert!(path.exists());
    }
}
