//! Comparisons, and what they would leave.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use mayfly_compare::model::{EngineReport, Mark, Report};
use mayfly_testing::processes::command_lines;
use mayfly_testing::tools::{busybox_root, program};
use mayfly_testing::{text, until};

/// A word that no other process has, and a time that no test takes.
pub const LONG: &str = "98765";
/// What goes by itself has gone by then.
const TIMEOUT: Duration = Duration::from_secs(60);
/// All comparisons' folders, instances and control groups begin so.
pub const PREFIX: &str = "mayfly-compare-";

pub fn mayfly() -> Command {
    let mut command = Command::new(mayfly_testing::mayfly());
    command.arg("compare").stdin(Stdio::null());
    command
}

/// A comparison of these engines, and where its record is.
pub struct Comparison {
    pub folder: tempfile::TempDir,
    pub command: Command,
}

impl Comparison {
    pub fn of(engines: &str, flags: &[&str]) -> Self {
        Comparison::of_image(Path::new("demo"), engines, flags)
    }

    pub fn of_image(image: &Path, engines: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = mayfly();
        command.args(["--engines", engines, "--json"]);
        command.arg(folder.path().join("record.json"));
        command.arg(image).args(flags);
        Comparison { folder, command }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn record(&self) -> Report {
        let text = fs::read(self.file("record.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    pub fn run(&mut self) -> (Output, Report) {
        let output = self.command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        (output, self.record())
    }

    /// One that is a failure, and says so.
    pub fn fail(&mut self, status: i32) -> (String, Report) {
        let output = self.command.output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        (
            String::from_utf8_lossy(&output.stderr).into_owned(),
            self.record(),
        )
    }

    pub fn start(&mut self) -> Child {
        let output = [Stdio::null(), Stdio::null()];
        let [output, errors] = output;
        self.command.stdout(output).stderr(errors);
        // A shell that starts this in the background has it ignore Ctrl-C.
        // SAFETY: a system call between fork and exec.
        unsafe {
            self.command.pre_exec(|| {
                libc::signal(libc::SIGINT, libc::SIG_DFL);
                Ok(())
            });
        }
        self.command.spawn().unwrap()
    }
}

/// What a comparison would leave: folders, processes, mounts, control groups.
pub fn leftovers() -> Vec<String> {
    let mut found = Vec::new();
    let temporary = std::env::temp_dir();
    for folder in ["/run", "/dev/shm", "/var/tmp"]
        .map(Path::new)
        .iter()
        .chain([&temporary.as_path()])
    {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                found.push(entry.path().display().to_string());
            }
        }
    }
    for words in command_lines() {
        let words = text(&words).replace('\0', " ");
        if words.contains(PREFIX) || words.contains(LONG) {
            found.push(words);
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    found.extend(
        mounts
            .lines()
            .filter(|line| line.contains(PREFIX))
            .map(str::to_owned),
    );
    let name = format!("{PREFIX}*");
    let groups = ["/sys/fs/cgroup", "-type", "d", "-name", &name];
    // Others' groups may go while they are looked through.
    let groups = Command::new("find").args(groups).output().unwrap();
    found.extend(text(&groups.stdout).lines().map(str::to_owned));
    found
}

pub fn nothing_is_left() {
    let deadline = Instant::now() + TIMEOUT;
    until("nothing is left", || {
        let left = leftovers();
        assert!(Instant::now() < deadline, "left behind: {left:#?}");
        left.is_empty()
    });
}

/// Waits until containers run the long command.
pub fn running(instances: usize) {
    until("the command runs", || {
        let long = format!("sleep\0{LONG}\0");
        let all = command_lines().into_iter();
        all.filter(|words| words == long.as_bytes()).count() >= instances
    });
}

/// Which instance a process is of, if its command line says so.
pub fn instance(pid: u32) -> Option<u32> {
    let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words = String::from_utf8_lossy(&words).into_owned();
    let (_, rest) = words.split_once("/instance-")?;
    rest.split('/').next()?.parse().ok()
}

pub fn engine<'a>(report: &'a Report, name: &str) -> &'a EngineReport {
    let found = report.engines.iter().find(|engine| engine.name == name);
    let found = found.unwrap_or_else(|| panic!("{name} is not in the record"));
    assert_eq!(found.missing, None, "{name}");
    found
}

/// A program on its own as an image, with what a test adds to it.
pub fn image(spoil: impl FnOnce(&Path)) -> tempfile::TempDir {
    let image = tempfile::tempdir().unwrap();
    let programs = ["chmod", "echo", "mv", "sh", "sleep", "touch"];
    busybox_root(image.path(), &programs);
    spoil(image.path());
    image
}

/// Milliseconds of each phase of the engine whose answer is known.
pub const KNOWN: [(Mark, u32); 7] = [
    (Mark::Launched, 20),
    (Mark::Built, 35),
    (Mark::Kernel, 10),
    (Mark::Init, 15),
    (Mark::Command, 40),
    (Mark::Exit, 25),
    (Mark::Gone, 30),
];

/// An engine that sleeps so long in each phase, or not at all.
pub fn sleeper(folder: &Path, name: &str, slow: bool) -> String {
    let mut script = "#!/bin/bash\nnonce=$3\n".to_owned();
    for (mark, time) in KNOWN {
        let time = if slow { time } else { 0 };
        script += &format!("sleep 0.{time:03}\n");
        script += &match mark {
            Mark::Command => "printf '\\036mayfly %s started\\n' $nonce\n".to_owned(),
            Mark::Exit => "printf '\\036mayfly %s ended 0\\n' $nonce\n".to_owned(),
            Mark::Gone => "exit 0\n".to_owned(),
            _ => {
                let word = serde_json::to_value(mark).unwrap();
                format!("echo {} >&$MAYFLY_MARKS\n", word.as_str().unwrap())
            }
        };
    }
    self::script(folder, name, &script)
}

/// An engine of one's own.
pub fn script(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    program(&path, text);
    format!("{name}={}", path.display())
}
