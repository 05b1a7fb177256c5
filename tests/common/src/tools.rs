//! Programs and files of the host.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::text;

/// A process of the host, ended with this.
pub struct Peer(pub Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command that must succeed, and returns what it printed.
pub fn run(command: &mut Command) -> String {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; scripts/test installs it"));
    assert!(
        output.status.success(),
        "{command:?}: {}: {}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Runs a tool of the host, which must succeed, and returns what it printed.
pub fn tool(name: &str, args: &[&str]) -> String {
    run(Command::new(name).args(args))
}

/// A file of pseudo-random bytes.
pub fn random_file(path: &Path, len: usize) {
    let mut source = File::open("/dev/urandom").unwrap().take(len as u64);
    let mut file = File::create(path).unwrap();
    assert_eq!(std::io::copy(&mut source, &mut file).unwrap(), len as u64);
    file.flush().unwrap();
}

/// Writes a program, in a folder that is made if it is missing.
pub fn program(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

/// A folder with a busybox, and links to it of these names: the root of an image.
pub fn busybox_root(root: &Path, programs: &[&str]) {
    fs::set_permissions(root, PermissionsExt::from_mode(0o755)).unwrap();
    let bin = root.join("bin");
    fs::create_dir(&bin).unwrap();
    fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
    for name in programs {
        std::os::unix::fs::symlink("busybox", bin.join(name)).unwrap();
    }
}

/// A port of loopback that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}
