//! Containers to be tried, and the image that they run.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use mayfly_compare::container::{Spec, Volume};
use mayfly_testing::processes::descendants;
use mayfly_testing::tools::busybox_root;
use tempfile::TempDir;

/// The descriptor for marks, and others that stay behind.
const MARKS: i32 = 9;
const OTHERS: [i32; 2] = [3, 8];

const PROGRAMS: &str = "sh cat echo ls ps ip id hostname sleep dd mkdir touch rm ln chmod wc grep head \
                        readlink setsid";

/// What all tests share.
pub struct Setup {
    pub root: bool,
    pub mayfly: PathBuf,
    pub image: PathBuf,
    _image: TempDir,
    folder: TempDir,
}

impl Setup {
    pub fn make() -> Self {
        // SAFETY: touches no memory.
        let root = unsafe { libc::geteuid() } == 0;
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mayfly = match std::env::var_os("MAYFLY_BIN") {
            Some(path) => path.into(),
            None => {
                // An ordinary user may not see it where it is.
                let own = folder.path().join("mayfly");
                fs::copy(env!("CARGO_BIN_EXE_mayfly"), &own).unwrap();
                own
            }
        };
        let image = image();
        Setup {
            root,
            mayfly,
            image: image.path().into(),
            _image: image,
            folder,
        }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn shell(&self, script: &str) -> Container<'_> {
        self.container(&["sh", "-c", script])
    }

    pub fn container(&self, args: &[&str]) -> Container<'_> {
        let own = tempfile::tempdir().unwrap();
        // A name that overlayfs's options have to quote.
        let writable = own.path().join("a,b:c\\d");
        fs::create_dir(&writable).unwrap();
        let spec = Spec {
            root: self.image.clone(),
            writable,
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            env: vec!["PATH=/none:/bin".into()],
            hostname: "box".into(),
            marks: Some(MARKS),
            ..Spec::default()
        };
        Container {
            setup: self,
            own,
            spec,
            inheriting: false,
        }
    }
}

/// An image: a busybox, a file, and what is no program.
pub fn image() -> TempDir {
    let image = tempfile::tempdir().unwrap();
    let root = image.path();
    let programs: Vec<&str> = PROGRAMS.split_whitespace().collect();
    busybox_root(root, &programs);
    for folder in ["etc", "tmp"] {
        fs::create_dir(root.join(folder)).unwrap();
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::write(root.join("etc/plain"), "plain\n").unwrap();
    fs::write(root.join("etc/no-program"), [0x7f, b'E', 0, 0]).unwrap();
    let program = fs::Permissions::from_mode(0o755);
    fs::set_permissions(root.join("etc/no-program"), program).unwrap();
    image
}

/// This program and its libraries, as volumes that are only read.
pub fn program() -> Vec<Volume> {
    let mut all = vec![(std::env::current_exe().unwrap(), "/probe".into(), true)];
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mut libraries: Vec<_> = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .filter(|path| path.contains(".so"))
        .collect();
    libraries.dedup();
    for path in libraries {
        let name = Path::new(path).file_name().unwrap();
        let loader = name.to_str().unwrap().starts_with("ld-linux");
        let folder = if loader { "/lib64" } else { "/probe-libraries" };
        all.push((path.into(), Path::new(folder).join(name), true));
    }
    all
}

/// A container that has not been started.
pub struct Container<'a> {
    setup: &'a Setup,
    own: TempDir,
    pub spec: Spec,
    inheriting: bool,
}

