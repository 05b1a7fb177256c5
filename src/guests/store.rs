//! The guests of a user on disk.

use std::env;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::control::valid_name;
use crate::failure::{Failure, OrFail};

/// The symbolic link to the default guest, beside [`GUESTS`].
const DEFAULT: &str = "default";
pub const GUESTS: &str = "guests";
/// Kernels that were fetched for guests, and what the names of their folders begin with.
pub const KERNELS: &str = "kernels";
pub const FETCHED: &str = "debian-";
const LOCK: &str = "guests.lock";
/// What a guest was made from: JSON.
pub const MANIFEST: &str = "guest.json";
pub const KERNEL: &str = "vmlinux";
pub const BOOT_INITRD: &str = "initramfs.cpio";
pub const RUN_INITRD: &str = "run.cpio";
pub const COMPARE_INITRD: &str = "compare.cpio";
pub const PROBE: &str = "probe";
/// The programs inside: PID 1, and what comparisons run. They are found by these names.
pub const INIT_PROGRAM: &str = "mayfly-init";
pub const PROBE_PROGRAM: &str = "mayfly-probe";

/// One version of a file: it is another one if any of this differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileVersion {
    pub path: PathBuf,
    pub bytes: u64,
    pub modified_ns: i128,
}

impl FileVersion {
    pub(super) fn of(path: &Path) -> std::io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let metadata = fs::metadata(&path)?;
        Ok(FileVersion {
            bytes: metadata.len(),
            modified_ns: i128::from(metadata.mtime()) * 1_000_000_000
                + i128::from(metadata.mtime_nsec()),
            path,
        })
    }
}

/// What a guest was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of mayfly that made it.
    pub mayfly: String,
    /// When, in milliseconds since 1970.
    pub made_ms: u64,
    pub kernel: FileVersion,
    /// The folder of the kernel's modules, if any were packed.
    pub modules: Option<PathBuf>,
    /// PID 1.
    pub init: FileVersion,
    pub probe: Option<FileVersion>,
    /// The shell of `mayfly boot`.
    pub busybox: Option<FileVersion>,
}

/// A guest that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    pub(super) folder: PathBuf,
    pub(super) manifest: Option<Manifest>,
}

impl Guest {
    pub(super) fn open(folder: PathBuf) -> Option<Self> {
        if !folder.join(KERNEL).exists() {
            return None;
        }
        let manifest = fs::read(folder.join(MANIFEST)).ok();
        let manifest = manifest.and_then(|text| serde_json::from_slice(&text).ok());
        Some(Guest { folder, manifest })
    }

    /// Its name, or what its folder is called where that is a link.
    pub fn name(&self) -> String {
        let folder = fs::canonicalize(&self.folder).unwrap_or_else(|_| self.folder.clone());
        let name = folder.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The kernel's file.
    pub fn kernel(&self) -> PathBuf {
        self.folder.join(KERNEL)
    }

    /// The initial RAM disk of `mayfly boot`, with a shell.
    pub fn boot_initrd(&self) -> Option<PathBuf> {
        self.file(BOOT_INITRD)
    }

    /// The initial RAM disk of `mayfly run`, with the agent.
    pub fn run_initrd(&self) -> Option<PathBuf> {
        self.file(RUN_INITRD)
    }

    /// The initial RAM disk that other monitors boot in comparisons.
    pub fn compare_initrd(&self) -> Option<PathBuf> {
        self.file(COMPARE_INITRD)
    }

    /// What runs in all engines of a comparison.
    pub fn probe(&self) -> Option<PathBuf> {
        self.file(PROBE)
    }

    /// The kernel's file that it was made from.
    pub fn source(&self) -> Option<&Path> {
        Some(&self.manifest.as_ref()?.kernel.path)
    }

    /// When it was made, in milliseconds since 1970.
    pub fn made_ms(&self) -> Option<u64> {
        Some(self.manifest.as_ref()?.made_ms)
    }

    /// What its files take, in bytes.
    pub fn size(&self) -> u64 {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let sizes = entries.map(|entry| fs::metadata(entry.path()).map_or(0, |it| it.len()));
        sizes.sum()
    }

    /// The folder of the kernel that was fetched for it, if one was.
    pub(super) fn fetched_kernel(&self, kernels: &Path) -> Option<PathBuf> {
        let folder = self.source()?.parent()?;
        let fetched = folder.file_name()?.to_str()?.starts_with(FETCHED);
        let kernels = fs::canonicalize(kernels).ok()?;
        (fetched && folder.parent()? == kernels).then(|| folder.to_owned())
    }

    /// Whether it was made by another mayfly, or with another PID 1, than there is now.
    /// A guest that was put there by hand never is.
    pub(super) fn is_outdated(&self) -> bool {
        let Some(manifest) = &self.manifest else {
            return false;
        };
        let init = program(INIT_PROGRAM).and_then(|path| FileVersion::of(&path).ok());
        manifest.mayfly != env!("CARGO_PKG_VERSION")
            || init.is_some_and(|init| init.path == manifest.init.path && init != manifest.init)
    }

    pub(super) fn file(&self, name: &str) -> Option<PathBuf> {
        Some(self.folder.join(name)).filter(|path| path.exists())
    }
}

/// All guests of a user.
pub struct Guests {
    pub(super) cache: PathBuf,
}

impl Guests {
    /// Those in the user's cache.
    pub fn locate() -> Result<Self, Failure> {
        let cache = cache_folder().ok_or_else(|| {
            Failure::config("no folder for guests: set HOME, XDG_CACHE_HOME or MAYFLY_CACHE")
        })?;
        Ok(Guests { cache })
    }

