//! The images of a user, on disk.
//!
//! ```text
//! lock              held while names, images or layers come or go
//! names.json        names → images
//! images/ID.json    an image: its configuration, its layers
//! layers/NAME/      a layer: layer.squashfs, layer.json; NAME is its archive's
//!                   digest, and what it takes from layers below
//! partial/DIGEST    a blob on its way from a registry
//! tmp/…             what is being made; its maker has it locked
//! ```
//!
//! Everything comes into place whole, by a rename, after it was made and synced
//! in `tmp`. An image's layers come before its record, and go after it; whoever
//! uses either holds a lock on it. So nothing is ever half there, whenever a
//! process or the host ends.

pub mod removal;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use mayfly_files::{Directory, Work, lock, sync_parent};
use mayfly_text::printable;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::config::{ImageConfig, JSON_MAX, LAYERS_MAX};
use super::digest::Digest;
use super::json;
use super::layers::{self, IMAGE_FILE, LayerError, Record};
use super::limits::Limits;
use super::progress::Progress;
use super::reference::Reference;
use super::section::Section;
use crate::error::{Context, Error};

/// The folders in a store.
const IMAGES: &str = "images";
const LAYERS: &str = "layers";
const PARTIAL: &str = "partial";
/// What the names of disks began with that earlier versions gave one until they were made.
const SCRATCH: &str = "scratch-";
const NAMES: &str = "names.json";
/// The record of a layer.
pub(super) const RECORD_FILE: &str = "layer.json";

/// An image that is complete on disk, and stays there as long as this does, unless
/// it is one of a list.
#[derive(Clone, Debug)]
pub struct Image {
    /// The digest of its configuration.
    pub id: Digest,
    /// What it is called, in full, with the digests of the manifests.
    pub names: BTreeMap<Reference, Option<Digest>>,
    /// The image's configuration.
    pub config: ImageConfig,
    /// Its layers' file systems (squashfs, the files below
    /// [`LAYER_ROOT`](layers::LAYER_ROOT)), lowest first.
    pub layers: Vec<PathBuf>,
    /// The bytes of its files.
    pub size: u64,
    /// The time at which it came into the store.
    pub stored: SystemTime,
    /// Its layers stay as long as its record does.
    _held: Option<Arc<File>>,
}

/// `images/ID.json`
#[derive(Serialize, Deserialize)]
struct ImageRecord {
    /// As its digest was made of it.
    config: String,
    /// Lowest first.
    layers: Vec<LayerRecord>,
}

/// What is needed of a layer to run an image.
#[derive(Serialize, Deserialize)]
struct LayerRecord {
    /// Its directory's name.
    name: String,
    size: u64,
    empty: bool,
    opaque: bool,
}

/// `names.json`
type Names = BTreeMap<String, Named>;

#[derive(Clone, Serialize, Deserialize)]
struct Named {
    id: Digest,
    /// Of the manifest, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    manifest: Option<Digest>,
}

/// A layer that is in place, and stays there as long as this does.
#[derive(Debug)]
pub struct Layer {
    name: String,
    /// What layers above need to know of it.
    pub record: Record,
    _held: File,
}

/// The images of a user.
#[derive(Debug)]
pub struct Store {
    directory: Directory,
    root: PathBuf,
    /// The limits for images that come.
    pub(super) limits: Limits,
}

