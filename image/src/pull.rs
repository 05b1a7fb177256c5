//! Bringing an image from a registry.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use super::archive::{candidates, count_layers};
use super::config::{Descriptor, ImageConfig, Manifest, artifact};
use super::digest::Digest;
use super::progress::Progress;
use super::reference::Reference;
use super::registry::Client;
use super::section::Section;
use super::store::{Image, Layer, Store, foreign, read_config};
use crate::error::{Context, Error, ErrorKind};
use mayfly_files::lock::take_file;

/// The number of blobs that come at once.
const AT_ONCE: usize = 3;
/// How many indexes lie in one another.
const INDEXES_MAX: usize = 4;

/// The options of a pull.
#[derive(Clone, Copy, Debug, Default)]
pub struct PullOptions {
    /// The registry is asked without encryption. One on this host may always be.
    pub plain_http: bool,
}

/// A blob that came, or none if its layer is there by now.
type Came = Result<Option<Section>, Error>;

impl Store {
    /// Brings an image from its registry, unless the store has it already. What an
    /// earlier pull left is gone on with.
    pub fn pull(
        &self,
        reference: &Reference,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Image, Error> {
        let what = reference.familiar();
        let client = Client::new(reference, options.plain_http, self.limits.time)?;
        let asking = progress.begin(&format!("asking for {what}"), None);
        let (digest, config, layers) = find(&client, reference, &what)?;
        let data = client.json_blob(&config)?;
        drop(asking);
        let checked = read_config(&data, &what)?;
        if let Some(why) = foreign(&checked) {
            return Err(Error::invalid(format!(
                "{what}: {why}; mayfly runs linux/amd64"
            )));
        }
        count_layers(&checked, layers.len())?;
        let sizes = layers.iter().map(|layer| layer.size);
        if sizes.fold(0, u64::saturating_add) > self.limits.size() {
            return Err(Error::invalid(format!(
                "{what}: {}",
                self.limits.too_large()
            )));
        }
        let pull = Pull {
            store: self,
            client: &client,
            config: &checked,
            blobs: &layers,
            what: &what,
            progress,
            stop: AtomicBool::new(false),
            next: AtomicUsize::new(0),
        };
        let layers = pull.run()?;
        self.add_image(
            &data,
            &layers,
            std::slice::from_ref(reference),
            Some(digest),
        )
    }
}

/// The manifest of the image that runs here: its digest as the reference's registry
/// knows it, its configuration, its layers.
fn find(
    client: &Client,
    reference: &Reference,
    what: &str,
) -> Result<(Digest, Descriptor, Vec<Descriptor>), Error> {
    let (data, digest) = client.manifest(&reference.wanted())?;
    let (config, layers) = image_in(client, &data, what, 0)?;
    Ok((digest, config, layers))
}

/// What a manifest names, or the one in an index that runs here.
fn image_in(
    client: &Client,
    data: &[u8],
    what: &str,
    depth: usize,
) -> Result<(Descriptor, Vec<Descriptor>), Error> {
    if depth >= INDEXES_MAX {
        return Err(Error::invalid(format!(
            "{what}: indexes of indexes of indexes"
        )));
    }
    let manifest = Manifest::read(data)
        .map_err(|_| Error::invalid(format!("{what}: an image in a format that is not known")))?;
    match manifest {
        Manifest::Image { config, layers } => Ok((config, layers)),
        Manifest::Artifact(kind) => Err(Error::invalid(format!("{what}: {}", artifact(&kind)))),
        Manifest::Index { manifests } => {
            let mut none = Error::invalid(format!("{what}: there is no image for linux/amd64"));
            for candidate in candidates(manifests) {
                let (data, _) = client.manifest(&candidate.digest.to_string())?;
                match image_in(client, &data, what, depth.saturating_add(1)) {
                    // Something else may lie before it.
                    Err(error) if error.kind() == ErrorKind::Invalid => none = error,
                    found => return found,
                }
            }
            Err(none)
        }
    }
}

struct Pull<'a> {
    store: &'a Store,
    client: &'a Client,
    config: &'a ImageConfig,
    blobs: &'a [Descriptor],
    what: &'a str,
    progress: &'a dyn Progress,
    stop: AtomicBool,
    next: AtomicUsize,
}