    /// The default guest, if there is one.
    pub fn default_guest(&self) -> Option<Guest> {
        Guest::open(self.cache.join(DEFAULT))
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<Guest> {
        let entries = fs::read_dir(self.cache.join(GUESTS));
        let entries = entries.into_iter().flatten().flatten();
        let visible = entries.filter(|it| it.file_name().to_str().is_some_and(valid_name));
        let mut all: Vec<_> = visible.filter_map(|it| Guest::open(it.path())).collect();
        all.sort_by(|a, b| a.folder.cmp(&b.folder));
        all
    }

    /// Makes a guest the default.
    pub fn choose(&self, name: &str) -> Result<(), Failure> {
        let _lock = self.lock()?;
        self.find(name)?;
        self.point_to(name)
    }

    /// Removes a guest; the default one leaves none behind it.
    pub fn remove(&self, name: &str) -> Result<(), Failure> {
        let _lock = self.lock()?;
        let guest = self.find(name)?;
        let default = self.cache.join(DEFAULT);
        if fs::canonicalize(&default).ok() == fs::canonicalize(&guest.folder).ok() {
            fs::remove_file(&default).or_host(default.display())?;
        }
        fs::remove_dir_all(&guest.folder).or_host(guest.folder.display())?;
        let kernels = self.cache.join(KERNELS);
        let Some(kernel) = guest.fetched_kernel(&kernels) else {
            return Ok(());
        };
        // It may be made anew from it, as after an upgrade.
        let same = |other: &Guest| other.fetched_kernel(&kernels).as_ref() == Some(&kernel);
        match self.list().iter().any(same) {
            true => Ok(()),
            false => fs::remove_dir_all(&kernel).or_host(kernel.display()),
        }
    }

    pub(super) fn find(&self, name: &str) -> Result<Guest, Failure> {
        let folder = self.cache.join(GUESTS).join(name);
        let known = valid_name(name).then(|| Guest::open(folder)).flatten();
        known.ok_or_else(|| Failure::config(format!("{name}: no such guest; see mayfly guest ls")))
    }

    /// Lets the default be a guest, at one moment.
    pub(super) fn point_to(&self, name: &str) -> Result<(), Failure> {
        let link = self.cache.join(DEFAULT);
        let what = link.display().to_string();
        // Older versions had a folder there.
        if fs::symlink_metadata(&link).is_ok_and(|it| it.is_dir()) {
            fs::remove_dir_all(&link).or_host(&what)?;
        }
        let fresh = self
            .cache
            .join(format!(".{DEFAULT}-{}", std::process::id()));
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).or_host(&what),
            _ => {}
        }
        symlink(Path::new(GUESTS).join(name), &fresh).or_host(&what)?;
        fs::rename(&fresh, &link).or_host(&what)
    }

