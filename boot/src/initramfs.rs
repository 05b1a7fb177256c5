//! Builds an initramfs: a newc archive with an init and kernel modules
//! (Linux' `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Modules are resolved through `modules.dep` and unpacked here, so that the
//! guest only has to load them in the order of [`MODULE_LIST`].

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use cpio::newc;

use crate::decoders::{unxz, unzstd};
use crate::module;

/// Where the guest's init finds the modules' paths, in the order to load them.
/// Behind a path may be how the names of devices begin that it is for: without
/// one of these it is not loaded.
pub const MODULE_LIST: &str = "etc/mayfly/modules";
/// The same for modules that the guest's work does not wait for.
pub const LATER_LIST: &str = "etc/mayfly/modules-later";
/// What a guest needs for mayfly's devices. The first brings the others up.
pub const DEFAULT_MODULES: [&str; 7] = [
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio-rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
];
/// What tells of a panic, and of the power button.
pub const LATER_MODULES: [&str; 2] = ["pvpanic-mmio", "button"];
/// Drivers of this bus are only loaded for the devices that are there.
const BUS: &str = "virtio:";

const DIRECTORIES: [&str; 11] = [
    "bin",
    "dev",
    "etc/mayfly",
    "lib/modules",
    "mnt",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "sbin",
];
const S_IFCHR: u32 = 0o020_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
/// What init needs before it mounts /dev: with no console it is started with
/// nothing open, and opens the other one for it.
const DEVICES: [(&str, u32, u32); 2] = [("dev/console", 5, 1), ("dev/null", 1, 3)];

/// Why an initramfs could not be built.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// A file could not be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A module is neither built in nor a file.
    #[error("no module {0} in the kernel's modules.dep or modules.builtin")]
    NoModule(String),
    /// A module is packed in an unknown way.
    #[error("{}: only .ko, .ko.xz and .ko.zst modules are supported", .0.display())]
    UnknownModule(PathBuf),
    /// A module could not be unpacked.
    #[error("unpacking {}: {reason}", path.display())]
    Unpack {
        /// The file.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
    /// A path that an archive cannot hold.
    #[error("{0:?} is not a path below the guest's root")]
    Path(String),
    /// A file too large for the format.
    #[error("{0} is larger than the format's 4 GiB")]
    TooLarge(String),
    /// The archive could not be written.
    #[error("writing the archive")]
    Write(#[from] io::Error),
}

/// The form in which modules are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleForm {
    /// Without what is not needed to load them: see [`module::slim`].
    Slim,
    /// As they are, for a kernel that requires signatures.
    Signed,
}

/// An archive in the making.
pub struct Initramfs<W: Write> {
    out: W,
    inode: u32,
    directories: BTreeSet<String>,
}

impl<W: Write> Initramfs<W> {
    /// Starts an archive with the directories and devices that init needs.
    pub fn new(out: W) -> Result<Self, InitramfsError> {
        let mut archive = Initramfs {
            out,
            inode: 0,
            directories: BTreeSet::new(),
        };
        for directory in DIRECTORIES {
            archive.directory(directory)?;
        }
        for (path, major, minor) in DEVICES {
            let device = archive
                .entry(path, S_IFCHR | 0o600)
                .rdev_major(major)
                .rdev_minor(minor);
            archive.put(device, &[])?;
        }
        Ok(archive)
    }

