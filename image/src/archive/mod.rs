//! Images in files: what `docker save` and `podman save` write, and OCI layouts,
//! as archives or directories.

mod files;
mod found;
mod manifests;

use std::path::Path;

use self::files::Files;
use self::found::Found;
use self::manifests::{laid_out, saved};
use super::progress::Progress;
use super::reference::Reference;
use super::section::Section;
use super::source::Source;
use super::store::{Image, Store};
use super::tarball::ArchiveError;
use crate::error::{Context, Error};

pub use manifests::{candidates, count_layers};

/// The most entries that are no images that an error names.
const TOLD_MAX: usize = 3;

impl Store {
    /// Adds the images in an archive (plain or compressed; `-` for standard input) or
    /// OCI layout. `name` is what the only one is called beside its own names.
    pub fn load(
        &self,
        path: &Path,
        name: Option<&Reference>,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>, Error> {
        let (mut found, what) = self.found(path, progress)?;
        if let Some(name) = name {
            match found.as_mut_slice() {
                [one] => one.names.push(name.clone()),
                _ => {
                    return Err(Error::invalid(format!(
                        "{what}: holds several images, which cannot all be {name}"
                    )));
                }
            }
        }
        found
            .iter()
            .map(|image| self.add_found(image, &what, progress))
            .collect()
    }

    /// Adds the only image in an archive or OCI layout, and gives it no name: whose
    /// files are only run must not become what others mean by a name.
    pub(super) fn load_nameless(
        &self,
        path: &Path,
        progress: &dyn Progress,
    ) -> Result<Image, Error> {
        let (mut found, what) = self.found(path, progress)?;
        match (found.pop(), found.is_empty()) {
            (Some(mut image), true) => {
                image.names.clear();
                self.add_found(&image, &what, progress)
            }
            _ => Err(Error::invalid(format!(
                "{what}: holds several images; load them (mayfly image load), and name one"
            ))),
        }
    }

    /// What there is in an archive or layout, at least one image, and what to call the
    /// archive.
    fn found(&self, path: &Path, progress: &dyn Progress) -> Result<(Vec<Found>, String), Error> {
        let what = super::source::shown(path);
        let told = |error: Error| error.within(&what);
        let files = match self.source(path, progress)? {
            Source::Directory => Files::directory(path),
            Source::Archive(archive) => self.files(archive, &what, progress)?,
        };
        let found = if files.open("manifest.json").map_err(told)?.is_some() {
            saved(&files).map_err(told)?
        } else if files.open("index.json").map_err(told)?.is_some() {
            laid_out(&files).map_err(told)?
        } else {
            return Err(Error::invalid(format!(
                "{what}: holds no images (no manifest.json or index.json); is it a root file \
                 system? mayfly image import"
            )));
        };
        if found.images.is_empty() {
            let others: Vec<String> = found.others.into_iter().take(TOLD_MAX).collect();
            let why = match others.is_empty() {
                true => String::new(),
                false => format!(": {}", others.join("; ")),
            };
            return Err(Error::invalid(format!(
                "{what}: holds no image for linux/amd64{why}"
            )));
        }
        Ok((found.images, what))
    }

    fn files(
        &self,
        mut archive: Section,
        what: &str,
        progress: &dyn Progress,
    ) -> Result<Files, Error> {
        if !archive.is_plain().or_invalid(what)? {
            let work = self.work()?;
            let task = progress.begin("unpacking the archive", None);
            let unpacked = archive.unpacked(&self.limits);
            let spooled =
                unpacked.and_then(|input| Ok(Section::spooled(input, work.path(), &*task)?));
            archive = spooled.map_err(ArchiveError::plainly).or_invalid(what)?;
        }
        let spool = |input: &mut dyn std::io::Read| {
            let task = progress.begin("unpacking the archive", None);
            let work = self.work().map_err(std::io::Error::other)?;
            Section::spooled(input, work.path(), &*task)
        };
        Files::list(&archive, self.limits.size(), &spool).or_invalid(what)
    }

    fn add_found(
        &self,
        image: &Found,
        what: &str,
        progress: &dyn Progress,
    ) -> Result<Image, Error> {
        let mut layers = Vec::new();
        for (number, (diff_id, source)) in image
            .checked
            .rootfs
            .diff_ids
            .iter()
            .zip(&image.layers)
            .enumerate()
        {
            let what = format!("{what}: layer {}", number.saturating_add(1));
            let layer = self.add_layer(source, Some(*diff_id), &layers, &what, progress)?;
            layers.push(layer);
        }
        self.add_image(&image.config, &layers, &image.names, image.manifest)
    }
}