impl Pull<'_> {
    /// Brings the layers: several blobs come at once, and become layers in order.
    fn run(&self) -> Result<Vec<Layer>, Error> {
        let mut wanted = Vec::new();
        let mut seen = BTreeSet::new();
        for (number, (diff_id, blob)) in self
            .config
            .rootfs
            .diff_ids
            .iter()
            .zip(self.blobs)
            .enumerate()
        {
            if !self.store.has_layer(diff_id)? && seen.insert(blob.digest) {
                wanted.push(number);
            }
        }
        thread::scope(|scope| {
            let (sender, receiver) = channel();
            for _ in 0..AT_ONCE.min(wanted.len()) {
                let sender = sender.clone();
                scope.spawn(|| self.fetch(&wanted, sender));
            }
            drop(sender);
            let layers = self.layers(&wanted, &receiver);
            self.stop.store(true, Ordering::Relaxed);
            layers
        })
    }

    /// Fetches blobs, on a thread of its own.
    fn fetch(&self, wanted: &[usize], sender: Sender<(usize, Came)>) {
        while let Some(number) = wanted.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            let came = self.blob(*number);
            let failed = came.is_err();
            if sender.send((*number, came)).is_err() || failed {
                self.stop.store(true, Ordering::Relaxed);
                break;
            }
        }
    }

    fn diff_id(&self, number: usize) -> Option<(&Digest, &Descriptor)> {
        Some((
            self.config.rootfs.diff_ids.get(number)?,
            self.blobs.get(number)?,
        ))
    }

    fn name(&self, number: usize) -> String {
        format!("layer {}/{}", number.saturating_add(1), self.blobs.len())
    }

    /// Brings a blob. Of several processes one does, the others wait.
    fn blob(&self, number: usize) -> Came {
        let Some((diff_id, blob)) = self.diff_id(number) else {
            return Ok(None);
        };
        let path = self.store.partial(&blob.digest);
        let waiting = || self.progress.begin("waiting for another pull", None);
        let file = take_file(&path, waiting).or_host(self.store.failed())?;
        if self.store.has_layer(diff_id)? {
            return Ok(None);
        }
        self.download((file, &path), number, blob).map(Some)
    }

    fn download(
        &self,
        file: (File, &Path),
        number: usize,
        blob: &Descriptor,
    ) -> Result<Section, Error> {
        let task = self.progress.begin(&self.name(number), Some(blob.size));
        let stop = || self.stop.load(Ordering::Relaxed);
        self.client.blob(blob, file, &*task, &stop)
    }

    fn layers(
        &self,
        wanted: &[usize],
        receiver: &Receiver<(usize, Came)>,
    ) -> Result<Vec<Layer>, Error> {
        let mut came: BTreeMap<usize, Option<Section>> = BTreeMap::new();
        let mut layers: Vec<Layer> = Vec::new();
        for number in 0..self.blobs.len() {
            let Some((diff_id, blob)) = self.diff_id(number) else {
                continue;
            };
            while wanted.contains(&number) && !came.contains_key(&number) {
                let Ok((other, result)) = receiver.recv() else {
                    break;
                };
                came.insert(other, result?);
            }
            if let Some(layer) = self.store.layer(diff_id, &layers)? {
                layers.push(layer);
                self.store.drop_partial(&blob.digest)?;
                continue;
            }
            let source = match came.remove(&number).flatten() {
                Some(source) => source,
                // It is there, but above other layers.
                None => {
                    let path = self.store.partial(&blob.digest);
                    let file = take_file(&path, || {}).or_host(self.store.failed())?;
                    self.download((file, &path), number, blob)?
                }
            };
            let what = format!("{}: {}", self.what, self.name(number));
            let layer =
                self.store
                    .add_layer(&source, Some(*diff_id), &layers, &what, self.progress)?;
            layers.push(layer);
            self.store.drop_partial(&blob.digest)?;
        }
        Ok(layers)
    }
}