    /// Adds a directory, and those above it.
    fn directory(&mut self, path: &str) -> Result<(), InitramfsError> {
        if path.is_empty() || !self.directories.insert(path.to_owned()) {
            return Ok(());
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent)?;
        }
        let entry = self.entry(path, S_IFDIR | 0o755).nlink(2);
        self.put(entry, &[])
    }

    /// Adds a file at an absolute or relative path of the guest.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<(), InitramfsError> {
        let path = path.trim_start_matches('/');
        let sound = |part: &str| !part.is_empty() && part != "." && part != "..";
        if path.contains('\0') || !path.split('/').all(sound) {
            return Err(InitramfsError::Path(path.to_owned()));
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent)?;
        }
        let entry = self.entry(path, S_IFREG | mode & 0o7777);
        self.put(entry, data)
    }

    /// Adds the modules and what they need, and their lists for the init: those
    /// that it loads first, and those that it loads while work is being done,
    /// and does without if the kernel has none.
    pub fn modules(
        &mut self,
        directory: &Path,
        first: &[&str],
        later: &[&str],
        form: ModuleForm,
    ) -> Result<(), InitramfsError> {
        let first = resolve_modules(directory, first)?;
        let mut rest = Vec::new();
        for name in later {
            match resolve_modules(directory, &[name]) {
                Err(InitramfsError::NoModule(_)) => {}
                modules => rest.extend(modules?),
            }
        }
        let mut added = BTreeSet::new();
        for (list_path, modules) in [(MODULE_LIST, first), (LATER_LIST, rest)] {
            let mut list = String::new();
            for module in modules {
                let guest_path = format!("lib/modules/{}.ko", module_name(&module.path));
                let devices = module.devices.iter().flatten();
                let words: Vec<&str> = [guest_path.as_str()]
                    .into_iter()
                    .chain(devices.map(String::as_str))
                    .collect();
                list.push_str(&format!("/{}\n", words.join(" ")));
                if added.insert(guest_path.clone()) {
                    let data = load_module(&module.path)?;
                    let slim = match form {
                        ModuleForm::Slim => module::slim(&data),
                        ModuleForm::Signed => None,
                    };
                    self.file(&guest_path, 0o644, &slim.unwrap_or(data))?;
                }
            }
            self.file(list_path, 0o644, list.as_bytes())?;
        }
        Ok(())
    }

    /// Ends the archive.
    pub fn finish(self) -> Result<W, InitramfsError> {
        Ok(newc::trailer(self.out)?)
    }

    fn entry(&mut self, path: &str, mode: u32) -> newc::Builder {
        self.inode += 1;
        newc::Builder::new(path).ino(self.inode).mode(mode)
    }

    fn put(&mut self, entry: newc::Builder, data: &[u8]) -> Result<(), InitramfsError> {
        let size =
            u32::try_from(data.len()).map_err(|_| InitramfsError::TooLarge("a file".to_owned()))?;
        let mut writer = entry.write(&mut self.out, size);
        writer.write_all(data)?;
        writer.finish()?;
        Ok(())
    }
}

/// `kernel/drivers/net/virtio_net.ko.xz` → `virtio_net`; dashes are underscores.
fn module_name(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let name = file.split_once(".ko").map_or(&*file, |(name, _)| name);
    name.replace('-', "_")
}

/// A module to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its file.
    pub path: PathBuf,
    /// How the names of the devices begin that it, or what needs it, is for.
    /// None: it is always needed.
    pub devices: Option<BTreeSet<String>>,
}

impl Module {
    /// It is also needed for these devices.
    fn add(&mut self, devices: &Option<BTreeSet<String>>) {
        self.devices = match (self.devices.take(), devices) {
            (Some(ours), Some(theirs)) => Some(&ours | theirs),
            _ => None,
        };
    }
}

/// The modules and all they need, in the order to load them. Those built into
/// the kernel are left out.
pub fn resolve_modules(directory: &Path, names: &[&str]) -> Result<Vec<Module>, InitramfsError> {
    let read = |name: &str| {
        let path = directory.join(name);
        fs::read_to_string(&path).map_err(|source| InitramfsError::Read { path, source })
    };
    let dependencies = read("modules.dep")?;
    let builtin = read("modules.builtin")?;
    let aliases = read("modules.alias")?;
    let mut order: Vec<Module> = Vec::new();
    for name in names {
        let name = name.replace('-', "_");
        let line = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(file, _)| module_name(Path::new(file)) == name);
        let Some((file, needs)) = line else {
            if builtin
                .lines()
                .any(|line| module_name(Path::new(line)) == name)
            {
                continue;
            }
            return Err(InitramfsError::NoModule(name));
        };
        let devices = devices_of(&aliases, &name);
        // modules.dep lists what a module needs so that the last comes first.
        for file in needs.split_whitespace().rev().chain([file]) {
            let path = directory.join(file);
            match order.iter_mut().find(|module| module.path == path) {
                Some(module) => module.add(&devices),
                None => order.push(Module {
                    path,
                    devices: devices.clone(),
                }),
            }
        }
    }
    Ok(order)
}

/// The devices of [`BUS`] that a module drives: `alias virtio:d00000001v* NAME`.
fn devices_of(aliases: &str, name: &str) -> Option<BTreeSet<String>> {
    let devices: BTreeSet<String> = aliases
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let (pattern, module) = (words.next()?, words.next()?);
            let prefix = pattern.strip_suffix('*')?;
            (module == name && pattern.starts_with(BUS)).then(|| prefix.to_owned())
        })
        .collect();
    (!devices.is_empty()).then_some(devices)
}

