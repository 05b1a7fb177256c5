//! An image from wherever it is.

use std::path::Path;

use super::config::RunConfig;
use super::progress::Progress;
use super::pull::PullOptions;
use super::reference::Reference;
use super::store::{Image, Store};
use crate::error::{Context, Error};

impl Store {
    /// The image that a user means: one in the store; one in an archive, an OCI
    /// layout or a root directory, if the text is a path (with `/` or `.` at its start);
    /// or one that has to be pulled. What comes from a path gets no name.
    pub fn obtain(
        &self,
        text: &str,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Image, Error> {
        if text.starts_with(['/', '.']) {
            return self.obtain_path(Path::new(text), progress);
        }
        if let Some(image) = self.find(text)? {
            return Ok(image);
        }
        let reference: Reference = text.parse().or_invalid("image")?;
        self.pull(&reference, options, progress)
    }

    fn obtain_path(&self, path: &Path, progress: &dyn Progress) -> Result<Image, Error> {
        let directory = path.metadata().or_invalid(path.display())?.is_dir();
        if directory && !path.join("index.json").exists() {
            return self.import(path, None, RunConfig::default(), progress);
        }
        self.load_nameless(path, progress)
    }
}
