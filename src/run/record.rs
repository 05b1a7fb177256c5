//! What is known of a VM of `mayfly run`: a private folder of its own, locked
//! while it lives.

use std::fs::{self, File, Permissions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::control::Folder;
use crate::failure::{Failure, OrFail};
use crate::machine::Status;
use crate::timing::milliseconds;

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
/// Whoever looks at a VM takes no longer.
const LOOK: Duration = Duration::from_millis(500);

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
    pub command: Vec<String>,
    /// Its environment, for `exec`.
    pub environment: Vec<(String, String)>,
    /// The user of its main process.
    pub user: String,
    /// The folder of its main process.
    pub folder: String,
    /// It has a terminal.
    pub terminal: bool,
    /// Its volumes, as the user wrote them.
    #[serde(default)]
    pub volumes: Vec<String>,
    /// The published ports, as the user wrote them.
    pub ports: Vec<String>,
    /// vCPUs.
    pub cpus: String,
    /// Memory, as the user wrote it.
    pub memory: String,
    /// What asks its main process to end.
    pub stop_signal: i32,
    /// When it was started: milliseconds since 1970.
    pub created_ms: u64,
    /// The process that runs it.
    pub pid: u32,
    /// It leaves nothing behind.
    pub remove: bool,
    /// How it ended.
    pub ended: Option<Ended>,
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

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, milliseconds)
}

/// A VM's folder.
#[derive(Clone, Debug)]
pub struct Place(PathBuf);

/// What a folder tells about its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its process lives.
    Running,
    /// It ended, or its process was killed.
    Ended,
}

impl Place {
    /// The folder of a VM that there is.
    pub fn find(name: &str) -> Result<Self, Failure> {
        let place = Place(Folder::locate().of(name));
        match crate::control::valid_name(name) && place.0.join(RECORD).exists() {
            true => Ok(place),
            false => Err(Failure::config(format!(
                "{name}: no such VM; see mayfly ps --all"
            ))),
        }
    }

    /// All folders, by name.
    pub fn all() -> Vec<Self> {
        let entries = fs::read_dir(Folder::locate().path());
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
            .map(|entry| Place(entry.path()))
            .filter(|place| place.0.join(RECORD).exists())
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// Makes the folder of a new VM, whole and locked from the start.
    pub fn create(record: &Record) -> Result<Owned, Failure> {
        let what = format!("--name {}", record.name);
        let folder = Folder::locate();
        folder.make()?;
        sweep(folder.path());
        let fresh = tempfile::Builder::new()
            .prefix(NEW)
            .tempdir_in(folder.path())
            .or_host(&what)?;
        let mut lock = File::create(fresh.path().join(LOCK)).or_host(&what)?;
        lock.lock().or_host(&what)?;
        Place(fresh.path().to_owned())
            .begin(&mut lock, record)
            .or_host(&what)?;
        let path = folder.of(&record.name);
        let mut renamed = rename_new(fresh.path(), &path);
        if renamed.is_err() {
            // One that was to leave nothing behind, and was killed.
            let place = Place(path.clone());
            if place.state() == State::Ended && place.record().is_ok_and(|old| old.remove) {
                place.remove()?;
                renamed = rename_new(fresh.path(), &path);
            }
        }
        match renamed {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let place = Place(path);
                return Err(Failure::config(match place.state() {
                    State::Running => format!("{what}: a VM of that name runs; choose another"),
                    State::Ended => format!(
                        "{what}: a VM of that name has ended; remove it with mayfly rm {}, or choose another",
                        record.name
                    ),
                }));
            }
            Err(error) => return Err(error).or_host(what),
        }
        let _ = fresh.keep();
        Ok(Owned {
            place: Place(path),
            lock,
            record: record.clone(),
        })
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
        let what = || format!("removing {}", self.0.display());
        let lock = File::open(self.0.join(LOCK)).or_host(what())?;
        // Those that look hold it for a moment.
        let deadline = Instant::now() + LOOK;
        while lock.try_lock().is_err() {
            if Instant::now() > deadline {
                return Err(Failure::config(format!(
                    "{}: runs; stop it first, or remove it with --force",
                    self.name()
                )));
            }
            thread::sleep(LOOK / 50);
        }
        // Of a process that was killed.
        let _ = fs::remove_file(Folder::locate().socket(&self.name()));
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

    /// What its main process wrote.
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }
}

/// The folder of the VM that this process runs.
pub struct Owned {
    /// Where it is.
    pub place: Place,
    lock: File,
    record: Record,
}

impl Owned {
    /// Removes it.
    pub fn remove(self) -> Result<(), Failure> {
        // Those that wait for the lock find it gone.
        fs::remove_dir_all(&self.place.0)
            .or_host(format_args!("removing {}", self.place.0.display()))
    }

    /// Writes down how it ended; removes it, if nothing is to stay.
    pub fn end(mut self, ended: Ended) -> Result<(), Failure> {
        let _ = self
            .lock
            .write_all_at(format!("{}\n", ended.status).as_bytes(), 0);
        if self.record.remove {
            return self.remove();
        }
        self.record.ended = Some(ended);
        self.place
            .finish(&mut self.record)
            .or_host("writing down how the VM ended")
    }
}

/// Removes what was left of folders whose making was cut off.
fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let new = entry.file_name().to_string_lossy().starts_with(NEW);
        let lock = File::open(entry.path().join(LOCK));
        // One that has no lock yet is somebody's.
        if new && lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Renames a folder to a name that nothing has.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    fs::set_permissions(from, Permissions::from_mode(0o700))?;
    Ok(renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?)
}
