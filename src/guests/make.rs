//! Makes a guest from a kernel, its modules and mayfly's programs.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use mayfly_boot::initramfs::{
    DEFAULT_MODULES, Initramfs, InitramfsError, LATER_MODULES, ModuleForm,
};
use mayfly_boot::{payload, trim_segments};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::sources::{self, Source};
use super::store::{
    BOOT_INITRD, COMPARE_INITRD, FileVersion, GUESTS, Guest, Guests, INIT_PROGRAM, KERNEL, KERNELS,
    MANIFEST, Manifest, PROBE, PROBE_PROGRAM, RUN_INITRD, program,
};
use crate::control::valid_name;
use crate::failure::{Failure, OrFail};
use crate::timing::now_ms;
use mayfly_process::programs::find_program;

/// What an image's VM needs beside mayfly's devices.
const RUN_MODULES: [&str; 2] = ["squashfs", "overlay"];
/// What other monitors' VMs need, which load nothing else.
const COMPARE_MODULES: [&str; 4] = ["virtio_mmio", "virtio_blk", "virtio_net", "squashfs"];
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// What the user gave of a guest that is to be made.
#[derive(Clone, Debug, Default)]
pub struct MakeOptions {
    /// What it is called, if not by its kernel's release.
    pub name: Option<String>,
    /// vmlinuz or vmlinux, if not the host's or Debian's.
    pub kernel: Option<PathBuf>,
    /// The folder of its modules; none, if the kernel has all built in.
    pub modules: Option<PathBuf>,
    /// Debian's kernel for virtual machines is wanted, not the host's.
    pub debian: bool,
}

impl Guests {
    /// Makes a guest as the user wants it, and makes it the default if there is none.
    pub fn make(&self, options: &MakeOptions) -> Result<Guest, Failure> {
        let _lock = self.lock()?;
        self.make_alone(options)
    }

    /// Makes a guest while nobody else changes any.
    fn make_alone(&self, options: &MakeOptions) -> Result<Guest, Failure> {
        if let Some(kernel) = &options.kernel {
            let name = match (&options.name, kernel.file_name()) {
                (Some(name), _) => name.clone(),
                (None, file) => plain_name(&file.unwrap_or_default().to_string_lossy()),
            };
            return self.assemble(&name, kernel, options.modules.as_deref());
        }
        let named = |source: &Source| options.name.clone().unwrap_or(plain_name(&source.name));
        if !options.debian
            && let Some(source) = sources::of_host()
        {
            let made = self.assemble(&named(&source), &source.kernel, Some(&source.modules));
            match made {
                Err(failure) if sources::is_debian() => {
                    tell(&format!("{failure}; taking Debian's cloud kernel instead"));
                }
                made => return made,
            }
        }
        if !sources::is_debian() {
            return Err(no_source());
        }
        let source = sources::of_debian(&self.cache.join(KERNELS))?;
        self.assemble(&named(&source), &source.kernel, Some(&source.modules))
    }

    /// Makes the default guest where there is none.
    pub(super) fn make_default(&self) -> Result<Guest, Failure> {
        if sources::of_host().is_none() && !sources::is_debian() {
            return Err(no_source());
        }
        let _lock = self.lock()?;
        if let Some(guest) = self.default_guest() {
            return Ok(guest); // somebody else was faster
        }
        tell("making the guest that VMs boot, once; see mayfly guest --help");
        self.make_alone(&MakeOptions::default())
    }

    /// Makes a guest anew from what it was made from, after mayfly changed.
    pub(super) fn renew(&self, guest: &Guest) -> Result<Guest, Failure> {
        let _lock = self.lock()?;
        let name = guest.name();
        // Somebody else may have been faster.
        let guest = Guest::open(guest.folder.clone()).ok_or_else(|| {
            Failure::config(format!(
                "{name}: was removed meanwhile; see mayfly guest ls"
            ))
        })?;
        let Some(manifest) = guest.manifest.clone().filter(|_| guest.is_outdated()) else {
            return Ok(guest);
        };
        tell(&format!(
            "making the guest {name} anew, as mayfly has changed"
        ));
        let made = self.assemble(&name, &manifest.kernel.path, manifest.modules.as_deref());
        made.map_err(|failure| {
            let remedy = "make another with mayfly guest make";
            Failure::new(
                failure.class,
                format!("the guest {name}: {failure}; {remedy}"),
            )
        })
    }

