//! Starting mayfly with a guest that runs a script, and watching it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mayfly_boot::initramfs::Initramfs;

/// Everything is several times slower in the lab than on a CPU.
pub const PATIENCE: Duration = Duration::from_secs(600);

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set: run scripts/test, which prepares guests"))
        .into()
}

/// The binary under test.
pub fn mayfly() -> PathBuf {
    variable("MAYFLY_BIN")
}

/// A file of a fetched kernel: `vmlinux`, `vmlinuz`, `release`.
pub fn kernel(name: &str, file: &str) -> PathBuf {
    variable("MAYFLY_KERNELS").join(name).join(file)
}

/// A file that scripts/test has made.
pub fn test_data(name: &str) -> PathBuf {
    variable("MAYFLY_TEST_DATA").join(name)
}

/// An initramfs that scripts/test has built.
pub fn prepared(name: &str) -> Vec<u8> {
    let path = test_data(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A file of the Debian that scripts/distro has made.
pub fn distro(name: &str) -> PathBuf {
    variable("MAYFLY_DISTRO").join(name)
}

/// What a guest needs to be started, and where its files are.
pub struct Guest {
    pub folder: tempfile::TempDir,
    pub command: Command,
    output: Output,
}

enum Output {
    Pipes,
    Own,
}

impl Guest {
    /// A guest of the 6.12 cloud kernel that runs a shell script.
    pub fn new(script: &str) -> Self {
        Self::with_kernel("cloud-6.12", "vmlinux", script)
    }

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
            output: Output::Pipes,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn args<S: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// The caller sees to standard input and output.
    pub fn own_output(mut self) -> Self {
        self.output = Output::Own;
        self
    }

    pub fn start(mut self) -> Running {
        if matches!(self.output, Output::Pipes) {
            self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let mut child = self.command.spawn().unwrap();
        let (mut stdout, mut stderr) = (None, None);
        if matches!(self.output, Output::Pipes) {
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
    pub child: Child,
    stdout: Option<Collected>,
    stderr: Option<Collected>,
    pub folder: tempfile::TempDir,
}

/// A VM that ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn code(&self) -> Option<i32> {
        self.status.code()
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
    pub fn console(&self) -> String {
        text(&self.stdout)
    }

    /// What it has said on standard error.
    pub fn errors(&self) -> String {
        text(&self.stderr)
    }

    /// Waits until the console shows a text.
    pub fn expect(&mut self, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.console().contains(what) {
            if let Some(status) = self.child.try_wait().unwrap() {
                let rest = (self.console(), text(&self.stderr));
                assert!(
                    rest.0.contains(what),
                    "{status}, without {what:?}: {rest:?}"
                );
            }
            assert!(
                Instant::now() < deadline,
                "no {what:?} in {}",
                self.console()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn signal(&self, signal: i32) {
        kill(self.child.id(), signal);
    }

    pub fn wait(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                panic!("does not end: {}{}", self.console(), text(&self.stderr));
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        for (_, thread) in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
            let empty = std::thread::spawn(|| ());
            let _ = std::mem::replace(thread, empty).join();
        }
        Ended {
            status,
            stdout: text(&self.stdout),
            stderr: text(&self.stderr),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn kill(pid: u32, signal: i32) {
    let status = Command::new("kill")
        .args([format!("-{signal}"), pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

/// Runs a tool of the host, which must succeed, and returns what it printed.
pub fn tool(name: &str, args: &[&str]) -> String {
    let output = Command::new(name)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{name}: {error}; scripts/test installs it"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {args:?}: {text}{errors}");
    text
}

/// A file of pseudo-random bytes.
pub fn random_file(path: &Path, len: usize) {
    let mut source = File::open("/dev/urandom").unwrap().take(len as u64);
    let mut file = File::create(path).unwrap();
    assert_eq!(std::io::copy(&mut source, &mut file).unwrap(), len as u64);
    file.flush().unwrap();
}

/// The signal that ended a process.
pub fn ended_by(ended: &Ended) -> Option<i32> {
    ended.status.signal()
}