    /// Whoever changes something does so alone.
    pub(super) fn lock(&self) -> Result<File, Failure> {
        fs::create_dir_all(self.cache.join(GUESTS)).or_host(self.cache.display())?;
        let path = self.cache.join(LOCK);
        let lock = File::create(&path).or_host(path.display())?;
        lock.lock().or_host(path.display())?;
        Ok(lock)
    }
}

/// Where a program for guests is: installed beside this one, or built in its clone.
pub fn program(name: &str) -> Option<PathBuf> {
    let own = env::current_exe().ok()?;
    let folder = own.parent()?.parent()?;
    let installed = folder.join("lib/mayfly").join(name);
    let built = folder.join("guest/x86_64-unknown-linux-gnu/release");
    [installed, built.join(name)]
        .into_iter()
        .find(|path| path.is_file())
}

/// Where mayfly keeps what can be made again.
pub fn cache_folder() -> Option<PathBuf> {
    let variable = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("MAYFLY_CACHE").or_else(|| {
        variable("XDG_CACHE_HOME")
            .or_else(|| variable("HOME").map(|home| home.join(".cache")))
            .map(|cache| cache.join("mayfly"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guests() -> (tempfile::TempDir, Guests) {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().to_owned();
        (folder, Guests { cache })
    }

    fn put(guests: &Guests, name: &str) {
        let folder = guests.cache.join(GUESTS).join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(KERNEL), name).unwrap();
    }

    #[test]
    fn one_of_them_is_the_default() {
        let (_folder, guests) = guests();
        assert!(guests.default_guest().is_none() && guests.list().is_empty());
        put(&guests, "a");
        put(&guests, "b");
        put(&guests, ".b.new");
        let names: Vec<_> = guests.list().iter().map(Guest::name).collect();
        assert_eq!(names, ["a", "b"]);
        guests.choose("a").unwrap();
        guests.choose("b").unwrap();
        let default = guests.default_guest().unwrap();
        assert_eq!(default.name(), "b");
        assert_eq!(fs::read(default.kernel()).unwrap(), b"b");
        assert!(default.run_initrd().is_none());
        guests.remove("a").unwrap();
        assert!(guests.default_guest().is_some());
        guests.remove("b").unwrap();
        assert!(guests.default_guest().is_none() && guests.list().is_empty());
        for name in ["a", "../x", "", ".", "default/x"] {
            assert!(guests.choose(name).is_err(), "{name}");
            assert!(guests.remove(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_fetched_kernel_goes_with_the_last_guest_made_from_it() {
        let (_folder, guests) = guests();
        let kernel = guests.cache.join(KERNELS).join("debian-6.12/vmlinuz");
        fs::create_dir_all(kernel.parent().unwrap()).unwrap();
        fs::write(&kernel, "kernel").unwrap();
        let version = FileVersion::of(&kernel).unwrap();
        for name in ["a", "b"] {
            put(&guests, name);
            let manifest = Manifest {
                mayfly: String::new(),
                made_ms: 0,
                kernel: version.clone(),
                modules: None,
                init: version.clone(),
                probe: None,
                busybox: None,
            };
            let text = serde_json::to_vec(&manifest).unwrap();
            let folder = guests.cache.join(GUESTS).join(name);
            fs::write(folder.join(MANIFEST), text).unwrap();
        }
        guests.remove("a").unwrap();
        assert!(kernel.exists());
        guests.remove("b").unwrap();
        assert!(!kernel.parent().unwrap().exists());
    }

    #[test]
    fn a_folder_of_an_older_version_gives_way() {
        let (_folder, guests) = guests();
        let old = guests.cache.join(DEFAULT);
        fs::create_dir_all(&old).unwrap();
        fs::write(old.join(KERNEL), "old").unwrap();
        assert!(!guests.default_guest().unwrap().is_outdated());
        put(&guests, "new");
        guests.choose("new").unwrap();
        assert_eq!(guests.default_guest().unwrap().name(), "new");
    }

    #[test]
    fn a_file_that_changed_is_another() {
        let (folder, _) = guests();
        let path = folder.path().join("init");
        fs::write(&path, "1").unwrap();
        let version = FileVersion::of(&path).unwrap();
        assert_eq!(FileVersion::of(&path).unwrap(), version);
        fs::write(&path, "12").unwrap();
        assert_ne!(FileVersion::of(&path).unwrap(), version);
    }
}
