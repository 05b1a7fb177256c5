//! Users: each has files, images and VMs of their own, all in one folder.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::iter;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use mayfly_boot::initramfs::Initramfs;
use tempfile::TempDir;

use crate::tiny::{Does, kernel};
use crate::tools::run;
use crate::{cache, mayfly, test_data};

/// An ordinary user, who owns nothing.
pub const NOBODY: u32 = 65534;

/// A user of the host.
pub struct User {
    /// Where all of the user's files are.
    pub home: TempDir,
    /// Whether this is an ordinary user, and not root.
    pub plain: bool,
    variables: Vec<(&'static str, OsString)>,
}

impl User {
    /// Root, with the image `demo`.
    pub fn root() -> Self {
        User::root_with("share")
    }

    /// Root, with the images of a store that scripts/test has made.
    pub fn root_with(store: &str) -> Self {
        let user = User::new();
        copy(&test_data(store), &user.path("share"));
        user
    }

    /// Root, with the image `demo`, whose VMs start from templates that nobody else has.
    pub fn with_templates_of_its_own() -> Self {
        let mut user = User::root();
        fs::create_dir(user.path("cache")).unwrap();
        copy(&cache("default"), &user.path("cache/default"));
        user.set("MAYFLY_CACHE", user.path("cache"));
        user.set("MAYFLY_COLD", "0");
        user
    }

    /// The folders of the user's templates.
    pub fn templates(&self) -> Vec<PathBuf> {
        let ready = fs::read_dir(self.path("cache/templates/ready"));
        let ready = ready.into_iter().flatten();
        ready.map(|entry| entry.unwrap().path()).collect()
    }

    /// An ordinary user with the image `demo`, who has nothing more than others but
    /// /dev/kvm's group.
    pub fn plain() -> Self {
        User::plain_with("share")
    }

    /// An ordinary user with the images of a store that scripts/test has made.
    pub fn plain_with(store: &str) -> Self {
        let mut user = User::root_with(store);
        // Root's own folders are not for others.
        fs::copy(mayfly(), user.path("mayfly")).unwrap();
        copy(&cache("default"), &user.path("default"));
        user.set("MAYFLY_CACHE", user.path(""));
        run(Command::new("chown")
            .args(["-R", &NOBODY.to_string()])
            .arg(user.path("")));
        user.plain = true;
        user
    }

    /// Root with an image `tiny`, kernels `halts` and `turns-off` of a few instructions,
    /// which any KVM runs; VMs boot the former by default.
    pub fn tiny() -> Self {
        let mut user = User::new();
        // Other users are to find what they may.
        fs::set_permissions(user.path(""), PermissionsExt::from_mode(0o755)).unwrap();
        for folder in ["cache/default", "tmp", "root/bin"] {
            fs::create_dir_all(user.path(folder)).unwrap();
        }
        for (name, variable) in [
            ("cache", "MAYFLY_CACHE"),
            ("tmp", "TMPDIR"),
            ("tmp", "HOME"),
        ] {
            user.set(variable, user.path(name));
        }
        // What emulates Linux too slowly is fast enough for a few instructions.
        user.set("MAYFLY_ACCEPT_KVM", "1");
        fs::write(user.path("halts"), kernel(Does::Halt)).unwrap();
        fs::write(user.path("turns-off"), kernel(Does::PowerOff)).unwrap();
        // A tiny guest has no use for initial RAM disks.
        let empty = Initramfs::new(Vec::new()).unwrap().finish().unwrap();
        let guest = user.path("cache/default");
        fs::write(guest.join("vmlinux"), kernel(Does::Halt)).unwrap();
        for name in ["run.cpio", "initramfs.cpio"] {
            fs::write(guest.join(name), &empty).unwrap();
        }
        fs::write(user.path("root/bin/sh"), "no shell").unwrap();
        let root = user.path("root");
        let import = ["image", "import", root.to_str().unwrap()];
        user.text(&[&import[..], &["tiny", "--cmd", "[\"/bin/sh\"]"]].concat());
        user
    }

    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut user = User {
            home,
            plain: false,
            variables: Vec::new(),
        };
        user.set("XDG_DATA_HOME", user.path("share"));
        user.set("MAYFLY_RUNTIME_DIR", user.path("run"));
        // No test has a VM beside its own unless it asks for that.
        user.set("MAYFLY_COLD", "1");
        user
    }

    /// Sets an environment variable of all that the user starts.
    pub fn set(&mut self, name: &'static str, value: impl Into<OsString>) {
        self.variables.push((name, value.into()));
    }

    /// A file of the user's; the folder itself if the name is empty.
    pub fn path(&self, name: &str) -> PathBuf {
        match name {
            "" => self.home.path().to_owned(),
            name => self.home.path().join(name),
        }
    }

    /// Gives a command the user's variables.
    pub fn surround(&self, command: &mut Command) {
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
    }

    /// A command of the binary under test, whose output is for the caller.
    pub fn mayfly<S: AsRef<OsStr>>(&self, words: &[S]) -> Command {
        let mut command = match self.plain {
            true => as_nobody(Some(kvm_group()), &self.path("mayfly")),
            false => Command::new(mayfly()),
        };
        self.surround(&mut command);
        command
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// A program that root runs, and that finds the binary under test as `mayfly`.
    pub fn program(&self, program: impl AsRef<OsStr>) -> Command {
        let bin = self.path("bin");
        fs::create_dir_all(&bin).unwrap();
        let link = bin.join("mayfly");
        if fs::symlink_metadata(&link).is_err() {
            symlink(mayfly(), link).unwrap();
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = iter::once(bin).chain(std::env::split_paths(&path));
        let mut command = Command::new(program);
        self.surround(&mut command);
        command
            .env("PATH", std::env::join_paths(folders).unwrap())
            .stdin(Stdio::null());
        command
    }

    /// Runs something to its end.
    pub fn output<S: AsRef<OsStr>>(&self, words: &[S]) -> Output {
        self.mayfly(words).output().unwrap()
    }

    /// Runs something that succeeds, and returns what it printed.
    pub fn text<S: AsRef<OsStr>>(&self, words: &[S]) -> String {
        run(&mut self.mayfly(words))
    }

    /// What `ps` knows of a VM.
    pub fn vm(&self, name: &str) -> Option<serde_json::Value> {
        let all = self.text(&["ps", "--all", "--json"]);
        let all: Vec<serde_json::Value> = serde_json::from_str(&all).unwrap();
        all.into_iter().find(|vm| vm["name"] == name)
    }
}

/// A program as an ordinary user who is in one group more, or in none.
pub fn as_nobody(group: Option<u32>, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")]);
    command.arg(group.map_or_else(
        || "--clear-groups".to_owned(),
        |group| format!("--groups={group}"),
    ));
    command.arg(program);
    command
}

/// The group that may use /dev/kvm.
fn kvm_group() -> u32 {
    fs::metadata("/dev/kvm").unwrap().gid()
}

/// Copies a folder, and what a link to it leads to. Links inside stay links: a VM's log and
/// its folder lead to each other.
fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-rH").arg(from).arg(to));
}
