//! The templates of a user: machines that are ready to run an image.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mayfly_files::{Directory, Work, lock, sync_parent};
use mayfly_image::Digest;
use mayfly_text::printable;

use super::super::format::FILE_MAX;
use super::super::memory;
use super::entry::{Entry, MEMORY, NewEntry, STATE};
use super::file_digest::FileDigests;
use super::key::TemplateKey;
use super::manifest::{TEMPLATE_VERSION, TemplateManifest, now_ms};
use crate::failure::{Failure, OrFail};
use crate::guests::cache_folder;

/// The folder of templates in the cache folder.
const TEMPLATES: &str = "templates";
/// Those that are taken.
const READY: &str = "ready";
/// Those that failed. They are not taken, and go first.
const FAILED: &str = "failed";
/// Held by who makes one: only one is made at a time.
const MAKING: &str = "making";
/// The digests of kernels and initramfs.
const DIGESTS: &str = "digests.json";
/// Why one failed.
const FAILURE: &str = "failure";
/// The longest reason that is kept, in bytes.
const FAILURE_MAX: usize = 1000;

/// What all templates may take on disk together, in bytes, when one is made.
pub const BUDGET: u64 = 2 << 30;
/// No template is made where the file system would have less left, in bytes.
const FREE_MIN: u64 = 1 << 30;
/// One that failed is not made again earlier: it would fail again.
const RETRY_AFTER: Duration = Duration::from_secs(3600);

/// The templates of a user.
#[derive(Debug)]
pub struct Templates {
    directory: Directory,
    root: PathBuf,
}

/// A template that is there, and stays as long as this does.
#[derive(Debug)]
pub struct Template {
    /// What it is.
    pub manifest: TemplateManifest,
    /// The guest's memory, to be read.
    pub memory: File,
    /// The rest of its state, to be read.
    pub state: File,
    entry: Entry,
}

/// Why no template is taken.
#[derive(Debug)]
pub enum Miss {
    /// There is none at all.
    Empty,
    /// None fits; in this the nearest differs.
    Different(Vec<&'static str>),
    /// The one that fits was set aside, as it failed.
    SetAside(String),
    /// The one that fits cannot be used.
    Unusable(Failure),
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Miss::Empty => f.write_str("there is no template yet"),
            Miss::Different(parts) => write!(
                f,
                "no template fits; the nearest differs in {}",
                parts.join(", ")
            ),
            Miss::SetAside(why) => write!(f, "its template was set aside: {why}"),
            Miss::Unusable(failure) => write!(f, "its template cannot be used: {failure}"),
        }
    }
}

/// One of a list.
#[derive(Debug)]
pub struct Listed {
    /// Its name: the digest of its key.
    pub name: Digest,
    /// What it is, unless that cannot be read.
    pub manifest: Option<TemplateManifest>,
    /// The bytes that it takes on disk.
    pub bytes: u64,
    /// The time of its last use.
    pub used: SystemTime,
    /// Something runs from it.
    pub busy: bool,
    /// Why it is not taken any more.
    pub failure: Option<String>,
    path: PathBuf,
}

impl Templates {
    /// Those of the user: `templates` in the cache folder.
    pub fn open_default() -> Result<Self, Failure> {
        let cache = cache_folder()
            .ok_or_else(|| Failure::host("templates: set HOME, XDG_CACHE_HOME or MAYFLY_CACHE"))?;
        Self::open(&cache.join(TEMPLATES))
    }

    /// Those of a folder, which is made if it is missing.
    pub fn open(root: &Path) -> Result<Self, Failure> {
        let what = || format!("templates {}", root.display());
        let directory = Directory::open(root, &[READY, FAILED]).or_host(what())?;
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(directory.path(MAKING))
            .or_host(what())?;
        let root = root.to_owned();
        Ok(Templates { directory, root })
    }

    fn failed(&self) -> impl fmt::Display {
        format!("templates {}", self.root.display())
    }

    fn ready(&self, name: &Digest) -> PathBuf {
        self.directory.path(READY).join(name.hex())
    }

    fn set_aside_path(&self, name: &Digest) -> PathBuf {
        self.directory.path(FAILED).join(name.hex())
    }

    /// The digests of files, to make keys of.
    pub fn digests(&self) -> FileDigests {
        FileDigests::open(&self.directory, DIGESTS)
    }

    /// Remembers digests for the next start.
    pub fn keep_digests(&self, digests: &FileDigests) -> Result<(), Failure> {
        digests.write(&self.directory)
    }

