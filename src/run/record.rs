//! What is known of a VM of `mayfly run`: a private folder of its own, locked
//! while it lives.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata, Permissions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_protocol::agent::Limit;
use mayfly_sandbox::Cgroup;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};
use tempfile::{NamedTempFile, TempDir};

use super::log;
use super::text::Text;
use crate::control::Folder;
use crate::failure::{Failure, OrFail};
use crate::signals::StartSignals;
use crate::supervisor::Status;
use crate::unix_socket;

const RECORD: &str = "vm.json";
const LOCK: &str = "lock";
/// What becomes the record in the end: there may be no space for another then.
const SPARE: &str = "spare";
/// How much longer than the first the last record is, at most.
const ENDED_MAX: usize = 16 << 10;
/// How a VM that runs does.
const STATUS: &str = "status.json";
/// How folders that are being made are called at first.
const NEW: &str = ".new-";
/// Locked shared while a new folder has no lock of its own yet, and alone while those are
/// removed that were left.
const MAKING: &str = ".making";
/// Either takes no longer, unless a process is stopped.
const MAKING_TIMEOUT: Duration = Duration::from_secs(10);
/// Whoever looks at a VM takes no longer.
const LOOK: Duration = Duration::from_millis(500);
/// A VMM process that was killed has ended by then.
const RELEASE: Duration = Duration::from_secs(1);

/// What a VM was started as, and how it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// The image, as the user named it.
    pub image: String,
    /// The image's digest.
    pub image_id: String,
    /// What it runs.
    pub command: Vec<Text>,
    /// Its environment, for `exec`.
    pub environment: Vec<(Text, Text)>,
    /// The user of its main process.
    pub user: String,
    /// The groups beside the user's.
    #[serde(default)]
    pub groups: Vec<String>,
    /// The folder of its main process.
    pub folder: Text,
    /// It has a terminal.
    pub terminal: bool,
    /// Its volumes, as the user wrote them.
    #[serde(default)]
    pub volumes: Vec<Text>,
    /// The published ports, with the host's that were chosen.
    pub ports: Vec<String>,
    /// vCPUs.
    pub cpus: String,
    /// Memory, as the user wrote it.
    pub memory: String,
    /// What asks its main process to end.
    pub stop_signal: i32,
    /// How many seconds it has then, if that was said.
    #[serde(default)]
    pub stop_timeout: Option<u64>,
    /// The limits of its processes.
    #[serde(default)]
    pub limits: Vec<Limit>,
    /// No program gives its processes privileges.
    #[serde(default)]
    pub no_new_privileges: bool,
    /// What its image and its user say of it.
    #[serde(default)]
    pub labels: BTreeMap<String, Text>,
    /// When it was started: milliseconds since 1970.
    pub created_ms: u64,
    /// The process that runs it.
    pub pid: u32,
    /// When that was started, as other processes may have its number later: clock ticks after
    /// the host was booted.
    #[serde(default)]
    pub pid_started: Option<u64>,
    /// It leaves nothing behind.
    pub remove: bool,
    /// How it ended.
    pub ended: Option<Ended>,
}

impl Record {
    /// Whether a process that was killed wrote it. Others may have had its number.
    fn is_left_by(&self, pid: u32, started: u64) -> bool {
        self.ended.is_none() && self.pid == pid && self.pid_started == Some(started)
    }
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// When: milliseconds since 1970.
    pub at_ms: u64,
    /// The exit status of `mayfly run`.
    pub status: u8,
    /// What there is to say about it.
    pub reason: Option<String>,
    /// The guest's last lines, if it is its kernel that failed.
    #[serde(default)]
    pub last_lines: Vec<String>,
    /// What had failed before.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// A VM's folder.
#[derive(Clone, Debug)]
pub struct VmDir(PathBuf);

/// What a folder tells about its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its process lives.
    Running,
    /// It ended, or its process was killed.
    Ended,
}

impl VmDir {
    /// The folder of a VM that there is.
    pub fn find(name: &str) -> Result<Self, Failure> {
        let vm_dir = VmDir(Folder::open()?.of(name));
        match crate::control::valid_name(name) && vm_dir.0.join(RECORD).exists() {
            true => Ok(vm_dir),
            false => Err(Failure::config(format!(
                "{name}: no such VM; see mayfly ps --all"
            ))),
        }
    }

