//! The named snapshots of a user.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use mayfly_files::{Directory, Work, lock, sync_parent};

use super::entry::{Entry, MEMORY, NewEntry, STATE};
use super::export::{ExportError, read_end, read_manifest, read_part, write};
use super::host::Host;
use super::manifest::{DiskPart, Part, SNAPSHOT_VERSION, SnapshotManifest, disk_file, now_ms};
use super::parts::digest;
use crate::control::{NAME_MAX, valid_name};
use crate::data_folder::data_folder;
use crate::failure::{Class, Failure, OrFail};
use crate::spec::MachineSpec;

/// The folder of snapshots in the data folder.
const SNAPSHOTS: &str = "snapshots";
/// Those that are complete, by name.
const NAMED: &str = "named";

/// The snapshots of a user.
#[derive(Debug)]
pub struct Snapshots {
    directory: Directory,
    root: PathBuf,
}

/// A snapshot that is there, and stays as long as this does.
#[derive(Debug)]
pub struct Snapshot {
    /// What it is.
    pub manifest: SnapshotManifest,
    /// The guest's memory, to be read.
    pub memory: File,
    /// The rest of its state, to be read.
    pub state: File,
    /// Its disks in the manifest's order, to be read.
    pub disks: Vec<File>,
    entry: Entry,
}

/// What a snapshot is of.
#[derive(Clone, Debug)]
pub struct Source {
    /// The VM's name.
    pub name: String,
    /// The machine, as its guest sees it.
    pub machine: MachineSpec,
    /// The host that it runs on.
    pub host: Host,
}

/// One of a list.
#[derive(Debug)]
pub struct ListedSnapshot {
    /// Its name.
    pub name: String,
    /// What it is, unless that cannot be read.
    pub manifest: Option<SnapshotManifest>,
    /// The bytes that it takes on disk.
    pub bytes: u64,
    /// Something runs from it, or reads it.
    pub busy: bool,
}

impl Snapshots {
    /// Those of the user: `snapshots` in the data folder.
    pub fn open_default() -> Result<Self, Failure> {
        Self::open(&data_folder()?.join(SNAPSHOTS))
    }

    /// Those of a folder, which is made if it is missing.
    pub fn open(root: &Path) -> Result<Self, Failure> {
        let what = || format!("snapshots {}", root.display());
        let directory = Directory::open(root, &[NAMED]).or_host(what())?;
        directory.clean().or_host(what())?;
        let root = root.to_owned();
        Ok(Snapshots { directory, root })
    }

    fn failed(&self) -> String {
        format!("snapshots {}", self.root.display())
    }

    fn path(&self, name: &str) -> Result<PathBuf, Failure> {
        match valid_name(name) {
            true => Ok(self.directory.path(NAMED).join(name)),
            false => Err(Failure::config(format!(
                "snapshot {name}: write 1 to {NAME_MAX} letters, digits, and . _ -"
            ))),
        }
    }

    /// The snapshot of a name.
    pub fn find(&self, name: &str) -> Result<Snapshot, Failure> {
        let path = self.path(name)?;
        let what = || format!("snapshot {name}");
        let entry = Entry::hold(&path).or_host(what())?;
        let entry = entry.ok_or_else(|| none_of(name))?;
        let manifest: SnapshotManifest = entry.manifest(SNAPSHOT_VERSION).or_host(what())?;
        let impossible = |why| Failure::host(format!("{}: {why}", what()));
        manifest.check().map_err(impossible)?;
        let mut files = Vec::new();
        for (name, part) in manifest.parts() {
            let file = entry.file(&name).or_host(what())?;
            if file.metadata().or_host(what())?.len() != part.bytes {
                return Err(impossible(format!("its {name} has another length")));
            }
            files.push(file);
        }
        let mut files = files.into_iter();
        let (Some(memory), Some(state)) = (files.next(), files.next()) else {
            return Err(impossible("it has no files".into()));
        };
        Ok(Snapshot {
            manifest,
            memory,
            state,
            disks: files.collect(),
            entry,
        })
    }