    /// The template of a key, or why there is none. One that cannot be used is set aside, so
    /// that another is made in its place.
    pub fn find(&self, key: &TemplateKey) -> Result<Template, Miss> {
        let name = key.digest().map_err(Miss::Unusable)?;
        let found = self.open_ready(&name).and_then(|found| match found {
            Some(template) if template.manifest.key != *key => {
                Err(Failure::host(format!("{}: another key", self.failed())))
            }
            found => Ok(found),
        });
        let template = match found {
            Ok(Some(template)) => template,
            Ok(None) => return Err(self.miss(key, &name)),
            Err(failure) => {
                if let Err(error) = self.set_unusable_aside(&name, &failure.to_string()) {
                    log::warn!("{}: setting one aside: {error}", self.failed());
                }
                return Err(Miss::Unusable(failure));
            }
        };
        if let Err(error) = template.entry.note_use() {
            log::debug!("{}: noting its use: {error}", self.failed());
        }
        Ok(template)
    }

    fn open_ready(&self, name: &Digest) -> Result<Option<Template>, Failure> {
        let path = self.ready(name);
        let what = || format!("template {}", path.display());
        let Some(entry) = Entry::hold(&path).or_host(what())? else {
            return Ok(None);
        };
        let manifest: TemplateManifest = entry.manifest(TEMPLATE_VERSION).or_host(what())?;
        let memory = entry.file(MEMORY).or_host(what())?;
        memory::check(&memory, manifest.memory_bytes).or_host(what())?;
        let state = entry.file(STATE).or_host(what())?;
        if state.metadata().or_host(what())?.len() != manifest.state_bytes {
            return Err(Failure::host(format!(
                "{}: its state file has another length",
                what()
            )));
        }
        Ok(Some(Template {
            manifest,
            memory,
            state,
            entry,
        }))
    }

    /// Why nothing fits.
    fn miss(&self, key: &TemplateKey, name: &Digest) -> Miss {
        if let Some(why) = failure(&self.set_aside_path(name)) {
            return Miss::SetAside(why);
        }
        let all = match self.list() {
            Ok(all) => all,
            Err(failure) => return Miss::Unusable(failure),
        };
        let keys = all.iter().filter_map(|it| Some(&it.manifest.as_ref()?.key));
        let differences = keys.map(|other| key.differences(other));
        match differences.min_by_key(Vec::len) {
            Some(parts) => Miss::Different(parts),
            None => Miss::Empty,
        }
    }

    /// All of them, those that were used last first.
    pub fn list(&self) -> Result<Vec<Listed>, Failure> {
        let mut all = Vec::new();
        for part in [READY, FAILED] {
            for entry in fs::read_dir(self.directory.path(part)).or_host(self.failed())? {
                let path = entry.or_host(self.failed())?.path();
                let name = path.file_name().and_then(|name| name.to_str());
                let Some(name) = name.and_then(Digest::from_hex) else {
                    continue;
                };
                // It may be removed meanwhile.
                let Some(one) = listed(&path, name).or_host(self.failed())? else {
                    continue;
                };
                let failure = (part == FAILED).then(|| failure(&path).unwrap_or_default());
                all.push(Listed { failure, ..one });
            }
        }
        all.sort_by(|a, b| b.used.cmp(&a.used).then(a.name.hex().cmp(&b.name.hex())));
        Ok(all)
    }