    /// Puts a guest together, and in place at one moment; VMs that run keep what they
    /// have open. It is made only if anything that it is made from has changed.
    fn assemble(
        &self,
        name: &str,
        kernel: &Path,
        modules: Option<&Path>,
    ) -> Result<Guest, Failure> {
        if !valid_name(name) {
            return Err(Failure::config(format!(
                "{name}: not a name for a guest; write letters, digits, and . _ -"
            )));
        }
        let parts = Parts::find(kernel, modules)?;
        let folder = self.cache.join(GUESTS).join(name);
        let current = Guest::open(folder.clone());
        if !current.is_some_and(|guest| parts.made(&guest)) {
            let work = tempfile::Builder::new()
                .prefix(".new-")
                .permissions(Permissions::from_mode(0o755))
                .tempdir_in(self.cache.join(GUESTS))
                .or_host(self.cache.display())?;
            parts.write(work.path())?;
            let published = match folder.exists() {
                // What was there is what is removed then.
                true => renameat_with(CWD, work.path(), CWD, &folder, RenameFlags::EXCHANGE),
                false => rustix::fs::rename(work.path(), &folder),
            };
            published.or_host(folder.display())?;
        }
        if self.default_guest().is_none() {
            self.point_to(name)?;
        }
        Guest::open(folder).ok_or_else(|| Failure::host(format!("{name}: was not made")))
    }
}

/// There is no kernel to make a guest of.
fn no_source() -> Failure {
    Failure::config(
        "no kernel for guests: this host's cannot be read or has no modules, and this is no Debian \
         whose package could be fetched; name one with --kernel, or with mayfly guest make --kernel \
         FILE --modules DIR",
    )
}

/// A kernel's release as the name of a guest: `6.12.1+deb13-amd64` has a plus sign.
fn plain_name(release: &str) -> String {
    let plain = |it: char| it.is_ascii_alphanumeric() || "._-".contains(it);
    release.replace(|it| !plain(it), "-")
}

/// What a guest is made from.
struct Parts<'a> {
    manifest: Manifest,
    modules: Option<&'a Path>,
}

impl<'a> Parts<'a> {
    fn find(kernel: &Path, modules: Option<&'a Path>) -> Result<Self, Failure> {
        let version = |path: &Path| FileVersion::of(path).or_config(path.display());
        let init = program(INIT_PROGRAM).ok_or_else(|| {
            Failure::host(format!(
                "{INIT_PROGRAM}, which is PID 1 in guests, is neither installed nor built; \
                 scripts/install and mayfly's package bring it"
            ))
        })?;
        let probe = program(PROBE_PROGRAM);
        let busybox = find_program("busybox").filter(|path| is_static(path));
        let modules_path = modules.map(|path| fs::canonicalize(path).or_config(path.display()));
        Ok(Parts {
            manifest: Manifest {
                mayfly: env!("CARGO_PKG_VERSION").to_owned(),
                made_ms: now_ms(),
                kernel: version(kernel)?,
                modules: modules_path.transpose()?,
                init: version(&init)?,
                probe: probe.as_deref().map(version).transpose()?,
                busybox: busybox.as_deref().map(version).transpose()?,
            },
            modules,
        })
    }

    /// Whether a guest was made from just this.
    fn made(&self, guest: &Guest) -> bool {
        let same = |manifest: &Manifest| {
            let made_ms = manifest.made_ms;
            *manifest
                == Manifest {
                    made_ms,
                    ..self.manifest.clone()
                }
        };
        guest.manifest.as_ref().is_some_and(same)
    }

