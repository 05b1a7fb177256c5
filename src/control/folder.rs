//! The folder with the sockets of this user's VMs: nobody else may enter it.

use std::env;
use std::fs::{self, DirBuilder, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use crate::failure::{Failure, OrFail};
use crate::unix_socket::{self, Name};

/// The longest name of a VM.
pub const NAME_MAX: usize = 64;
const SUFFIX: &str = ".sock";
const PRIVATE: u32 = 0o700;

/// A name that is safe as a file's, and on a command line.
pub fn valid_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with(['.', '-'])
}

/// The folder.
pub struct Folder(PathBuf);

impl Folder {
    /// Where it is, whether it exists or not: `MAYFLY_RUNTIME_DIR`, or `mayfly`
    /// in `XDG_RUNTIME_DIR`, in `/run` for root, or a folder in `/tmp`.
    pub fn locate() -> Self {
        let variable = |name| {
            env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let user = geteuid().as_raw();
        let path = variable("MAYFLY_RUNTIME_DIR")
            .or_else(|| variable("XDG_RUNTIME_DIR").map(|run| run.join("mayfly")))
            .unwrap_or_else(|| match user {
                0 => PathBuf::from("/run/mayfly"),
                _ => env::temp_dir().join(format!("mayfly-{user}")),
            });
        Folder(path)
    }

    /// Another one, for VMs that are not the user's.
    pub fn at(path: &Path) -> Self {
        Folder(path.to_owned())
    }

    /// The socket of the VM with a name; a name with a slash is a path already.
    pub fn socket(&self, name: &str) -> PathBuf {
        match name.contains('/') {
            true => PathBuf::from(name),
            false => self.0.join(format!("{name}{SUFFIX}")),
        }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The folder of a VM with a state of its own.
    pub fn of(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The names of all sockets, also of VMs that were killed.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                Some(name.strip_suffix(SUFFIX)?.to_owned())
            })
            .collect();
        names.sort();
        names
    }

    /// Where it is, for who looks for VMs there: it does not exist, or is this user's alone.
    /// In `/tmp`, anybody can make a folder of that name, with VMs of their own.
    pub fn open() -> Result<Self, Failure> {
        let folder = Folder::locate();
        match folder.0.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => folder.check()?,
        }
        Ok(folder)
    }

    fn what(&self) -> String {
        format!("control folder {}", self.0.display())
    }

    fn check(&self) -> Result<(), Failure> {
        let metadata = self.0.symlink_metadata().or_host(self.what())?;
        match private(&metadata) {
            true => Ok(()),
            false => Err(Failure::host(format!(
                "{}: must be a folder of yours with mode 0700; remove it, or name another in \
                 MAYFLY_RUNTIME_DIR",
                self.what()
            ))),
        }
    }

    /// Makes the folder if it is missing.
    pub fn make(&self) -> Result<(), Failure> {
        match DirBuilder::new().mode(PRIVATE).create(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Failure::host(format!(
                    "{}: {error}; name another in MAYFLY_RUNTIME_DIR",
                    self.what()
                )));
            }
            _ => {}
        }
        self.check()
    }

    /// Makes the folder if it is missing, and listens on the socket of a VM.
    pub fn listen(&self, name: &str) -> Result<(UnixListener, Name), Failure> {
        self.make()?;
        let path = self.socket(name);
        if unix_socket::connect(&path).is_ok() {
            return Err(Failure::config(format!(
                "--name {name}: a VM of that name runs; choose another"
            )));
        }
        unix_socket::listen(&path, &format!("--name {name}"))
    }
}

fn private(metadata: &Metadata) -> bool {
    let user = geteuid().as_raw();
    metadata.is_dir() && metadata.uid() == user && metadata.mode() & 0o777 == PRIVATE
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn names_are_harmless() {
        for name in ["a", "vm-1", "web.2_b", &"x".repeat(NAME_MAX)] {
            assert!(valid_name(name), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            "-v",
            "a/b",
            "a b",
            "ä",
            "a\n",
            &"x".repeat(NAME_MAX + 1),
        ] {
            assert!(!valid_name(name), "{name}");
        }
    }

    #[test]
    fn a_name_is_taken_once_and_a_leftover_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let folder = Folder(parent.path().join("run"));
        let (listener, socket) = folder.listen("a").unwrap();
        assert_eq!(folder.names(), ["a"]);
        let refusal = folder.listen("a").err().unwrap().to_string();
        assert!(refusal.contains("--name a"), "{refusal}");
        // Killed: the socket stays, nobody listens.
        drop(listener);
        std::mem::forget(socket);
        let (_listener, socket) = folder.listen("a").unwrap();
        drop(socket);
        assert_eq!(folder.names(), [""; 0]);
    }

    #[test]
    fn a_folder_that_others_may_enter_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("run");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        assert!(Folder(path.clone()).listen("a").is_err());
        let link = parent.path().join("link");
        fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Folder(link).listen("a").is_err());
        assert!(Folder(path).listen("a").is_ok());
    }
}