impl Container<'_> {
    /// Has its launcher have some descriptors of the host's.
    pub fn inheriting(mut self) -> Self {
        self.inheriting = true;
        self
    }

    pub fn start(self) -> Running {
        let path = self.own.path().join("spec.json");
        fs::write(&path, serde_json::to_vec(&self.spec).unwrap()).unwrap();
        let (marks, theirs) = std::io::pipe().unwrap();
        let theirs = self.spec.marks.map(|_| OwnedFd::from(theirs));
        let folder = self.inheriting.then(|| File::open("/").unwrap());
        let mut command = Command::new(&self.setup.mayfly);
        command.arg("compare-container").arg(path).env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(Stdio::piped());
        let mut handed: Vec<(i32, i32)> = Vec::new();
        handed.extend(theirs.iter().map(|fd| (fd.as_raw_fd(), MARKS)));
        if let Some(folder) = &folder {
            handed.extend(OTHERS.map(|other| (folder.as_raw_fd(), other)));
        }
        // Out of the way of the numbers that they get.
        let handed: Vec<_> = handed
            .into_iter()
            .map(|(fd, number)| (duplicate(fd), number))
            .collect();
        let given: Vec<_> = handed
            .iter()
            .map(|(fd, number)| (fd.as_raw_fd(), *number))
            .collect();
        // SAFETY: what runs between fork and exec are system calls.
        unsafe {
            command.pre_exec(move || {
                for (fd, number) in &given {
                    libc::dup2(*fd, *number);
                }
                Ok(())
            });
        }
        let mut child = command.spawn().unwrap();
        Running {
            stdin: child.stdin.take(),
            stdout: Mutex::new(BufReader::new(child.stdout.take().unwrap())),
            child,
            marks,
            writable: self.spec.writable,
            _own: self.own,
        }
    }

    pub fn run(self) -> Ended {
        self.start().end()
    }
}

fn duplicate(fd: i32) -> OwnedFd {
    // SAFETY: numbers.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100) };
    assert!(copy >= 100);
    // SAFETY: it is new.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(copy) }
}

/// One that runs.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Mutex<BufReader<ChildStdout>>,
    marks: PipeReader,
    writable: PathBuf,
    _own: TempDir,
}

/// What came of it.
#[derive(Debug)]
pub struct Ended {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
    pub marks: Vec<(String, String)>,
    /// So much is left where it could write.
    pub left: usize,
}

impl Ended {
    /// What the host lacks.
    pub fn notes(&self) -> impl Iterator<Item = &(String, String)> {
        self.marks.iter().filter(|(name, _)| name == "note")
    }

    /// What a mark says.
    pub fn mark(&self, name: &str) -> &str {
        let mut all = self.marks.iter();
        all.find(|it| it.0 == name).map_or("", |it| &it.1)
    }
}

impl Running {
    /// Waits for a line.
    pub fn line(&self, expected: &str) {
        let mut line = String::new();
        self.stdout.lock().unwrap().read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), expected);
    }

    pub fn tell(&mut self, text: &str) {
        self.stdin
            .as_mut()
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: numbers; it was not waited for.
        unsafe { libc::kill(self.child.id().cast_signed(), signal) };
    }

    /// The container's first process, as the host numbers it.
    pub fn init(&self) -> i32 {
        descendants(self.child.id())[1].cast_signed()
    }

    /// Waits for its end.
    pub fn end(mut self) -> Ended {
        drop(self.stdin.take());
        let mut texts = [String::new(), String::new(), String::new()];
        let [stdout, stderr, marks] = &mut texts;
        self.stdout
            .get_mut()
            .unwrap()
            .read_to_string(stdout)
            .unwrap();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(stderr)
            .unwrap();
        let status = self.child.wait().unwrap();
        self.marks.read_to_string(marks).unwrap();
        let marks = marks.lines().map(|line| {
            let (name, rest) = line.split_once(' ').unwrap();
            (name.to_owned(), rest.to_owned())
        });
        let marks = marks.collect();
        let [stdout, stderr, _] = texts;
        Ended {
            left: fs::read_dir(&self.writable).unwrap().count(),
            status: status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap()),
            stdout,
            stderr,
            marks,
        }
    }
}

/// What `/proc/PID/status` says behind a name.
pub fn status_of<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = text.lines();
    lines
        .find_map(|line| line.strip_prefix(name))
        .map(str::trim)
}

/// All files of a folder, with their sizes and modes.
pub fn listing(folder: &Path) -> Vec<(PathBuf, u64, u32)> {
    let mut all = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let about = fs::symlink_metadata(entry.path()).unwrap();
            if about.is_dir() {
                folders.push(entry.path());
            }
            all.push((entry.path(), about.len(), about.permissions().mode()));
        }
    }
    all.sort();
    all
}

/// Control groups of a name.
pub fn groups(name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|it| it.is_dir()) {
                continue;
            }
            match entry.file_name() == name {
                true => found.push(entry.path()),
                false => folders.push(entry.path()),
            }
        }
    }
    found
}