    /// Begins to make the template of a key. `None` if there is one, if somebody makes one
    /// at present, or if the last one has failed lately.
    pub fn make(&self, key: &TemplateKey) -> Result<Option<NewTemplate<'_>>, Failure> {
        let name = key.digest()?;
        let Some(making) = lock::take(&self.directory.path(MAKING)).or_host(self.failed())? else {
            return Ok(None);
        };
        self.directory.clean().or_host(self.failed())?;
        if self.ready(&name).exists() || self.failed_lately(&name) {
            return Ok(None);
        }
        let space = rustix::fs::statvfs(&self.root).or_host(self.failed())?;
        if space.f_bavail.saturating_mul(space.f_frsize) < FREE_MIN {
            return Err(Failure::host(format!(
                "{}: the disk has less than {} MiB left",
                self.failed(),
                FREE_MIN >> 20
            )));
        }
        let work = self.directory.work().or_host(self.failed())?;
        // Not the folder that is locked: its new name must not be.
        let mut entry = NewEntry::create(&work.path().join("new")).or_host(self.failed())?;
        let memory = entry.add(MEMORY).or_host(self.failed())?;
        let state = entry.add(STATE).or_host(self.failed())?;
        Ok(Some(NewTemplate {
            memory,
            state,
            templates: self,
            key: key.clone(),
            name,
            entry,
            work,
            _making: making,
        }))
    }

    /// Whether it makes sense to make the template of a key: not so soon after the last one
    /// failed, or could not be made.
    pub fn may_make(&self, key: &TemplateKey) -> bool {
        key.digest().is_ok_and(|name| !self.failed_lately(&name))
    }

    fn failed_lately(&self, name: &Digest) -> bool {
        is_recent(&self.set_aside_path(name))
    }

    /// Sets a template aside that failed: it is not taken again, and not made again for a
    /// while.
    pub fn set_aside(&self, template: Template, why: &str) -> Result<(), Failure> {
        let name = template.manifest.key.digest()?;
        let _lock = self.directory.lock().or_host(self.failed())?;
        let same = Entry::hold(&self.ready(&name)).or_host(self.failed())?;
        match same.is_some_and(|found| found.is(&template.entry)) {
            true => self.move_aside(&name, why),
            // Another process was faster.
            false => Ok(()),
        }
    }

    /// Sets aside what cannot be opened, unless it can by now.
    fn set_unusable_aside(&self, name: &Digest, why: &str) -> Result<(), Failure> {
        let _lock = self.directory.lock().or_host(self.failed())?;
        match self.open_ready(name) {
            Ok(None) => Ok(()),
            Ok(Some(template)) if template.manifest.key.digest()? == *name => Ok(()),
            _ => self.move_aside(name, why),
        }
    }

    /// Moves a template to those that failed. The caller holds the folder's lock.
    fn move_aside(&self, name: &Digest, why: &str) -> Result<(), Failure> {
        let (from, to) = (self.ready(name), self.set_aside_path(name));
        if to.exists() {
            self.directory.discard(&to).or_host(self.failed())?;
        }
        // First, so that it is not taken even where nothing can be written any more.
        fs::rename(&from, &to).or_host(self.failed())?;
        write_failure(&to, why).or_host(self.failed())
    }

    /// Notes that the template of a name could not be made.
    fn note_failure(&self, name: &Digest, why: &str) -> Result<(), Failure> {
        let _lock = self.directory.lock().or_host(self.failed())?;
        let folder = self.set_aside_path(name);
        if !folder.exists() {
            DirBuilder::new()
                .mode(0o700)
                .create(&folder)
                .or_host(self.failed())?;
        }
        write_failure(&folder, why).or_host(self.failed())
    }

    /// Removes the template whose name begins so. Fails if several do, or one is in use.
    pub fn remove(&self, start: &str) -> Result<Digest, Failure> {
        let _lock = self.directory.lock().or_host(self.failed())?;
        let what = format!("template {start}");
        let mut found = self.list()?;
        found.retain(|it| !start.is_empty() && it.name.hex().starts_with(start));
        // One that failed may have a successor of its name: both go.
        let Some(first) = found.first() else {
            return Err(Failure::config(format!(
                "{what}: there is none; see mayfly template ls"
            )));
        };
        if found.iter().any(|it| it.name != first.name) {
            return Err(Failure::config(format!(
                "{what}: several begin so; write more of it"
            )));
        }
        for it in &found {
            let taken = lock::take_patiently(&it.path).or_host(self.failed())?;
            let _held = taken.ok_or_else(|| Failure::config(format!("{what}: a VM uses it")))?;
            self.directory.discard(&it.path).or_host(self.failed())?;
        }
        Ok(first.name)
    }

    /// Removes those that failed, then those that were not used for longest, until the
    /// others take no more than `budget` bytes. Those in use stay, and so does the word that
    /// one has failed lately. The result is what went.
    pub fn prune(&self, budget: u64) -> Result<Vec<Listed>, Failure> {
        self.directory.clean().or_host(self.failed())?;
        let _lock = self.directory.lock().or_host(self.failed())?;
        let mut all = self.list()?;
        let mut bytes: u64 = all.iter().map(|it| it.bytes).sum();
        all.reverse();
        all.sort_by_key(|it| it.failure.is_none());
        let mut gone = Vec::new();
        for it in all {
            if bytes <= budget && it.failure.is_none() {
                continue;
            }
            if let Some(_held) = lock::take(&it.path).or_host(self.failed())? {
                if it.failure.is_none() || !is_recent(&it.path) {
                    self.directory.discard(&it.path).or_host(self.failed())?;
                } else if !remove_content(&it.path).or_host(self.failed())? {
                    continue;
                }
                bytes = bytes.saturating_sub(it.bytes);
                gone.push(it);
            }
        }
        Ok(gone)
    }
}

