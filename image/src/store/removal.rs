//! What leaves the store, and what must not.

use std::collections::BTreeSet;
use std::fs;

use mayfly_files::{lock, sync_parent};

use super::{ImageRecord, LAYERS, PARTIAL, Store};
use crate::digest::Digest;
use crate::error::{Context, Error, ErrorKind};
use crate::layers::IMAGE_FILE;
use crate::reference::Reference;

/// The images and layers that [`Store::prune`] removed.
#[derive(Debug, Default)]
pub struct Pruned {
    /// Images, by their IDs.
    pub images: Vec<Digest>,
    /// How many bytes of disk there are again.
    pub bytes: u64,
}

impl Store {
    /// Removes a name; with its last name, or by its ID, an image goes too, unless
    /// it is in use. Tells what is gone.
    pub fn remove(&self, name: &str) -> Result<Vec<String>, Error> {
        let id = self.id_of(name)?;
        let id =
            id.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{name}: no such image")))?;
        let _lock = self.directory.lock().or_host(self.failed())?;
        let mut names = self.names()?;
        let its: Vec<String> = names
            .iter()
            .filter(|(_, named)| named.id == id)
            .map(|(name, _)| name.clone())
            .collect();
        let exact = name
            .parse::<Reference>()
            .map(|reference| reference.to_string());
        let removed: Vec<String> = match exact {
            Ok(exact) if its.contains(&exact) => vec![exact],
            _ => its.clone(),
        };
        let mut told = Vec::new();
        let last = removed.len() == its.len();
        let path = self.image_path(&id);
        let taken = match last {
            false => None,
            true => Some(
                lock::take_patiently(&path)
                    .or_host(self.failed())?
                    .ok_or_else(|| {
                        Error::new(
                            ErrorKind::InUse,
                            format!("{name}: a VM or another command uses the image"),
                        )
                    })?,
            ),
        };
        for name in &removed {
            names.remove(name);
            let familiar = name.parse::<Reference>().map(|name| name.familiar());
            told.push(format!(
                "untagged {}",
                familiar.unwrap_or_else(|_| name.clone())
            ));
        }
        self.write_names(&names)?;
        if taken.is_some() {
            fs::remove_file(&path).or_host(self.failed())?;
            // Should the host end now: an image goes before its layers.
            sync_parent(&path).or_host(self.failed())?;
            told.push(format!("removed {id}"));
            self.sweep(&mut Pruned::default())?;
        }
        Ok(told)
    }

    /// Removes images that have no name and are not in use, layers of no image,
    /// and what came of blobs whose pull was given up.
    pub fn prune(&self) -> Result<Pruned, Error> {
        let _lock = self.directory.lock().or_host(self.failed())?;
        let mut pruned = Pruned::default();
        let named: BTreeSet<Digest> = self.names()?.into_values().map(|named| named.id).collect();
        for id in self.ids()? {
            let path = self.image_path(&id);
            if named.contains(&id) {
                continue;
            }
            if let Some(_held) = lock::take(&path).or_host(self.failed())? {
                fs::remove_file(&path).or_host(self.failed())?;
                sync_parent(&path).or_host(self.failed())?;
                pruned.images.push(id);
            }
        }
        for entry in fs::read_dir(self.directory.path(PARTIAL)).or_host(self.failed())? {
            let path = entry.or_host(self.failed())?.path();
            if let Some(file) = lock::take(&path).or_host(self.failed())? {
                let len = file.metadata().or_host(self.failed())?.len();
                pruned.bytes = pruned.bytes.saturating_add(len);
                fs::remove_file(&path).or_host(self.failed())?;
            }
        }
        self.sweep(&mut pruned)?;
        Ok(pruned)
    }

    /// Removes layers that no image has and nobody holds. The caller has the lock.
    fn sweep(&self, pruned: &mut Pruned) -> Result<(), Error> {
        let mut used = BTreeSet::new();
        for id in self.ids()? {
            let text = fs::read(self.image_path(&id)).or_host(self.failed())?;
            // Of a broken image nobody knows the layers: none is removed.
            let record: ImageRecord = serde_json::from_slice(&text)
                .or_host(format_args!("{}: image {id}", self.failed()))?;
            used.extend(record.layers.into_iter().map(|layer| layer.name));
        }
        for entry in fs::read_dir(self.directory.path(LAYERS)).or_host(self.failed())? {
            let entry = entry.or_host(self.failed())?;
            let path = entry.path();
            if entry
                .file_name()
                .to_str()
                .is_some_and(|name| used.contains(name))
            {
                continue;
            }
            let Some(_held) = lock::take(&path).or_host(self.failed())? else {
                continue;
            };
            let image = fs::metadata(path.join(IMAGE_FILE));
            let len = image.map_or(0, |image| image.len());
            // Half a layer must not have a layer's name.
            self.directory.discard(&path).or_host(self.failed())?;
            pruned.bytes = pruned.bytes.saturating_add(len);
        }
        Ok(())
    }
}