    /// Writes the files of the guest.
    fn write(&self, folder: &Path) -> Result<(), Failure> {
        self.write_kernel(&folder.join(KERNEL))?;
        let put = |name: &str, data: &[u8]| {
            let path = folder.join(name);
            fs::write(&path, data).or_host(path.display())
        };
        let mut defaults = DEFAULT_MODULES.to_vec();
        put(
            BOOT_INITRD,
            &self.initramfs(&defaults, &LATER_MODULES, self.manifest.busybox.as_ref())?,
        )?;
        defaults.extend(RUN_MODULES);
        put(
            RUN_INITRD,
            &self.initramfs(&defaults, &LATER_MODULES, None)?,
        )?;
        put(
            COMPARE_INITRD,
            &self.initramfs(&COMPARE_MODULES, &[], None)?,
        )?;
        if let Some(probe) = &self.manifest.probe {
            let path = folder.join(PROBE);
            fs::copy(&probe.path, &path).or_host(path.display())?;
            fs::set_permissions(&path, Permissions::from_mode(0o755)).or_host(path.display())?;
        }
        let manifest = serde_json::to_vec_pretty(&self.manifest).or_internal("JSON")?;
        put(MANIFEST, &manifest)
    }

    /// Writes the kernel as an ELF file, which boots faster, where it can be had.
    fn write_kernel(&self, target: &Path) -> Result<(), Failure> {
        let source = &self.manifest.kernel.path;
        let mut image = fs::read(source).or_config(source.display())?;
        let vmlinux = match image.starts_with(ELF_MAGIC) {
            true => {
                trim_segments(&mut image);
                None
            }
            false => payload::extract_vmlinux(&image).ok(),
        };
        fs::write(target, vmlinux.as_deref().unwrap_or(&image)).or_host(target.display())
    }

    fn initramfs(
        &self,
        first: &[&str],
        later: &[&str],
        busybox: Option<&FileVersion>,
    ) -> Result<Vec<u8>, Failure> {
        let read = |path: &Path| fs::read(path).or_config(path.display());
        let init = read(&self.manifest.init.path)?;
        let busybox = busybox.map(|file| read(&file.path)).transpose()?;
        let build = || -> Result<Vec<u8>, InitramfsError> {
            let mut archive = Initramfs::new(Vec::new())?;
            archive.file("init", 0o755, &init)?;
            if let Some(folder) = self.modules {
                archive.modules(folder, first, later, ModuleForm::Slim)?;
            }
            if let Some(busybox) = &busybox {
                archive.file("bin/busybox", 0o755, busybox)?;
            }
            archive.finish()
        };
        match self.modules {
            Some(folder) => build().or_config(folder.display()),
            None => build().or_internal("the initial RAM disk"),
        }
    }
}

/// Whether a program needs no interpreter: guests have no libraries.
fn is_static(path: &Path) -> bool {
    const PT_INTERP: u32 = 3;
    const PHOFF: usize = 32;
    const PHENTSIZE: usize = 54;
    const PHNUM: usize = 56;
    let Ok(data) = fs::read(path) else {
        return false;
    };
    let bytes = |at: usize, len: usize| {
        let mut value = [0; 8];
        value
            .get_mut(..len)?
            .copy_from_slice(data.get(at..at.checked_add(len)?)?);
        usize::try_from(u64::from_le_bytes(value)).ok()
    };
    let headers = || {
        let (start, size, count) = (bytes(PHOFF, 8)?, bytes(PHENTSIZE, 2)?, bytes(PHNUM, 2)?);
        let kind = |index: usize| bytes(start.checked_add(index.checked_mul(size)?)?, 4);
        (0..count).map(kind).collect::<Option<Vec<_>>>()
    };
    data.starts_with(ELF_MAGIC)
        && headers().is_some_and(|kinds| !kinds.contains(&(PT_INTERP as usize)))
}

/// The default guest as it should be: made, or made anew after an upgrade, if need be.
/// A line on standard error tells the user of it.
pub fn ensure_default() -> Result<Guest, Failure> {
    let guests = Guests::locate()?;
    match guests.default_guest() {
        Some(guest) if !guest.is_outdated() => Ok(guest),
        Some(guest) => guests.renew(&guest),
        None => guests.make_default(),
    }
}

/// Tells the user what takes a while.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "mayfly: {line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_become_names() {
        let name = plain_name("6.12.43+deb13-amd64");
        assert!(valid_name(&name) && name == "6.12.43-deb13-amd64", "{name}");
    }

    #[test]
    fn programs_with_libraries_are_told_apart() {
        assert!(!is_static(Path::new("/proc/self/exe")));
        assert!(!is_static(Path::new("/nowhere")));
        assert!(!is_static(Path::new("/etc/passwd")));
    }
}