/// Removes what a template that failed has, but for the reason. False if there is nothing.
fn remove_content(folder: &Path) -> io::Result<bool> {
    let mut found = false;
    for file in [MEMORY, STATE] {
        match fs::remove_file(folder.join(file)) {
            Ok(()) => found = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Whether a template failed less than [`RETRY_AFTER`] ago.
fn is_recent(folder: &Path) -> bool {
    let written = fs::metadata(folder.join(FAILURE));
    // Where the reason could not be written, the folder's time tells.
    let written = written.or_else(|_| fs::metadata(folder));
    let written = written.and_then(|it| it.modified());
    written.is_ok_and(|time| time.elapsed().is_ok_and(|age| age < RETRY_AFTER))
}

/// Writes why a template failed, or could not be made.
fn write_failure(folder: &Path, why: &str) -> io::Result<()> {
    let why = printable::lines(why.as_bytes());
    let why: String = why.chars().take(FAILURE_MAX).collect();
    fs::write(folder.join(FAILURE), why)
}

/// Why a template failed, if it did.
fn failure(path: &Path) -> Option<String> {
    let why = fs::read(path.join(FAILURE)).ok()?;
    Some(printable::lines(why.get(..FAILURE_MAX).unwrap_or(&why)))
}

/// What there is to tell of a folder.
fn listed(path: &Path, name: Digest) -> io::Result<Option<Listed>> {
    let busy = lock::take(path)?.is_none();
    let entry = match Entry::hold(path) {
        Ok(None) => return Ok(None),
        Ok(Some(entry)) => Some(entry),
        // One that is not taken is listed, so that it can be removed.
        Err(_) => None,
    };
    let entry = entry.as_ref();
    Ok(Some(Listed {
        name,
        manifest: entry.and_then(|entry| entry.manifest(TEMPLATE_VERSION).ok()),
        bytes: entry.map_or(Ok(0), Entry::bytes)?,
        used: entry.map_or(Ok(SystemTime::UNIX_EPOCH), Entry::used)?,
        busy,
        failure: None,
        path: path.to_owned(),
    }))
}

/// A template that is being made. If it is dropped, nothing is left of it.
#[derive(Debug)]
pub struct NewTemplate<'a> {
    /// Where the guest's memory goes.
    pub memory: File,
    /// Where the rest of its state goes.
    pub state: File,
    templates: &'a Templates,
    key: TemplateKey,
    name: Digest,
    entry: NewEntry,
    work: Work,
    _making: File,
}

impl NewTemplate<'_> {
    /// Notes why it could not be made, so that it is not tried again at once.
    pub fn fail(self, why: &str) -> Result<(), Failure> {
        self.templates.note_failure(&self.name, why)
    }

    /// A folder for what its making needs, which goes with it.
    pub fn work(&self) -> &Path {
        self.work.path()
    }

    /// Lets it be taken, when both files are written. Older ones go where all of them
    /// take more than [`BUDGET`].
    pub fn publish(self) -> Result<Template, Failure> {
        let templates = self.templates;
        let what = || format!("template {}", self.name.hex());
        let memory_bytes = self.key.machine.memory.size;
        memory::check(&self.memory, memory_bytes).or_host(what())?;
        let state_bytes = self.state.metadata().or_host(what())?.len();
        let state_max = u64::try_from(FILE_MAX).unwrap_or(u64::MAX);
        if !(1..=state_max).contains(&state_bytes) {
            return Err(Failure::new(
                crate::failure::Class::Internal,
                format!("{}: a state file of {state_bytes} bytes", what()),
            ));
        }
        let manifest = TemplateManifest {
            version: TEMPLATE_VERSION,
            key: self.key,
            made_ms: now_ms(),
            made_by: env!("CARGO_PKG_VERSION").into(),
            memory_bytes,
            state_bytes,
        };
        let made = self.entry.complete(&manifest).or_host(what())?;
        let target = templates.ready(&self.name);
        let template = {
            let _lock = templates.directory.lock().or_host(what())?;
            fs::rename(&made, &target).or_host(what())?;
            sync_parent(&target).or_host(what())?;
            let old = templates.set_aside_path(&self.name);
            if old.exists() {
                templates.directory.discard(&old).or_host(what())?;
            }
            templates.open_ready(&self.name)?
        };
        let gone = || Failure::host(format!("{}: it was removed at once", what()));
        let template = template.ok_or_else(gone)?;
        templates.prune(BUDGET)?;
        Ok(template)
    }
}
