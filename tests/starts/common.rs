//! A user with a store, a guest of a few instructions, and what must not be left.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_boot::initramfs::Initramfs;
use tempfile::TempDir;

use crate::tiny::{Does, kernel, kill};

/// Nothing here takes nearly as long, unless it hangs.
pub const BOUND: Duration = Duration::from_secs(120);
/// Marks the processes of a start, to be found when they should be gone.
const MARK: &str = "MAYFLY_TEST_START";

/// mayfly's status when `run` fails.
pub const FAILED: i32 = 125;
pub const CONFIG: i32 = 2;
pub const HOST: i32 = 3;

/// A verb that starts a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Run,
    Detached,
    Boot,
}

pub const VERBS: [Verb; 3] = [Verb::Run, Verb::Detached, Verb::Boot];

impl Verb {
    /// The status of a refusal.
    pub fn status(self, class: i32) -> i32 {
        match self {
            Verb::Boot => class,
            _ => FAILED,
        }
    }
}

/// A user of a host: a store with an image, a cache with a guest.
pub struct Host {
    pub folder: TempDir,
    /// What is there before a start, and so after one that failed.
    before: BTreeSet<PathBuf>,
}

fn binary() -> PathBuf {
    let binary = std::env::var_os("MAYFLY_BIN").map(PathBuf::from);
    binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_mayfly").into())
}

impl Host {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Other users are to find what they may.
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let mut host = Host {
            folder,
            before: BTreeSet::new(),
        };
        for name in ["share", "cache/default", "tmp", "root/bin"] {
            fs::create_dir_all(host.path(name)).unwrap();
        }
        for (name, does) in [("off", Does::PowerOff), ("idle", Does::Halt)] {
            fs::write(host.path(name), kernel(does)).unwrap();
        }
        // An archive with nothing in it.
        let archive = Initramfs::new(Vec::new()).unwrap().finish().unwrap();
        for (name, data) in [
            ("vmlinux", &kernel(Does::PowerOff)),
            ("run.cpio", &archive),
            ("initramfs.cpio", &archive),
        ] {
            fs::write(host.path("cache/default").join(name), data).unwrap();
        }
        fs::write(host.path("root/bin/sh"), "no shell").unwrap();
        symlink(binary(), host.path("mayfly")).unwrap();
        let archive = host.path("root.tar");
        let mut tar = Command::new("tar");
        tar.arg("-cf")
            .arg(&archive)
            .arg("-C")
            .arg(host.path("root"));
        assert!(tar.arg(".").status().unwrap().success());
        let mut import = host.mayfly();
        import.args(["image", "import"]).arg(&archive);
        import.args(["tiny", "--cmd", "[\"/bin/sh\"]"]);
        import.stdout(Stdio::null()).stderr(Stdio::null());
        assert!(import.status().unwrap().success());
        // What one start makes for all.
        let first = host.command(Verb::Run, "off", &["--rm", "--net", "none"]);
        let ended = host.start(first).wait();
        assert!(ended.is_off(Verb::Run), "{ended:?}");
        host.before = host.files();
        host
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// All files that a start might leave, but for the lock of the runtime folder itself.
    fn files(&self) -> BTreeSet<PathBuf> {
        let mut all = BTreeSet::new();
        let mut folders: Vec<_> = ["share", "cache", "tmp", "runtime"]
            .map(|it| self.path(it))
            .into();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path.clone());
                }
                if !path.ends_with("runtime/.making") {
                    all.insert(path);
                }
            }
        }
        all
    }

    fn mayfly(&self) -> Command {
        let mut command = Command::new(self.path("mayfly"));
        self.surround(&mut command);
        command
    }

    /// The user's variables.
    pub fn surround(&self, command: &mut Command) {
        command
            .env("XDG_DATA_HOME", self.path("share"))
            .env("MAYFLY_CACHE", self.path("cache"))
            .env("MAYFLY_RUNTIME_DIR", self.path("runtime"))
            .env("TMPDIR", self.path("tmp"))
            .env("HOME", self.path("tmp"));
    }

    /// The words of a verb, with a kernel.
    pub fn words(&self, verb: Verb, kernel: &str, flags: &[&str]) -> Vec<String> {
        let kernel = match kernel.starts_with('/') {
            true => kernel.to_owned(),
            false => self.text(kernel),
        };
        let mut words: Vec<String> = match verb {
            Verb::Run => vec!["run".into()],
            Verb::Detached => vec!["run".into(), "-d".into()],
            Verb::Boot => vec!["boot".into()],
        };
        words.extend(["--accept-kvm".into(), "--kernel".into(), kernel]);
        words.extend(flags.iter().map(|&flag| flag.to_owned()));
        match verb {
            Verb::Boot => words.extend(["--console".into(), "none".into()]),
            _ => words.push("tiny".into()),
        }
        words
    }

    /// A start that is about to be.
    pub fn command(&self, verb: Verb, kernel: &str, flags: &[&str]) -> Command {
        let mut command = self.mayfly();
        command.args(self.words(verb, kernel, flags));
        command
    }

    /// The same, from a shell that has done something before: `$0` and `$@` start it.
    pub fn after(&self, script: &str, verb: Verb, kernel: &str, flags: &[&str]) -> Command {
        let mut command = Command::new("bash");
        command.args(["-c", &format!("{script}; exec \"$0\" \"$@\"")]);
        command.arg(self.path("mayfly"));
        command.args(self.words(verb, kernel, flags));
        self.surround(&mut command);
        command
    }

    /// Starts it.
    pub fn start(&self, mut command: Command) -> Start {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mark = format!("{MARK}={}-{number}", std::process::id());
        let (name, value) = mark.split_once('=').unwrap();
        let said = TempDir::new().unwrap();
        let file = |name: &str| File::create(said.path().join(name)).unwrap();
        command
            .env(name, value)
            .stdin(Stdio::null())
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .process_group(0);
        let child = command.spawn().unwrap();
        Start { child, mark, said }
    }

    /// Starts it, waits for its end, and looks that nothing is left of it.
    pub fn run(&self, command: Command) -> Ended {
        let start = self.start(command);
        self.finish(start)
    }

    /// Waits for its end, and looks that nothing is left of it.
    pub fn finish(&self, start: Start) -> Ended {
        let said = start.said.path().to_owned();
        let (mut ended, _said) = start.end();
        // Who was killed may end a moment later.
        let deadline = Instant::now() + BOUND;
        loop {
            let left = (self.left(), marked(&ended.mark));
            if left.0.is_empty() && left.1.is_empty() {
                // Another process may have passed the last words on.
                ended.stderr = text(&said.join("stderr"));
                return ended;
            }
            assert!(Instant::now() < deadline, "{ended:?} left {left:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Files that are left.
    pub fn left(&self) -> Vec<PathBuf> {
        self.files().difference(&self.before).cloned().collect()
    }
}

/// The processes with a variable that live.
pub fn marked(mark: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|it| it.parse().ok()) else {
            continue;
        };
        let variables = fs::read(entry.path().join("environ")).unwrap_or_default();
        if variables
            .split(|&byte| byte == 0)
            .any(|it| it == mark.as_bytes())
        {
            found.push(pid);
        }
    }
    found
}