impl Store {
    /// Opens one in a directory, which is made if it is missing.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let what = || format!("image store {}", root.display());
        let directory = Directory::open(root, &[IMAGES, LAYERS, PARTIAL]).or_host(what())?;
        directory.clean().or_host(what())?;
        remove_old_disks(root).or_host(what())?;
        let root = root.to_owned();
        Ok(Store {
            directory,
            root,
            limits: Limits::default(),
        })
    }

    /// With other limits for the images that come.
    pub fn with_limits(self, limits: Limits) -> Self {
        Store { limits, ..self }
    }

    /// Says that something in the store failed.
    pub(super) fn failed(&self) -> impl Display {
        format!("image store {}", self.root.display())
    }

    pub(super) fn work(&self) -> Result<Work, Error> {
        self.directory.work().or_host(self.failed())
    }

    /// Where a blob lies until all of it is there.
    pub(super) fn partial(&self, digest: &Digest) -> PathBuf {
        self.directory.path(PARTIAL).join(digest.hex())
    }

    fn names(&self) -> Result<Names, Error> {
        match fs::read(self.directory.path(NAMES)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Names::new()),
            read => {
                let data = read.or_host(self.failed())?;
                serde_json::from_slice(&data).or_host(format_args!("{}: {NAMES}", self.failed()))
            }
        }
    }

    fn write_names(&self, names: &Names) -> Result<(), Error> {
        let data = serde_json::to_vec(names).or_internal(NAMES)?;
        self.directory.write(NAMES, &data).or_host(self.failed())
    }

    fn layer_path(&self, name: &str) -> PathBuf {
        self.directory.path(LAYERS).join(name)
    }

    fn image_path(&self, id: &Digest) -> PathBuf {
        self.directory
            .path(IMAGES)
            .join(format!("{}.json", id.hex()))
    }

    fn ids(&self) -> Result<Vec<Digest>, Error> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(self.directory.path(IMAGES)).or_host(self.failed())? {
            let name = entry.or_host(self.failed())?.file_name();
            let hex = name.to_str().and_then(|name| name.strip_suffix(".json"));
            ids.extend(hex.and_then(Digest::from_hex));
        }
        ids.sort();
        Ok(ids)
    }

    /// The image of a name, an ID or the unique start of one.
    pub fn find(&self, name: &str) -> Result<Option<Image>, Error> {
        let Some(id) = self.id_of(name)? else {
            return Ok(None);
        };
        self.image(&id)
    }

    fn id_of(&self, name: &str) -> Result<Option<Digest>, Error> {
        let names = self.names()?;
        if let Ok(reference) = name.parse::<Reference>() {
            let exact = names.get(&reference.to_string());
            let by_digest = || {
                let digest = reference.digest.as_ref()?;
                names.iter().find_map(|(text, named)| {
                    let other: Reference = text.parse().ok()?;
                    let same = other.repository == reference.repository
                        && other.registry == reference.registry
                        && named.manifest.as_ref() == Some(digest);
                    same.then_some(named)
                })
            };
            if let Some(named) = exact.or_else(by_digest) {
                return Ok(Some(named.id));
            }
        }
        let start = name.strip_prefix("sha256:").unwrap_or(name);
        let digits = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if start.is_empty() || !start.bytes().all(digits) {
            return Ok(None);
        }
        let mut found: Vec<Digest> = self.ids()?;
        found.retain(|id| id.hex().starts_with(start));
        match found.as_slice() {
            [] => Ok(None),
            [id] => Ok(Some(*id)),
            _ => Err(Error::invalid(format!(
                "{name}: several images have an ID that starts so; write more of it"
            ))),
        }
    }

    /// Opens an image, and holds it.
    fn image(&self, id: &Digest) -> Result<Option<Image>, Error> {
        let path = self.image_path(id);
        let Some(mut file) = lock::hold(&path).or_host(self.failed())? else {
            return Ok(None);
        };
        let broken = |what: &str| {
            Error::host(format!(
                "{}: image {id} is broken ({what}); remove it (mayfly image rm) and get it again",
                self.failed()
            ))
        };
        let mut text = Vec::new();
        file.read_to_end(&mut text).or_host(self.failed())?;
        let record: ImageRecord =
            serde_json::from_slice(&text).map_err(|error| broken(&error.to_string()))?;
        if Digest::of(record.config.as_bytes()) != *id {
            return Err(broken("its configuration is another"));
        }
        let config = json::from_slice(record.config.as_bytes())
            .map_err(|error| broken(&error.to_string()))?;
        let stored = file
            .metadata()
            .and_then(|it| it.modified())
            .or_host(self.failed())?;
        let mut layers = Vec::new();
        let mut size = 0_u64;
        for layer in &record.layers {
            let file = self.layer_path(&layer.name).join(IMAGE_FILE);
            if !file.exists() {
                return Err(broken("a layer is missing"));
            }
            size = size.saturating_add(layer.size);
            if layer.opaque {
                layers.clear();
            }
            if !layer.empty {
                // One that comes again hides what it was before.
                layers.retain(|other| *other != file);
                layers.push(file);
            }
        }
        let names = self
            .names()?
            .into_iter()
            .filter(|(_, named)| named.id == *id);
        let names = names.filter_map(|(name, named)| Some((name.parse().ok()?, named.manifest)));
        Ok(Some(Image {
            id: *id,
            names: names.collect(),
            config,
            layers,
            size,
            stored,
            _held: Some(Arc::new(file)),
        }))
    }

    /// All images; what is done to them meanwhile is not held up.
    pub fn list(&self) -> Result<Vec<Image>, Error> {
        let mut images = Vec::new();
        for id in self.ids()? {
            let image = self.image(&id)?;
            // There may be more of them than descriptors.
            images.extend(image.map(|image| Image {
                _held: None,
                ..image
            }));
        }
        Ok(images)
    }

    /// The exact text of an image's configuration.
    pub fn raw_config(&self, image: &Image) -> Result<Box<RawValue>, Error> {
        let text = fs::read(self.image_path(&image.id)).or_host(self.failed())?;
        let record: ImageRecord = serde_json::from_slice(&text).or_host(self.failed())?;
        RawValue::from_string(record.config).or_host(self.failed())
    }

    fn open_layer(&self, name: &str) -> Result<Option<Layer>, Error> {
        let path = self.layer_path(name);
        let Some(held) = lock::hold(&path).or_host(self.failed())? else {
            return Ok(None);
        };
        let data = fs::read(path.join(RECORD_FILE)).or_host(self.failed())?;
        let record = serde_json::from_slice(&data)
            .or_host(format_args!("{}: layer {name}", self.failed()))?;
        let name = name.to_owned();
        Ok(Some(Layer {
            name,
            record,
            _held: held,
        }))
    }

    /// Forgets a blob that became a layer. Another pull that waits for it goes on.
    pub(super) fn drop_partial(&self, digest: &Digest) -> Result<(), Error> {
        let path = self.partial(digest);
        if let Some(_held) = lock::take(&path).or_host(self.failed())? {
            fs::remove_file(&path).or_host(self.failed())?;
        }
        Ok(())
    }

    /// True if there is a layer of an archive, whatever it lies above.
    pub(super) fn has_layer(&self, diff_id: &Digest) -> Result<bool, Error> {
        Ok(!self.variants(diff_id)?.is_empty())
    }

    fn variants(&self, diff_id: &Digest) -> Result<Vec<String>, Error> {
        let hex = diff_id.hex();
        let mut found = Vec::new();
        for entry in fs::read_dir(self.directory.path(LAYERS)).or_host(self.failed())? {
            let name = entry.or_host(self.failed())?.file_name();
            let name = name.to_str().filter(|name| name.starts_with(&hex));
            found.extend(name.map(str::to_owned));
        }
        Ok(found)
    }

    /// The layer of an archive above others, if it is there.
    pub(super) fn layer(&self, diff_id: &Digest, below: &[Layer]) -> Result<Option<Layer>, Error> {
        for name in self.variants(diff_id)? {
            // Any of them tells what it takes from those below.
            let Some(layer) = self.open_layer(&name)? else {
                continue;
            };
            let wanted = inherited(&layer.record, below).name(diff_id);
            return match wanted == name {
                true => Ok(Some(layer)),
                false => self.open_layer(&wanted),
            };
        }
        Ok(None)
    }

    /// Makes a layer of an archive, unless it is there. `what` names the archive.
    pub(super) fn add_layer(
        &self,
        source: &Section,
        expected: Option<Digest>,
        below: &[Layer],
        what: &str,
        progress: &dyn Progress,
    ) -> Result<Layer, Error> {
        if let Some(expected) = &expected
            && let Some(layer) = self.layer(expected, below)?
        {
            return Ok(layer);
        }
        let below_have = below.iter().map(|layer| layer.record.size);
        let limits = self.limits.less(below_have.fold(0, u64::saturating_add));
        let mut checked = layers::check(source, expected, &limits, progress)
            .map_err(|error| refused(error, what))?;
        let record = checked.record.clone();
        let inheritance = inherited(&record, below);
        let name = inheritance.name(&record.diff_id);
        let target = self.layer_path(&name);
        loop {
            if let Some(layer) = self.open_layer(&name)? {
                return Ok(layer);
            }
            let work = self.work()?;
            // Not the directory that is locked: its new name must not be.
            let made = work.path().join("layer");
            fs::create_dir(&made).or_host(self.failed())?;
            checked
                .build(&inheritance, &made, progress)
                .map_err(|error| refused(error, what))?;
            let data = serde_json::to_vec(&record).or_internal(RECORD_FILE)?;
            self.place(&made, &data, &target).or_host(self.failed())?;
        }
    }

    /// Gives a layer its name; if another process was faster, its layer stays.
    fn place(&self, made: &Path, record: &[u8], target: &Path) -> io::Result<()> {
        let path = made.join(RECORD_FILE);
        fs::write(&path, record)?;
        File::open(&path)?.sync_all()?;
        File::open(made)?.sync_all()?;
        match fs::rename(made, target) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => {
                other?;
                sync_parent(target)
            }
        }
    }

    /// Makes an image of a configuration and its layers, and gives it names.
    pub(super) fn add_image(
        &self,
        config: &[u8],
        layers: &[Layer],
        names: &[Reference],
        manifest: Option<Digest>,
    ) -> Result<Image, Error> {
        let id = Digest::of(config);
        let config = str::from_utf8(config).or_invalid("the image's configuration")?;
        let record = ImageRecord {
            config: config.to_owned(),
            layers: layers
                .iter()
                .map(|layer| LayerRecord {
                    name: layer.name.clone(),
                    size: layer.record.size,
                    empty: layer.record.empty,
                    opaque: layer.record.opaque,
                })
                .collect(),
        };
        let data = serde_json::to_vec(&record).or_internal("image")?;
        {
            let _lock = self.directory.lock().or_host(self.failed())?;
            let name = format!("{IMAGES}/{}.json", id.hex());
            let old = fs::read(self.image_path(&id)).ok();
            // Who holds it must not lose it.
            if old.as_ref() != Some(&data) {
                self.directory.write(&name, &data).or_host(self.failed())?;
            }
            if !names.is_empty() {
                let mut all = self.names()?;
                for name in names {
                    all.insert(name.to_string(), Named { id, manifest });
                }
                self.write_names(&all)?;
            }
        }
        self.image(&id)?
            .ok_or_else(|| Error::host(format!("image {id} was removed while it was added")))
    }
}

