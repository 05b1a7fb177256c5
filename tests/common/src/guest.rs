//! Starting mayfly with a guest that runs a script, and watching it.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use mayfly_boot::initramfs::Initramfs;

use crate::processes::kill;
use crate::{eventually, kernel, mayfly, test_data};

/// An initramfs that scripts/test has built.
pub fn prepared(name: &str) -> Vec<u8> {
    let path = test_data(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What a guest needs to be started, and where its files are.
pub struct Guest {
    /// Where they are, gone with it.
    pub folder: tempfile::TempDir,
    /// What starts it.
    pub command: Command,
    streams: Streams,
}

#[derive(PartialEq, Eq)]
enum Streams {
    Pipes,
    Own,
}

impl Guest {
    /// A guest of the 6.12 cloud kernel that runs a shell script.
    pub fn new(script: &str) -> Self {
        Self::with_kernel("cloud-6.12", "vmlinux", script)
    }

    /// A guest of another kernel, `vmlinux` or `vmlinuz`, that runs a shell script.
    pub fn with_kernel(name: &str, file: &str, script: &str) -> Self {
        Self::with_archives(name, file, script, &[])
    }

    /// Adds prepared archives to the initramfs.
    pub fn with_archives(name: &str, file: &str, script: &str, archives: &[&str]) -> Self {
        let mut image = prepared(&format!("{name}.cpio"));
        for archive in archives {
            append(&mut image, &prepared(archive));
        }
        let mut own = Initramfs::new(Vec::new()).unwrap();
        own.file("etc/mayfly/run", 0o755, script.as_bytes())
            .unwrap();
        append(&mut image, &own.finish().unwrap());
        Self::with_image(name, file, &image)
    }

    /// A guest with modules, an init and busybox, which does what its command line says.
    pub fn plain() -> Self {
        Self::with_image("cloud-6.12", "vmlinux", &prepared("cloud-6.12.cpio"))
    }

    /// A guest with an init and nothing else.
    pub fn bare(name: &str) -> Self {
        Self::with_image(name, "vmlinux", &prepared("bare.cpio"))
    }

    fn with_image(name: &str, file: &str, image: &[u8]) -> Self {
        let mut guest = Guest::of_kernel(&kernel(name, file));
        let initrd = guest.path("initrd");
        fs::write(&initrd, image).unwrap();
        guest.command.arg("--initrd").arg(&initrd);
        guest
    }

    /// A guest that is a kernel and nothing else.
    pub fn of_kernel(kernel: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(mayfly());
        command
            .arg("boot")
            .arg("--kernel")
            .arg(kernel)
            .stdin(Stdio::null());
        Guest {
            folder,
            command,
            streams: Streams::Pipes,
        }
    }

    /// A file in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Adds flags.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// The caller sees to standard input and output.
    pub fn own_output(mut self) -> Self {
        self.streams = Streams::Own;
        self
    }

    /// Starts it.
    pub fn start(mut self) -> Running {
        if self.streams == Streams::Pipes {
            self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let mut child = self.command.spawn().unwrap();
        let (mut stdout, mut stderr) = (None, None);
        if self.streams == Streams::Pipes {
            stdout = child.stdout.take().map(collect);
            stderr = child.stderr.take().map(collect);
        }
        Running {
            child,
            stdout,
            stderr,
            folder: self.folder,
        }
    }

    /// Runs the guest to its end, which must be a power-off, and returns the console.
    pub fn run(self) -> String {
        let ended = self.start().wait();
        assert_eq!(ended.code(), Some(0), "{ended:?}");
        ended.stdout
    }
}

/// Linux wants archives that follow each other to begin at multiples of 4.
fn append(image: &mut Vec<u8>, archive: &[u8]) {
    image.resize(image.len().next_multiple_of(4), 0);
    image.extend_from_slice(archive);
}

type Collected = (Arc<Mutex<Vec<u8>>>, JoinHandle<()>);

fn collect(mut pipe: impl Read + Send + 'static) -> Collected {
    let data = Arc::new(Mutex::new(Vec::new()));
    let shared = data.clone();
    let thread = std::thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(len @ 1..) = pipe.read(&mut chunk) {
            shared.lock().unwrap().extend_from_slice(&chunk[..len]);
        }
    });
    (data, thread)
}

/// A VM that runs; it is ended when this is dropped.
pub struct Running {
    /// The process that was started.
    pub child: Child,
    stdout: Option<Collected>,
    stderr: Option<Collected>,
    /// Where its files are.
    pub folder: tempfile::TempDir,
}

/// A VM that ended.
#[derive(Debug)]
pub struct Ended {
    /// How its process ended.
    pub status: ExitStatus,
    /// The console.
    pub stdout: String,
    /// What mayfly said.
    pub stderr: String,
}

impl Ended {
    /// Its exit status, if no signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The signal that ended it.
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// The record that `--json` prints last.
    pub fn record(&self) -> serde_json::Value {
        let last = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

fn text(collected: &Option<Collected>) -> String {
    let bytes = collected
        .as_ref()
        .map(|(data, _)| data.lock().unwrap().clone());
    String::from_utf8_lossy(&bytes.unwrap_or_default()).replace('\r', "")
}

impl Running {
    /// What it has printed.
    pub fn console(&self) -> String {
        text(&self.stdout)
    }

    /// What it has said on standard error.
    pub fn errors(&self) -> String {
        text(&self.stderr)
    }

    /// Waits until the console shows a text.
    pub fn expect(&mut self, what: &str) {
        eventually(what, || {
            // Looked at first: nothing comes after the end.
            let ended = self.child.try_wait().unwrap();
            if self.console().contains(what) {
                return Some(());
            }
            if let Some(status) = ended {
                // Its last words may still be on their way.
                self.drain();
                let rest = (self.console(), self.errors());
                assert!(
                    rest.0.contains(what),
                    "{status}, without {what:?}: {rest:?}"
                );
            }
            None
        });
    }

    /// Sends a signal to the process that was started.
    pub fn signal(&self, signal: i32) {
        kill(self.child.id(), signal);
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Ended {
        let status = eventually("its end", || self.child.try_wait().unwrap());
        self.drain();
        Ended {
            status,
            stdout: text(&self.stdout),
            stderr: text(&self.stderr),
        }
    }

    /// Waits until all that it printed has been read.
    fn drain(&mut self) {
        for (_, thread) in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
            let empty = std::thread::spawn(|| ());
            let _ = std::mem::replace(thread, empty).join();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A VM that is called `vm`, and the folder with its socket.
pub struct Controlled {
    /// The VM.
    pub running: Running,
    runtime: PathBuf,
}

impl Controlled {
    /// Starts a guest by a function, as `vm`.
    pub fn start(mut guest: Guest, start: impl FnOnce(Guest) -> Running) -> Self {
        let runtime = guest.path("runtime");
        guest.command.env("MAYFLY_RUNTIME_DIR", &runtime);
        guest.command.args(["--name", "vm"]);
        Controlled {
            running: start(guest),
            runtime,
        }
    }

    /// Runs mayfly where the VM is known.
    pub fn mayfly(&self, args: &[&str]) -> Output {
        let mut command = Command::new(mayfly());
        command.env("MAYFLY_RUNTIME_DIR", &self.runtime);
        command.args(args).output().unwrap()
    }

    /// `mayfly ctl vm …`, which must succeed.
    pub fn ctl(&self, args: &[&str]) -> String {
        let output = self.mayfly(&[&["ctl", "vm"], args].concat());
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// `mayfly ctl vm …`, which must be refused with one line.
    pub fn refused(&self, args: &[&str]) -> String {
        let output = self.mayfly(&[&["ctl", "vm"], args].concat());
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// What `mayfly ctl vm info` says.
    pub fn info(&self) -> serde_json::Value {
        serde_json::from_str(&self.ctl(&["info"])).unwrap()
    }

    /// The folder with its socket.
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// Its control socket.
    pub fn socket(&self) -> PathBuf {
        self.runtime.join("vm.sock")
    }
}
