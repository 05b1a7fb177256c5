//! `--cidfile`: a file with the VM's name, for scripts.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::failure::{Failure, OrFail};

/// The file, which goes if the VM does not start.
pub struct CidFile(Option<PathBuf>);

impl CidFile {
    /// Writes the name to a new file, if there is to be one.
    pub fn write(path: Option<&Path>, name: &str) -> Result<Self, Failure> {
        let Some(path) = path else {
            return Ok(CidFile(None));
        };
        let flag = format!("--cidfile {}", path.display());
        let mut file = File::create_new(path).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => is_there(path),
            _ => Failure::host(format!("{flag}: {error}")),
        })?;
        let written = CidFile(Some(path.to_owned()));
        file.write_all(name.as_bytes()).or_host(flag)?;
        Ok(written)
    }

    /// Leaves it there.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for CidFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// Refuses a file that is there, before anything is done.
pub fn check(path: &Path) -> Result<(), Failure> {
    match path.symlink_metadata() {
        Ok(_) => Err(is_there(path)),
        Err(_) => Ok(()),
    }
}

fn is_there(path: &Path) -> Failure {
    Failure::config(format!(
        "--cidfile {}: is there already; remove it, or name another",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_new_and_goes_with_a_start_that_failed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("id");
        drop(CidFile::write(Some(&path), "web").unwrap());
        assert!(!path.exists());
        check(&path).unwrap();
        CidFile::write(Some(&path), "web").unwrap().keep();
        assert_eq!(fs::read(&path).unwrap(), b"web");
        for refused in [
            check(&path).unwrap_err(),
            CidFile::write(Some(&path), "b").err().unwrap(),
        ] {
            assert!(
                refused.to_string().contains("is there already"),
                "{refused}"
            );
        }
        assert_eq!(fs::read(&path).unwrap(), b"web");
    }
}
