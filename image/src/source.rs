//! Where an archive comes from: a file, a directory, a pipe, standard input.

use std::fs::File;
use std::io::{self, IsTerminal, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::progress::Progress;
use super::section::Section;
use super::store::Store;
use crate::error::{Context, Error};

/// The path that stands for standard input.
const STANDARD_INPUT: &str = "-";

/// The source that a path leads to.
pub enum Source {
    /// A directory.
    Directory,
    /// An archive, of which any part can be read.
    Archive(Section),
}

/// What to call a path in messages.
pub fn shown(path: &Path) -> String {
    match path.as_os_str() == STANDARD_INPUT {
        true => "standard input".into(),
        false => path.display().to_string(),
    }
}

impl Store {
    /// Opens an archive or a directory. What comes from a pipe is kept in the store until it
    /// is read, as it is read in any order and more than once.
    pub(super) fn source(&self, path: &Path, progress: &dyn Progress) -> Result<Source, Error> {
        let what = shown(path);
        let standard = path.as_os_str() == STANDARD_INPUT;
        let mut file = match standard {
            true => io::stdin().as_fd().try_clone_to_owned().map(File::from),
            false => File::open(path),
        }
        .or_invalid(&what)?;
        if standard && file.is_terminal() {
            return Err(Error::invalid(
                "standard input is a terminal; name an archive, or give one (< saved.tar)",
            ));
        }
        let kind = file.metadata().or_invalid(&what)?.file_type();
        let archive = if kind.is_dir() && !standard {
            return Ok(Source::Directory);
        } else if kind.is_file() {
            let offset = match standard {
                true => file.stream_position().or_invalid(&what)?,
                false => 0,
            };
            Section::from_offset(file, offset).or_invalid(&what)?
        } else if kind.is_fifo() || (standard && !kind.is_dir()) {
            let work = self.work()?;
            let task = progress.begin(&format!("reading {what}"), None);
            let input = self.limits.bounded(file, u64::MAX);
            Section::spooled(input, work.path(), &*task).or_invalid(&what)?
        } else {
            return Err(Error::invalid(format!(
                "{what}: neither a file, a folder nor a pipe"
            )));
        };
        match archive.is_empty() {
            true => Err(Error::invalid(format!("{what}: is empty"))),
            false => Ok(Source::Archive(archive)),
        }
    }
}
