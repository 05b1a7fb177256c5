//! A file with this process's id, removed at the end.

use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, OrFail};

/// The file, locked while the VM runs.
pub struct PidFile {
    path: PathBuf,
    file: File,
}

impl PidFile {
    /// Makes the file, or takes over one that nobody holds.
    pub fn create(path: &Path) -> Result<Self, Failure> {
        let flag = format!("--pidfile {}", path.display());
        let mut pidfile = loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(path)
                .or_host(&flag)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(Failure::host(format!(
                        "{flag}: another VM that runs uses it; choose another name"
                    )));
                }
                Err(TryLockError::Error(error)) => return Err(error).or_host(&flag),
            }
            // Its last holder may have removed the name in the meantime; then
            // dropping this one does nothing.
            let path = path.to_owned();
            let pidfile = PidFile { path, file };
            if pidfile.is_in_place() {
                break pidfile;
            }
        };
        let file = &mut pidfile.file;
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .or_host(&flag)?;
        Ok(pidfile)
    }

    /// The path still names this file.
    fn is_in_place(&self) -> bool {
        let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
        let named: io::Result<Metadata> = self.path.metadata();
        let open = self.file.metadata().map(identity);
        matches!((named.map(identity), open), (Ok(named), Ok(open)) if named == open)
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // While it is locked, nobody else takes it over.
        if self.is_in_place() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
