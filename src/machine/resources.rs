//! Opens every file of the host that a machine needs, and creates none.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::config::{ConsoleConfig, MachineConfig};
use crate::failure::{Class, Failure};

/// What was opened.
pub struct Resources {
    /// The kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
}

impl Resources {
    /// Opens everything, or fails with nothing touched.
    pub fn open(config: &MachineConfig) -> Result<Self, Failure> {
        let kernel = open_regular(&config.kernel, &config.kernel_flag)?;
        let initrd = match &config.initrd {
            Some(path) => Some(open_regular(path, &format!("--initrd {}", path.display()))?),
            None => None,
        };
        if let ConsoleConfig::File(path) = &config.console {
            check_creatable(path, &format!("--console file={}", path.display()))?;
        }
        if let ConsoleConfig::Unix(path) = &config.console {
            check_creatable(path, &format!("--console unix={}", path.display()))?;
        }
        if let Some(path) = &config.pidfile {
            check_creatable(path, &format!("--pidfile {}", path.display()))?;
        }
        Ok(Resources { kernel, initrd })
    }
}

/// Opens a regular file to read it.
fn open_regular(path: &Path, flag: &str) -> Result<File, Failure> {
    // Without blocking, as a pipe would.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| refusal(&error, flag))?;
    let metadata = file.metadata().map_err(|error| refusal(&error, flag))?;
    if metadata.is_dir() {
        return Err(Failure::config(format!(
            "{flag}: is a directory, not a file"
        )));
    }
    if !metadata.is_file() {
        return Err(Failure::config(format!("{flag}: is not a regular file")));
    }
    Ok(file)
}

/// A missing file is the user's fault, a forbidden one the host's refusal.
pub fn refusal(error: &io::Error, flag: &str) -> Failure {
    let (class, message) = match error.kind() {
        io::ErrorKind::NotFound => (Class::Config, "no such file".to_owned()),
        io::ErrorKind::IsADirectory => (Class::Config, "is a directory, not a file".to_owned()),
        io::ErrorKind::NotADirectory => (Class::Config, "a part of the path is no folder".into()),
        io::ErrorKind::PermissionDenied => (
            Class::Host,
            "no permission; see its owner and mode with ls -l".to_owned(),
        ),
        _ => (Class::Host, error.to_string()),
    };
    Failure::new(class, format!("{flag}: {message}"))
}

/// Checks that a file may be made or overwritten, without doing so.
fn check_creatable(path: &Path, flag: &str) -> Result<(), Failure> {
    let access = |path: &Path| -> Result<(), Failure> {
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| Failure::config(format!("{flag}: has a NUL in its name")))?;
        // SAFETY: a string that lives until the call returns.
        match unsafe { libc::access(name.as_ptr(), libc::W_OK) } {
            0 => Ok(()),
            _ => Err(refusal(&io::Error::last_os_error(), flag)),
        }
    };
    match path.metadata() {
        Ok(metadata) if metadata.is_dir() => Err(Failure::config(format!(
            "{flag}: is a directory, not a file"
        ))),
        Ok(metadata) if metadata.file_type().is_block_device() => Err(Failure::config(format!(
            "{flag}: is a block device, not a file"
        ))),
        Ok(_) => access(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            if !parent.is_dir() {
                return Err(Failure::config(format!(
                    "{flag}: the folder {} does not exist",
                    parent.display()
                )));
            }
            access(parent)
        }
        Err(error) => Err(refusal(&error, flag)),
    }
}