fn text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()
}

/// A start that is under way.
pub struct Start {
    pub child: Child,
    pub mark: String,
    said: TempDir,
}

/// One that is over.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub mark: String,
}

impl Start {
    pub fn signal(&self, signal: i32) {
        kill(self.child.id(), signal);
    }

    pub fn wait(self) -> Ended {
        self.end().0
    }

    fn end(mut self) -> (Ended, TempDir) {
        let deadline = Instant::now() + BOUND;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                for pid in marked(&self.mark) {
                    kill(pid, libc::SIGKILL);
                }
                let _ = self.child.wait();
                panic!(
                    "hangs: {:?}",
                    fs::read_to_string(self.said.path().join("stderr"))
                );
            }
            thread::sleep(Duration::from_millis(5));
        };
        let ended = Ended {
            status,
            stdout: text(&self.said.path().join("stdout")),
            stderr: text(&self.said.path().join("stderr")),
            mark: self.mark,
        };
        (ended, self.said)
    }
}

impl Ended {
    /// It ended with this status, and one line on standard error that has these words.
    pub fn assert_refused(&self, status: i32, words: &str) {
        assert_eq!(self.status.code(), Some(status), "{self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:?}");
        assert!(self.stderr.starts_with("mayfly: "), "{self:?}");
        assert!(self.stderr.contains(words), "not {words:?}: {self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
    }

    /// The guest turned its machine off.
    pub fn is_off(&self, verb: Verb) -> bool {
        match verb {
            Verb::Boot => self.status.code() == Some(0) && self.stderr.is_empty(),
            _ => {
                self.status.code() == Some(FAILED)
                    && self.stderr.lines().count() == 1
                    && self
                        .stderr
                        .ends_with(" turned itself off before its command ended\n")
            }
        }
    }
}

/// Writes a program that a shell runs.
pub fn program(path: &Path, script: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}
