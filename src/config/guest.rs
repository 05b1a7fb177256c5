//! Which guest to boot where none is named.

use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::guests;

/// Which kernel and initial RAM disk to boot.
pub(super) struct GuestFiles {
    pub kernel: PathBuf,
    pub kernel_flag: String,
    pub initrd: Option<PathBuf>,
    /// Its init is mayfly's, for certain.
    pub own_init: bool,
}

impl GuestFiles {
    pub fn choose(kernel: Option<PathBuf>, initrd: Option<PathBuf>) -> Result<Self, Failure> {
        if let Some(kernel) = kernel {
            let kernel_flag = format!("--kernel {}", kernel.display());
            return Ok(GuestFiles {
                kernel,
                kernel_flag,
                initrd,
                own_init: false,
            });
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
            initrd: initrd.or(default_initrd),
        })
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
