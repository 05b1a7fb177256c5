//! Which guest to boot where none is named, and where the scripts keep theirs.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::Failure;

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
        let (kernel, default_initrd) = default_guest().ok_or_else(|| {
            Failure::config(
                "no kernel to boot: name one with --kernel, or run scripts/mayfly, which fetches one",
            )
        })?;
        Ok(GuestFiles {
            kernel_flag: format!("default kernel {}", kernel.display()),
            kernel,
            initrd: initrd.or(default_initrd),
        })
    }
}

/// The fetched kernel and its initramfs, or else those that the host runs.
pub fn default_guest() -> Option<(PathBuf, Option<PathBuf>)> {
    let exists = |path: PathBuf| path.exists().then_some(path);
    let fetched = cache_folder().map(|cache| cache.join("default"));
    if let Some(folder) = fetched
        && let Some(kernel) = exists(folder.join("vmlinux"))
    {
        return Some((kernel, exists(folder.join("initramfs.cpio"))));
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let boot = Path::new("/boot");
    let kernel = exists(boot.join(format!("vmlinuz-{}", release.trim())))?;
    Some((
        kernel,
        exists(boot.join(format!("initrd.img-{}", release.trim()))),
    ))
}

/// Where the scripts keep what they fetch and build.
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
