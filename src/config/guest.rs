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
}

impl GuestFiles {
    pub fn choose(kernel: Option<PathBuf>, initrd: Option<PathBuf>) -> Result<Self, Failure> {
        if let Some(kernel) = kernel {
            let kernel_flag = format!("--kernel {}", kernel.display());
            return Ok(GuestFiles {
                kernel,
                kernel_flag,
                initrd,
            });
        }
        let (kernel, default_initrd) = default_guest()?;
        Ok(GuestFiles {
            kernel_flag: format!("default kernel {}", kernel.display()),
            kernel,
            initrd: initrd.or(default_initrd),
        })
    }
}

/// The default guest's kernel and initial RAM disk, or else those that the host runs.
fn default_guest() -> Result<(PathBuf, Option<PathBuf>), Failure> {
    match guests::ensure_default() {
        Ok(guest) => Ok((guest.kernel(), guest.boot_initrd())),
        Err(failure) => host_files().ok_or(failure),
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
