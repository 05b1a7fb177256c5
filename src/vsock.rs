//! The host's side of `--vsock`: Unix sockets.
//!
//! The listening socket is made at once, so that the device can have it, but
//! named only when all that can be refused has been.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::config::VsockConfig;
use crate::failure::{Failure, OrFail};
use crate::unix_socket::{check_free, connect, socket};

/// Enough for the device's connections, and all else that is open.
pub const OPEN_FILES: libc::rlim_t = 4096 + 1024;

/// Connects to the socket of a port of the host: their names begin with a path.
pub fn connect_to_port(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut path = path.as_os_str().to_owned();
    path.push(format!("_{port}"));
    connect(Path::new(&path))
}

/// A socket to listen on, which has no name yet. Looks whether it could have
/// its name.
pub fn open(config: &VsockConfig) -> Result<UnixListener, Failure> {
    let flag = config.flag();
    check_free(&config.path, &flag)?;
    socket().map(UnixListener::from).or_host(&flag)
}

/// Connections are open files: the limit is raised as far as it may be.
pub fn raise_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    // None is more than any.
    let most = limit
        .maximum
        .map_or(OPEN_FILES, |most| most.min(OPEN_FILES));
    limit.current = limit.current.map(|now| now.max(most));
    // If it fails, there are fewer connections.
    let _ = setrlimit(Resource::Nofile, limit);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_port_has_a_socket_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("v_80")).unwrap();
        let connect = |port| connect_to_port(&folder.path().join("v"), port);
        let mut ours = connect(80).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        theirs.write_all(b"x").unwrap();
        ours.read_exact(&mut [0]).unwrap();
        assert!(connect(81).is_err());
    }
}