/// Reads a module, unpacked.
pub fn load_module(path: &Path) -> Result<Vec<u8>, InitramfsError> {
    let data = fs::read(path).map_err(|source| InitramfsError::Read {
        path: path.to_owned(),
        source,
    })?;
    let unpack = |error: &dyn std::fmt::Display| InitramfsError::Unpack {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    let mut out = Vec::new();
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => return Ok(data),
        Some("xz") => unxz(data.as_slice()).read_to_end(&mut out),
        Some("zst") => unzstd(data.as_slice())
            .map_err(|error| unpack(&error))?
            .read_to_end(&mut out),
        _ => return Err(InitramfsError::UnknownModule(path.to_owned())),
    }
    .map_err(|error| unpack(&error))?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, data: &[u8]| fs::write(dir.path().join(name), data).unwrap();
        write("a.ko", b"module a");
        write("c-c.ko", b"module c");
        let options = lzma_rust2::XzOptions::with_preset(0);
        let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        writer.write_all(b"module b").unwrap();
        let packed = writer.finish().unwrap();
        write("b.ko.xz", &packed);
        write(
            "modules.dep",
            b"a.ko: b.ko.xz c-c.ko\nb.ko.xz: c-c.ko\nc-c.ko:\n",
        );
        write("modules.builtin", b"kernel/x/built-in.ko\n");
        write(
            "modules.alias",
            b"# Aliases\nalias virtio:d00000013v* a\nalias acpi*:X:* b\nalias symbol:x c_c\n",
        );
        dir
    }

    fn entries(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut rest = archive;
        let mut all = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                return all;
            }
            let mut data = Vec::new();
            io::copy(&mut reader, &mut data).unwrap();
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            all.push((name, mode, data));
            rest = reader.finish().unwrap();
        }
    }

    #[test]
    fn what_a_module_needs_comes_first_and_once() {
        let dir = tree();
        let names = |list: &[&str]| -> Vec<String> {
            resolve_modules(dir.path(), list)
                .unwrap()
                .iter()
                .map(|module| module_name(&module.path))
                .collect()
        };
        assert_eq!(names(&["a", "b"]), ["c_c", "b", "a"]);
        assert_eq!(names(&["c-c", "built_in", "c_c"]), ["c_c"]);
        assert!(matches!(
            resolve_modules(dir.path(), &["none"]),
            Err(InitramfsError::NoModule(name)) if name == "none"
        ));
    }

    #[test]
    fn a_driver_and_what_only_it_needs_are_for_its_device() {
        let dir = tree();
        let list = |names: &[&str]| {
            let mut archive = Initramfs::new(Vec::new()).unwrap();
            archive
                .modules(dir.path(), names, &[], ModuleForm::Slim)
                .unwrap();
            let entries = entries(&archive.finish().unwrap());
            let list = entries.into_iter().find(|entry| entry.0 == MODULE_LIST);
            String::from_utf8(list.unwrap().2).unwrap()
        };
        let device = " virtio:d00000013v\n";
        let (a, b, c) = (
            "/lib/modules/a.ko",
            "/lib/modules/b.ko",
            "/lib/modules/c_c.ko",
        );
        assert_eq!(list(&["a"]), format!("{c}{device}{b}{device}{a}{device}"));
        // What is wanted anyhow is loaded anyhow.
        assert_eq!(list(&["a", "c-c"]), format!("{c}\n{b}{device}{a}{device}"));
        assert_eq!(list(&["b", "a"]), format!("{c}\n{b}\n{a}{device}"));
    }

    #[test]
    fn archive_holds_modules_unpacked_and_their_list() {
        let dir = tree();
        let mut archive = Initramfs::new(Vec::new()).unwrap();
        archive.file("/init", 0o755, b"#!").unwrap();
        archive.file("opt/deep/er", 0o600, b"x").unwrap();
        archive
            .modules(dir.path(), &["b"], &["none", "a"], ModuleForm::Slim)
            .unwrap();
        let entries = entries(&archive.finish().unwrap());
        let find = |name: &str| entries.iter().find(|entry| entry.0 == name).unwrap();
        assert_eq!(find("init").1, S_IFREG | 0o755);
        assert_eq!(find("opt/deep").1, S_IFDIR | 0o755);
        assert_eq!(find("dev/console").1, S_IFCHR | 0o600);
        assert_eq!(find("lib/modules/b.ko").2, b"module b");
        assert_eq!(
            find(MODULE_LIST).2,
            b"/lib/modules/c_c.ko\n/lib/modules/b.ko\n"
        );
        // Loading twice does no harm; being there twice would take room.
        let devices = " virtio:d00000013v\n";
        assert_eq!(
            String::from_utf8_lossy(&find(LATER_LIST).2),
            ["c_c", "b", "a"]
                .map(|name| format!("/lib/modules/{name}.ko{devices}"))
                .concat()
        );
        // A directory must come before what it holds, and only once.
        let position = |name: &str| entries.iter().position(|entry| entry.0 == name).unwrap();
        assert!(position("opt") < position("opt/deep"));
        let count = |name: &str| entries.iter().filter(|entry| entry.0 == name).count();
        assert_eq!((count("lib/modules"), count("lib/modules/b.ko")), (1, 1));
    }

    #[test]
    fn paths_stay_below_the_root() {
        let mut archive = Initramfs::new(Vec::new()).unwrap();
        for bad in ["", "/", "a//b", "../a", "a/./b", "a\0b", "a/"] {
            assert!(
                matches!(archive.file(bad, 0o644, b""), Err(InitramfsError::Path(_))),
                "{bad:?}"
            );
        }
    }
}