    /// Removes those of a process that was killed while it started its VM. Their names may be
    /// others than it was given, if VMs had that.
    pub fn remove_of(pid: u32, started: u64) {
        // The VMM process ends with it, and may have the lock for a moment.
        for vm_dir in VmDir::all().unwrap_or_default() {
            let record = vm_dir.record();
            if record.is_ok_and(|record| record.is_left_by(pid, started)) {
                let _ = vm_dir.remove();
            }
        }
    }

    /// All folders, by name.
    pub fn all() -> Result<Vec<Self>, Failure> {
        let entries = fs::read_dir(Folder::open()?.path());
        let mut all: Vec<_> = entries
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| {
                entry
                    .file_name()
                    .to_str()
                    .is_some_and(crate::control::valid_name)
            })
            .map(|entry| VmDir(entry.path()))
            .filter(|vm_dir| vm_dir.0.join(RECORD).exists())
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }

    /// Makes the folder of a new VM, whole and locked from the start.
    pub fn create(record: &Record, signals: &StartSignals) -> Result<VmDirGuard, NotCreated> {
        let folder = Folder::locate();
        folder.make()?;
        let what = || format!("keeping the VM's record in {}", folder.path().display());
        sweep(folder.path());
        let (fresh, mut lock) = make_new(folder.path(), &what(), signals)?;
        VmDir(fresh.path().to_owned())
            .begin(&mut lock, record)
            .or_host(what())?;
        let path = folder.of(&record.name);
        let mut renamed = rename_new(fresh.path(), &path);
        if renamed.is_err() && VmDir(path.clone()).is_left_over() {
            VmDir(path.clone()).remove()?;
            renamed = rename_new(fresh.path(), &path);
        }
        match renamed {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return Err(NotCreated::Taken(VmDir(path)));
            }
            Err(error) => return Err(error).or_host(what())?,
        }
        let _ = fresh.keep();
        Ok(VmDirGuard {
            vm_dir: VmDir(path),
            lock,
            record: record.clone(),
            stays: false,
        })
    }

    /// It was to leave nothing behind, and its process was killed.
    fn is_left_over(&self) -> bool {
        let left = |record: Record| record.remove && record.ended.is_none();
        self.state() == State::Ended && self.record().is_ok_and(left)
    }

    /// What was written down.
    pub fn record(&self) -> Result<Record, Failure> {
        let path = self.0.join(RECORD);
        let text = fs::read(&path).or_host(path.display())?;
        serde_json::from_slice(&text).or_host(path.display())
    }

    /// Writes down what there is, and takes the space for how it ends.
    fn begin(&self, lock: &mut File, record: &Record) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(record)?;
        for (name, data) in [
            (RECORD, &text),
            (SPARE, &vec![b' '; text.len() + ENDED_MAX]),
        ] {
            let mut file = NamedTempFile::new_in(&self.0)?;
            file.write_all(data)?;
            file.persist(self.0.join(name))?;
        }
        lock.write_all(b"\n")
    }

    /// Refuses what needs a guest that runs.
    pub fn need_unpaused(&self) -> Result<(), Failure> {
        let name = self.name();
        match self.status().paused {
            true => Err(Failure::config(format!(
                "{name}: is paused; let it go on with mayfly ctl {name} resume"
            ))),
            false => Ok(()),
        }
    }

    /// Writes down how a VM that runs does. What is written comes whole, or not at all.
    pub fn set_status(&self, status: &Status) -> io::Result<()> {
        let mut file = NamedTempFile::new_in(&self.0)?;
        file.write_all(&serde_json::to_vec(status)?)?;
        file.persist(self.0.join(STATUS))?;
        Ok(())
    }

    /// How a VM does, as far as its supervisor could write that down.
    pub fn status(&self) -> Status {
        let text = fs::read(self.0.join(STATUS)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// What has failed in it, also when it has ended.
    pub fn problems(&self) -> Vec<String> {
        match self.record().map(|record| record.ended) {
            Ok(Some(ended)) => ended.problems,
            _ => self.status().problems,
        }
    }

    /// Writes down how it ended, where space was taken for that.
    fn finish(&self, record: &mut Record) -> io::Result<()> {
        let spare = self.0.join(SPARE);
        let file = File::options().write(true).open(&spare)?;
        let space = file.metadata()?.len();
        let mut text = serde_json::to_vec_pretty(record)?;
        // The last of the lines tell most.
        while let Some(ended) = &mut record.ended
            && text.len() as u64 > space
            && !ended.last_lines.is_empty()
        {
            ended.last_lines.remove(0);
            text = serde_json::to_vec_pretty(record)?;
        }
        file.write_all_at(&text, 0)?;
        file.set_len(text.len() as u64)?;
        fs::rename(spare, self.0.join(RECORD))
    }

    /// Whether its process lives: a lock tells, whatever the process came to.
    pub fn state(&self) -> State {
        let lock = File::open(self.0.join(LOCK));
        match lock.map(|lock| lock.try_lock_shared()) {
            Ok(Err(TryLockError::WouldBlock)) => State::Running,
            _ => State::Ended,
        }
    }

    /// Waits until its process has ended, and returns its status; none, if it was
    /// killed. The lock's file has it, also when its name is gone already.
    pub fn wait(&self) -> Result<Option<u8>, Failure> {
        let Ok(mut lock) = File::open(self.0.join(LOCK)) else {
            return Ok(None); // removed with its folder
        };
        let mut status = String::new();
        lock.lock_shared()
            .and_then(|()| lock.read_to_string(&mut status))
            .or_host("waiting for the VM")?;
        Ok(status.trim_end().parse().ok())
    }

    /// Removes it; not while its process lives.
    pub fn remove(&self) -> Result<(), Failure> {
        self.remove_if_free(true)
    }

    /// The same; one of those that have a part in it now may be waited for.
    fn remove_if_free(&self, waits: bool) -> Result<(), Failure> {
        let what = || format!("removing {}", self.0.display());
        let (look, release) = match waits {
            true => (LOOK, RELEASE),
            false => (Duration::ZERO, Duration::ZERO),
        };
        let lock = File::open(self.0.join(LOCK)).or_host(what())?;
        // Those that look hold it for a moment.
        let deadline = Instant::now() + look;
        while lock.try_lock().is_err() {
            if Instant::now() >= deadline {
                return Err(Failure::config(format!(
                    "{}: runs; stop it first, or remove it with --force",
                    self.name()
                )));
            }
            thread::sleep(LOOK / 50);
        }
        // Another may have removed it meanwhile, and a new VM have its name.
        if !is_at(&lock, &self.0.join(LOCK)) {
            return Ok(());
        }
        // Of a process that was killed.
        if let Ok(record) = self.record()
            && !Cgroup::remove_left(record.pid, release)
            && !waits
        {
            let why = "its processes have not ended yet";
            return Err(Failure::host(format!("{}: {why}", what())));
        }
        // A VM of another kind may have the name by now. What is left is replaced by whoever
        // takes it.
        let socket = Folder::locate().socket(&self.name());
        let freed = unix_socket::remove_leftover(&socket, look);
        if !waits {
            freed?;
        }
        log::remove_folder(&self.0);
        fs::remove_dir_all(&self.0).or_host(what())
    }

    /// Its name.
    pub fn name(&self) -> String {
        let name = self.0.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The socket that reaches its guest.
    pub fn vsock(&self) -> PathBuf {
        self.0.join("vsock")
    }

    /// Makes a place for what its main process writes, and a lock that is to be held while
    /// that is written.
    pub fn make_log(&self) -> Result<(PathBuf, File), Failure> {
        log::make_folder(&self.0)
    }

    /// What its main process wrote.
    pub fn log(&self) -> PathBuf {
        log::path(&self.0)
    }
}

/// Why a VM's folder was not made.
pub enum NotCreated {
    /// A VM has that name, or had it.
    Taken(VmDir),
    /// Another reason.
    Failed(Failure),
}

impl From<Failure> for NotCreated {
    fn from(failure: Failure) -> Self {
        NotCreated::Failed(failure)
    }
}

impl NotCreated {
    /// What to say of it.
    pub fn into_failure(self) -> Failure {
        let vm_dir = match self {
            NotCreated::Taken(vm_dir) => vm_dir,
            NotCreated::Failed(failure) => return failure,
        };
        let name = vm_dir.name();
        Failure::config(match vm_dir.state() {
            State::Running => format!("--name {name}: a VM of that name runs; choose another"),
            State::Ended => format!(
                "--name {name}: a VM of that name has ended; remove it with mayfly rm {name}, or \
                 choose another"
            ),
        })
    }
}

/// The folder of the VM that this process runs. Unless the VM's end is written down, it goes
/// with this: what never ran leaves nothing behind, as there is nothing to see.
pub struct VmDirGuard {
    /// Where it is.
    pub vm_dir: VmDir,
    lock: File,
    record: Record,
    /// The folder stays, or is gone already.
    stays: bool,
}

impl VmDirGuard {
    /// Removes it.
    pub fn remove(mut self) -> Result<(), Failure> {
        self.stays = true;
        log::remove_folder(&self.vm_dir.0);
        // Those that wait for the lock find it gone.
        fs::remove_dir_all(&self.vm_dir.0)
            .or_host(format_args!("removing {}", self.vm_dir.0.display()))
    }

    /// Writes down how it ended; removes it, if nothing is to stay.
    pub fn end(mut self, ended: Ended) -> Result<(), Failure> {
        let _ = self
            .lock
            .write_all_at(format!("{}\n", ended.status).as_bytes(), 0);
        if self.record.remove {
            return self.remove();
        }
        self.stays = true;
        self.record.ended = Some(ended);
        self.vm_dir
            .finish(&mut self.record)
            .or_host("writing down how the VM ended")
    }
}

impl Drop for VmDirGuard {
    fn drop(&mut self) {
        if !self.stays {
            log::remove_folder(&self.vm_dir.0);
            let _ = fs::remove_dir_all(&self.vm_dir.0);
        }
    }
}

/// Makes a folder with a name that no VM has, and locks it.
fn make_new(folder: &Path, what: &str, signals: &StartSignals) -> Result<(TempDir, File), Failure> {
    let making = File::create(folder.join(MAKING)).or_host(what)?;
    let deadline = Instant::now() + MAKING_TIMEOUT;
    while let Err(error) = making.try_lock_shared() {
        match error {
            TryLockError::WouldBlock if Instant::now() < deadline => signals.sleep(LOOK / 100)?,
            TryLockError::WouldBlock => {
                let why = "another mayfly has had it locked for 10 s; it may be stopped";
                return Err(Failure::host(format!("{what}: {why}")));
            }
            TryLockError::Error(error) => return Err(error).or_host(what),
        }
    }
    let fresh = tempfile::Builder::new().prefix(NEW).tempdir_in(folder);
    let fresh = fresh.or_host(what)?;
    let lock = match File::create(fresh.path().join(LOCK)) {
        Ok(lock) => lock,
        Err(error) => {
            // It is empty. To look would take a descriptor, of which there may be no more.
            let _ = fs::remove_dir(fresh.path());
            return Err(error).or_host(what);
        }
    };
    lock.lock().or_host(what)?;
    Ok((fresh, lock))
}

/// Removes folders whose making was cut off, and those of VMs that were killed and were to
/// leave nothing behind.
fn sweep(folder: &Path) {
    // Else somebody makes a folder just now, or sweeps: the next one does it.
    if let Ok(making) = File::create(folder.join(MAKING))
        && making.try_lock().is_ok()
    {
        sweep_alone(folder);
    }
}

fn sweep_alone(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        let vm_dir = VmDir(entry.path());
        if name.starts_with(NEW) {
            if vm_dir.state() == State::Ended {
                let _ = fs::remove_dir_all(entry.path());
            }
        } else if crate::control::valid_name(name) && vm_dir.is_left_over() {
            // Others wait for this. Whom it would have to wait for the next sweep finds.
            let _ = vm_dir.remove_if_free(false);
        }
    }
}

/// Whether a path leads to an open file.
fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), path.symlink_metadata()) {
        (Ok(open), Ok(there)) => identity(open) == identity(there),
        _ => false,
    }
}