fn remove_old_disks(root: &Path) -> io::Result<()> {
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name();
        let old = name.as_encoded_bytes().starts_with(SCRATCH.as_bytes());
        if old && entry.file_type()?.is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn inherited(record: &Record, below: &[Layer]) -> layers::Inheritance {
    let below: Vec<&Record> = below.iter().map(|layer| &layer.record).collect();
    record.inherited(&below)
}

/// Whose fault it is that there is no layer.
fn refused(error: LayerError, what: &str) -> Error {
    match &error {
        LayerError::Archive(super::tarball::ArchiveError::Io(cause))
            if cause.raw_os_error().is_some() =>
        {
            Err::<(), _>(error).or_host(what)
        }
        LayerError::Archive(_) | LayerError::Digest { .. } => Err::<(), _>(error).or_invalid(what),
        _ => Err::<(), _>(error).or_host(what),
    }
    .err()
    .unwrap_or_else(|| Error::host(what))
}

/// Reads a JSON text of a size that is allowed.
pub(super) fn read_json(source: &Section, what: &str) -> Result<Vec<u8>, Error> {
    if source.len() > JSON_MAX {
        return Err(Error::invalid(format!("{what}: more than 8 MiB of JSON")));
    }
    let mut data = Vec::new();
    source.reader().read_to_end(&mut data).or_host(what)?;
    Ok(data)
}

/// Reads a configuration. One with too many layers is refused.
pub(super) fn read_config(data: &[u8], what: &str) -> Result<ImageConfig, Error> {
    let config: ImageConfig =
        json::from_slice(data).or_invalid(format_args!("{what}: its configuration"))?;
    if config.rootfs.diff_ids.len() > LAYERS_MAX {
        return Err(Error::invalid(format!(
            "{what}: more than {LAYERS_MAX} layers"
        )));
    }
    Ok(config)
}

/// The reason why an image cannot run here, if there is one.
pub(super) fn foreign(config: &ImageConfig) -> Option<String> {
    let (os, architecture) = (config.os.as_str(), config.architecture.as_str());
    match (os, architecture) {
        ("linux" | "", "amd64" | "") => None,
        _ => Some(printable::line(&format!("is for {os}/{architecture}"))),
    }
}
