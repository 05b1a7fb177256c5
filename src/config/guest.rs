//! Which guest to boot where none is named.

use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::guests;

/// Which kernel and initial RAM disk to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFiles {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The flag that named it, or what stands for it, for messages.
    pub kernel_flag: String,
    /// The initial RAM disk's file.
    pub initrd: Option<PathBuf>,
    /// Its init is mayfly's, for certain.
    pub own_init: bool,
}

impl GuestFiles {
    /// The kernel that is named, or the default guest's, which is made if there is none.
    pub fn choose(kernel: Option<&Path>, initrd: Option<&Path>) -> Result<Self, Failure> {
        if let Some(kernel) = kernel {
            return Ok(GuestFiles::named(kernel, initrd));
        }
        let (kernel, default_initrd, own_init) = match guests::ensure_default() {
            Ok(guest) => (guest.kernel(), guest.boot_initrd(), true),
            Err(failure) => {
                let (kernel, initrd) = host_files().ok_or(failure)?;
                (kernel, initrd, false)
            }
        };
        Ok(GuestFiles {
            own_init: own_init && initrd.is_none(),
            kernel_flag: format!("default kernel {}", kernel.display()),
            kernel,
            initrd: initrd.map(Path::to_owned).or(default_initrd),
        })
    }

    /// A kernel that the user named.
    pub fn named(kernel: &Path, initrd: Option<&Path>) -> Self {
        GuestFiles {
            kernel: kernel.to_owned(),
            kernel_flag: format!("--kernel {}", kernel.display()),
            initrd: initrd.map(Path::to_owned),
            own_init: false,
        }
    }
}

/// What the host itself booted.
fn host_files() -> Option<(PathBuf, Option<PathBuf>)> {
    let exists = |path: PathBuf| fs::File::open(&path).is_ok().then_some(path);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let boot = Path::new("/boot");
    let kernel = exists(boot.join(format!("vmlinuz-{}", release.trim())))?;
    let initrd = exists(boot.join(format!("initrd.img-{}", release.trim())));
    Some((kernel, initrd))
}