/// Renames a folder to a name that nothing has.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    fs::set_permissions(from, Permissions::from_mode(0o700))?;
    Ok(renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn a_folder_that_is_made_is_not_swept() {
        let signals = StartSignals::take().unwrap();
        const MAKERS: usize = 8;
        const EACH: usize = 200;
        let folder = tempfile::tempdir().unwrap();
        let start = Barrier::new(MAKERS);
        thread::scope(|scope| {
            for _ in 0..MAKERS {
                scope.spawn(|| {
                    start.wait();
                    for _ in 0..EACH {
                        sweep(folder.path());
                        let (fresh, mut lock) = make_new(folder.path(), "", &signals).unwrap();
                        let vm_dir = VmDir(fresh.path().to_owned());
                        vm_dir.begin(&mut lock, &Record::default()).unwrap();
                        assert!(fresh.path().join(RECORD).exists());
                    }
                });
            }
        });
    }

    #[test]
    fn what_was_left_is_swept_and_what_lives_is_not() {
        let signals = StartSignals::take().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let make = |name: &str, remove: bool| {
            let (fresh, mut lock) = make_new(folder.path(), "", &signals).unwrap();
            let record = Record {
                remove,
                ..Record::default()
            };
            let vm_dir = VmDir(fresh.path().to_owned());
            vm_dir.begin(&mut lock, &record).unwrap();
            fs::rename(fresh.keep(), folder.path().join(name)).unwrap();
            lock
        };
        // Whoever made these was killed, but for the last two.
        fs::create_dir(folder.path().join(".new-without-a-lock")).unwrap();
        drop(make(".new-locked-once", false));
        drop(make("killed-and-to-be-removed", true));
        drop(make("killed", false));
        let _alive = [make(".new-alive", false), make("alive", true)];
        sweep(folder.path());
        let entries = fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [".making", ".new-alive", "alive", "killed"]);
    }

    #[test]
    fn a_record_is_of_one_process() {
        let record = Record {
            pid: 7,
            pid_started: Some(100),
            ..Record::default()
        };
        assert!(record.is_left_by(7, 100));
        assert!(!record.is_left_by(8, 100));
        // Another one had the number, or it ended as it should.
        assert!(!record.is_left_by(7, 101));
        let ended = Record {
            ended: Some(Ended {
                at_ms: 0,
                status: 0,
                reason: None,
                last_lines: Vec::new(),
                problems: Vec::new(),
            }),
            ..record
        };
        assert!(!ended.is_left_by(7, 100));
    }

    #[test]
    fn what_never_ran_leaves_nothing_behind() {
        let signals = StartSignals::take().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let owned = |name: &str| {
            let (fresh, lock) = make_new(folder.path(), "", &signals).unwrap();
            let path = folder.path().join(name);
            fs::rename(fresh.keep(), &path).unwrap();
            VmDirGuard {
                vm_dir: VmDir(path),
                lock,
                record: Record::default(),
                stays: false,
            }
        };
        let ran = owned("ran");
        ran.vm_dir
            .begin(
                &mut File::create(folder.path().join("x")).unwrap(),
                &ran.record,
            )
            .unwrap();
        let ended = Ended {
            at_ms: 0,
            status: 3,
            reason: None,
            last_lines: Vec::new(),
            problems: Vec::new(),
        };
        ran.end(ended).unwrap();
        drop(owned("refused"));
        assert!(folder.path().join("ran").exists());
        assert!(!folder.path().join("refused").exists());
    }

    #[test]
    fn a_new_vm_of_the_same_name_is_not_removed_for_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm");
        fs::create_dir(&path).unwrap();
        let old = File::create(path.join(LOCK)).unwrap();
        assert!(is_at(&old, &path.join(LOCK)));
        fs::remove_dir_all(&path).unwrap();
        assert!(!is_at(&old, &path.join(LOCK)));
        fs::create_dir(&path).unwrap();
        let old = File::create(path.join(LOCK)).unwrap();
        old.lock().unwrap();
        // It is replaced while somebody waits to remove it.
        let new = File::create(path.join("new")).unwrap();
        new.lock().unwrap();
        let vm_dir = VmDir(path.clone());
        thread::scope(|scope| {
            let removes = scope.spawn(|| vm_dir.remove());
            thread::sleep(LOOK / 4);
            fs::rename(path.join("new"), path.join(LOCK)).unwrap();
            old.unlock().unwrap();
            // One that came late is told that the new VM runs.
            let _ = removes.join().unwrap();
        });
        assert!(path.exists());
    }
}
