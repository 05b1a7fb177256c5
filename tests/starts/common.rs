//! A user with a store, a guest of a few instructions, and what must not be left.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_testing::processes::{kill, kill_if_there, with_variable};
use mayfly_testing::user::User;
use mayfly_testing::{TIMEOUT, eventually_within, many_times, mayfly, text};
use tempfile::TempDir;

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

/// A user of a host, and what is there before a start.
pub struct Host {
    pub user: User,
    /// And so after one that failed.
    before: BTreeSet<PathBuf>,
    /// How long a start may take, and its traces may stay.
    timeout: Duration,
}

impl Host {
    pub fn new() -> Self {
        let mut host = Host {
            user: User::tiny(),
            before: BTreeSet::new(),
            timeout: TIMEOUT,
        };
        symlink(mayfly(), host.path("mayfly")).unwrap();
        // What one start makes for all.
        let first = host.command(Verb::Run, "turns-off", &["--rm", "--net", "none"]);
        let begun = Instant::now();
        let ended = host.start(first).wait();
        assert!(ended.is_off(Verb::Run), "{ended:?}");
        host.timeout = many_times(begun.elapsed());
        host.before = host.files();
        host
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.user.path(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// All files that a start might leave, but for the lock of the runtime folder itself.
    fn files(&self) -> BTreeSet<PathBuf> {
        let mut all = BTreeSet::new();
        let mut folders: Vec<_> = ["share", "cache", "tmp", "run"]
            .map(|it| self.path(it))
            .into();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path.clone());
                }
                if !path.ends_with("run/.making") {
                    all.insert(path);
                }
            }
        }
        all
    }

    /// The user's command, by the name that it has in the user's folder.
    pub fn mayfly(&self) -> Command {
        let mut command = Command::new(self.path("mayfly"));
        self.surround(&mut command);
        command
    }

    /// Gives a command the user's variables.
    pub fn surround(&self, command: &mut Command) {
        self.user.surround(command);
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
        let (mut ended, _said) = start.end(self.timeout);
        // Who was killed may end a moment later.
        let what = format!("nothing is left of {ended:?}");
        eventually_within(self.timeout, &what, || {
            let nothing = self.left().is_empty() && with_variable(&ended.mark).is_empty();
            nothing.then_some(())
        });
        // Another process may have passed the last words on.
        ended.stderr = words(&said.join("stderr"));
        ended
    }

    /// Files that are left.
    pub fn left(&self) -> Vec<PathBuf> {
        self.files().difference(&self.before).cloned().collect()
    }
}

fn words(path: &Path) -> String {
    text(&fs::read(path).unwrap())
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
        self.end(TIMEOUT).0
    }

    fn end(mut self, timeout: Duration) -> (Ended, TempDir) {
        let deadline = Instant::now() + timeout;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                for pid in with_variable(&self.mark) {
                    kill_if_there(pid, libc::SIGKILL);
                }
                let _ = self.child.wait();
                panic!("hangs: {}", words(&self.said.path().join("stderr")));
            }
            thread::sleep(Duration::from_millis(5));
        };
        let ended = Ended {
            status,
            stdout: words(&self.said.path().join("stdout")),
            stderr: words(&self.said.path().join("stderr")),
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