    /// All of them, by name.
    pub fn list(&self) -> Result<Vec<ListedSnapshot>, Failure> {
        let mut all = Vec::new();
        for entry in fs::read_dir(self.directory.path(NAMED)).or_host(self.failed())? {
            let path = entry.or_host(self.failed())?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(name) = name.filter(|name| valid_name(name)) else {
                continue;
            };
            let busy = lock::take(&path).or_host(self.failed())?.is_none();
            let entry = match Entry::hold(&path) {
                // It was removed meanwhile.
                Ok(None) => continue,
                Ok(Some(entry)) => Some(entry),
                Err(_) => None,
            };
            let entry = entry.as_ref();
            all.push(ListedSnapshot {
                name: name.to_owned(),
                manifest: entry.and_then(|entry| entry.manifest(SNAPSHOT_VERSION).ok()),
                bytes: entry.map_or(Ok(0), Entry::bytes).or_host(self.failed())?,
                busy,
            });
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Removes one that nothing uses.
    pub fn remove(&self, name: &str) -> Result<(), Failure> {
        let path = self.path(name)?;
        let _lock = self.directory.lock().or_host(self.failed())?;
        if !path.exists() {
            return Err(none_of(name));
        }
        let taken = lock::take_patiently(&path).or_host(self.failed())?;
        let in_use = || Failure::config(format!("snapshot {name}: a VM or a command uses it"));
        let _held = taken.ok_or_else(in_use)?;
        self.directory.discard(&path).or_host(self.failed())
    }

    /// Begins to make one.
    pub fn create(&self, name: &str) -> Result<NewSnapshot<'_>, Failure> {
        let target = self.path(name)?;
        if target.exists() {
            return Err(taken(name));
        }
        let work = self.directory.work().or_host(self.failed())?;
        // Not the folder that is locked: its new name must not be.
        let mut entry = NewEntry::create(&work.path().join("new")).or_host(self.failed())?;
        let memory = entry.add(MEMORY).or_host(self.failed())?;
        let state = entry.add(STATE).or_host(self.failed())?;
        Ok(NewSnapshot {
            memory,
            state,
            disks: Vec::new(),
            snapshots: self,
            name: name.to_owned(),
            target,
            entry,
            _work: work,
        })
    }

    /// Writes a snapshot as one file.
    pub fn export(&self, snapshot: &Snapshot, output: &mut dyn Write) -> Result<(), Failure> {
        let mut files = vec![&snapshot.memory, &snapshot.state];
        files.extend(&snapshot.disks);
        let what = format_args!("snapshot {}", snapshot.manifest.name);
        write(&snapshot.manifest, &files, output).or_host(what)
    }

    /// Takes a snapshot from an export, under the name that it has there, or another one.
    /// Nothing of it is seen until every byte was checked.
    pub fn import(&self, input: &mut dyn Read, name: Option<&str>) -> Result<Snapshot, Failure> {
        let mut manifest = read_manifest(input).map_err(refused)?;
        manifest.name = name.unwrap_or(&manifest.name).to_owned();
        let mut new = self.create(&manifest.name)?;
        for disk in &manifest.disks {
            new.add_disk(&disk.device)?;
        }
        let NewSnapshot {
            memory,
            state,
            disks,
            ..
        } = &new;
        let disks = disks.iter().map(|(_, file)| file);
        let files = [memory, state].into_iter().chain(disks);
        for ((part_name, part), file) in manifest.parts().into_iter().zip(files) {
            read_part(input, &part_name, part, file).map_err(refused)?;
        }
        read_end(input).map_err(refused)?;
        new.complete(&manifest)
    }
}

/// Why an import fails: because of the file, or because of the host.
fn refused(error: ExportError) -> Failure {
    let class = match &error {
        ExportError::Io(_) | ExportError::Write(_) => Class::Host,
        _ => Class::Config,
    };
    Err::<(), _>(error)
        .or_fail(class, "snapshot import")
        .err()
        .unwrap_or_else(|| Failure::new(class, "snapshot import"))
}

fn none_of(name: &str) -> Failure {
    Failure::config(format!(
        "snapshot {name}: there is none; see mayfly snapshot ls"
    ))
}

fn taken(name: &str) -> Failure {
    Failure::config(format!("snapshot {name}: there is one of that name"))
}

impl Snapshot {
    /// The bytes that it takes on disk.
    pub fn bytes(&self) -> Result<u64, Failure> {
        let what = format_args!("snapshot {}", self.manifest.name);
        self.entry.bytes().or_host(what)
    }
}

/// A snapshot that is being made. If it is dropped, nothing is left of it.
#[derive(Debug)]
pub struct NewSnapshot<'a> {
    /// Where the guest's memory goes.
    pub memory: File,
    /// Where the rest of its state goes.
    pub state: File,
    /// Where the disks' contents go, with their devices' names.
    pub disks: Vec<(String, File)>,
    snapshots: &'a Snapshots,
    name: String,
    target: PathBuf,
    entry: NewEntry,
    _work: Work,
}

impl NewSnapshot<'_> {
    /// Adds a disk, whose content the caller writes.
    pub fn add_disk(&mut self, device: &str) -> Result<&File, Failure> {
        let what = format!("snapshot {}", self.name);
        let file = self.entry.add(&disk_file(self.disks.len())).or_host(what)?;
        self.disks.push((device.to_owned(), file));
        let (_, file) = self.disks.last().ok_or_else(|| none_of(&self.name))?;
        Ok(file)
    }

    /// Lets it be used, when all of its files are written.
    pub fn publish(self, source: Source) -> Result<Snapshot, Failure> {
        let what = format!("snapshot {}", self.name);
        let part = |file: &File| {
            let bytes = file.metadata().or_host(&what)?.len();
            let sha256 = digest(file, bytes).or_host(&what)?;
            Ok::<_, Failure>(Part { bytes, sha256 })
        };
        let disk = |(device, file): &(String, File)| {
            let (device, content) = (device.clone(), part(file)?);
            Ok::<_, Failure>(DiskPart { device, content })
        };
        let manifest = SnapshotManifest {
            version: SNAPSHOT_VERSION,
            name: self.name.clone(),
            source: source.name,
            made_ms: now_ms(),
            made_by: env!("CARGO_PKG_VERSION").into(),
            machine: source.machine,
            host: source.host,
            memory: part(&self.memory)?,
            state: part(&self.state)?,
            disks: self.disks.iter().map(disk).collect::<Result<_, _>>()?,
        };
        self.complete(&manifest)
    }

    fn complete(self, manifest: &SnapshotManifest) -> Result<Snapshot, Failure> {
        let what = format!("snapshot {}", self.name);
        let impossible = |why| Failure::config(format!("{what}: {why}"));
        manifest.check().map_err(impossible)?;
        let made = self.entry.complete(manifest).or_host(&what)?;
        let _lock = self.snapshots.directory.lock().or_host(&what)?;
        if self.target.exists() {
            return Err(taken(&self.name));
        }
        fs::rename(&made, &self.target).or_host(&what)?;
        sync_parent(&self.target).or_host(&what)?;
        self.snapshots.find(&self.name)
    }
}
