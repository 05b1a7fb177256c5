//! Images in files: what `docker save` and `podman save` write, and OCI layouts,
//! as archives or folders.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::config::{Descriptor, ImageConfig, LAYERS_MAX, Manifest};
use super::digest::{Digest, Hashing};
use super::progress::Progress;
use super::reference::Reference;
use super::section::{Section, SectionReader};
use super::store::{Image, Store, check_config, read_json};
use super::tarball::{ArchiveError, Entries, Kind};
use super::tree::{normalised, split};
use crate::failure::{Failure, OrFail};

/// So many files has no archive of images.
const MEMBERS_MAX: usize = 100_000;
/// How many links lead to a file at most.
const LINKS_MAX: usize = 8;
/// How many indexes lie in one another.
const INDEXES_MAX: usize = 4;
const IMAGES_MAX: usize = 1000;

/// `manifest.json` of `docker save`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

/// Where containerd and OCI keep an image's name.
const FULL_NAME: &str = "io.containerd.image.name";
const NAME: &str = "org.opencontainers.image.ref.name";

/// The files of an archive or of a folder.
enum Files {
    Folder(PathBuf),
    Archive(BTreeMap<Vec<u8>, Member>),
}

enum Member {
    Data(Section),
    Link(Vec<u8>),
}

impl Files {
    fn open(&self, name: &str) -> Result<Option<Section>, Failure> {
        let path = normalised(name.as_bytes())
            .map_err(|why| Failure::config(format!("{name:?}: {why}")))?;
        match self {
            Files::Folder(root) => {
                // The name as it is may be absolute.
                let path = root.join(OsStr::from_bytes(&path));
                let file = inside(root, &path).and_then(|()| {
                    File::options()
                        .read(true)
                        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                        .open(&path)
                });
                match file {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                    file => file
                        .and_then(Section::whole)
                        .map(Some)
                        .or_config(path.display()),
                }
            }
            Files::Archive(members) => {
                let mut path = path;
                for _ in 0..LINKS_MAX {
                    match members.get(&path) {
                        None => return Ok(None),
                        Some(Member::Data(data)) => return Ok(Some(data.clone())),
                        Some(Member::Link(target)) => path = target.clone(),
                    }
                }
                Ok(None)
            }
        }
    }

    fn need(&self, name: &str) -> Result<Section, Failure> {
        self.open(name)?
            .ok_or_else(|| Failure::config(format!("{name} is missing")))
    }

    fn json(&self, name: &str) -> Result<Vec<u8>, Failure> {
        read_json(&self.need(name)?, name)
    }

    /// A blob, and all of it, of its digest.
    fn blob(&self, descriptor: &Descriptor) -> Result<Section, Failure> {
        let name = format!("blobs/sha256/{}", descriptor.digest.hex());
        let blob = self.need(&name)?;
        let (digest, _) = Hashing::new(blob.reader()).finish().or_host(&name)?;
        if digest != descriptor.digest || blob.len() != descriptor.size {
            return Err(Failure::config(format!("{name}: its digest is {digest}")));
        }
        Ok(blob)
    }

    /// Reads the list of an archive whose members can be read in place.
    fn list(archive: &Section) -> Result<Self, ArchiveError> {
        let mut members = BTreeMap::new();
        let mut entries = Entries::new(archive.reader());
        while let Some(entry) = entries.next()? {
            if members.len() >= MEMBERS_MAX {
                return Err(ArchiveError::TooMuch(
                    "more than 100000 files in an archive of images".into(),
                ));
            }
            let refuse = |why| ArchiveError::entry(&entry.path, why);
            let path = normalised(&entry.path).map_err(refuse)?;
            let member = match &entry.kind {
                Kind::File => {
                    let start = SectionReader::position(entries.get_ref());
                    let part = archive.part(start, entry.size);
                    // One with holes is stored in another way.
                    let part = part.filter(|_| !entries.has_holes());
                    Member::Data(part.ok_or(ArchiveError::Truncated)?)
                }
                Kind::Link(target) => Member::Link(normalised(target).map_err(refuse)?),
                Kind::Symlink(target) => Member::Link(beside(&path, target)),
                _ => continue,
            };
            members.insert(path, member);
        }
        Ok(Files::Archive(members))
    }
}

/// No folder on the way to a file is a symbolic link that leads out of the root.
fn inside(root: &Path, path: &Path) -> io::Result<()> {
    let parent = path.parent().unwrap_or(root);
    match parent.canonicalize()?.starts_with(root.canonicalize()?) {
        true => Ok(()),
        false => Err(io::Error::other("lies outside of the folder")),
    }
}

/// What a symbolic link in an archive means; nothing outside of it.
fn beside(path: &[u8], target: &[u8]) -> Vec<u8> {
    let start = match target.starts_with(b"/") {
        true => b"",
        false => split(path).0,
    };
    let mut names: Vec<&[u8]> = Vec::new();
    let parts = start
        .split(|byte| *byte == b'/')
        .chain(target.split(|byte| *byte == b'/'));
    for name in parts {
        match name {
            b"" | b"." => {}
            b".." => {
                names.pop();
            }
            name => names.push(name),
        }
    }
    names.join(&b'/')
}

/// An image that was found in the files.
struct Found {
    config: Vec<u8>,
    checked: ImageConfig,
    layers: Vec<Section>,
    names: Vec<Reference>,
    manifest: Option<Digest>,
}

impl Store {
    /// Adds the images in an archive (plain or compressed) or OCI layout. `name`
    /// is what the only one is called beside its own names.
    pub fn load(
        &self,
        path: &Path,
        name: Option<&Reference>,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>, Failure> {
        let what = path.display().to_string();
        let told = |failure: Failure| Failure::new(failure.class, format!("{what}: {failure}"));
        let metadata = path.metadata().or_config(&what)?;
        let work;
        let files = if metadata.is_dir() {
            Files::Folder(path.to_owned())
        } else if metadata.is_file() {
            let mut archive = File::open(path).and_then(Section::whole).or_config(&what)?;
            if !archive.is_plain().or_config(&what)? {
                work = self.work()?;
                let task = progress.begin("unpacking the archive", None);
                let unpacked = archive.unpacked(&self.limits);
                let spooled =
                    unpacked.and_then(|input| Ok(Section::spooled(input, work.path(), &*task)?));
                archive = spooled.or_config(&what)?;
            }
            Files::list(&archive).or_config(&what)?
        } else {
            return Err(Failure::config(format!(
                "{what}: neither a file nor a folder"
            )));
        };
        let mut found = if files.open("manifest.json").map_err(told)?.is_some() {
            saved(&files).map_err(told)?
        } else if files.open("index.json").map_err(told)?.is_some() {
            laid_out(&files).map_err(told)?
        } else {
            return Err(Failure::config(format!(
                "{what}: holds no images (no manifest.json or index.json); is it a root file \
                 system? mayfly image import"
            )));
        };
        if found.is_empty() {
            return Err(Failure::config(format!(
                "{what}: holds no image for linux/amd64"
            )));
        }
        if let Some(name) = name {
            match found.as_mut_slice() {
                [one] => one.names.push(name.clone()),
                _ => {
                    return Err(Failure::config(format!(
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

    fn add_found(
        &self,
        image: &Found,
        what: &str,
        progress: &dyn Progress,
    ) -> Result<Image, Failure> {
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

/// What `docker save` and `podman save` write.
fn saved(files: &Files) -> Result<Vec<Found>, Failure> {
    let list: Vec<Saved> =
        serde_json::from_slice(&files.json("manifest.json")?).or_config("manifest.json")?;
    if list.len() > IMAGES_MAX {
        return Err(Failure::config("more than 1000 images"));
    }
    let mut all = Vec::new();
    for one in list {
        let config = files.json(&one.config)?;
        let checked = check_config(&config, &one.config)?;
        let named = one.config.rsplit('/').next().unwrap_or_default();
        let named = Digest::from_hex(named.strip_suffix(".json").unwrap_or(named));
        if named.is_some_and(|digest| digest != Digest::of(&config)) {
            return Err(Failure::config(format!(
                "{}: its digest is another",
                one.config
            )));
        }
        count_layers(&checked, one.layers.len())?;
        let layers = one
            .layers
            .iter()
            .map(|name| files.need(name))
            .collect::<Result<_, _>>()?;
        let tags = one.repo_tags.unwrap_or_default();
        let names = tags
            .iter()
            .map(|tag| tag.parse().or_config("manifest.json"));
        all.push(Found {
            config,
            checked,
            layers,
            names: names.collect::<Result<_, _>>()?,
            manifest: None,
        });
    }
    Ok(all)
}

/// An OCI layout.
fn laid_out(files: &Files) -> Result<Vec<Found>, Failure> {
    let index: Manifest =
        serde_json::from_slice(&files.json("index.json")?).or_config("index.json")?;
    let Manifest::Index { manifests } = index else {
        return Err(Failure::config("index.json: is no index"));
    };
    if manifests.len() > IMAGES_MAX {
        return Err(Failure::config("more than 1000 images"));
    }
    let mut all: BTreeMap<Digest, Found> = BTreeMap::new();
    for descriptor in &manifests {
        let names = descriptor
            .annotations
            .get(FULL_NAME)
            .or(descriptor.annotations.get(NAME));
        // A mere tag does not say of what.
        let names = names.filter(|name| name.contains([':', '/']));
        let name: Option<Reference> = names.and_then(|name| name.parse().ok());
        let Some(mut found) = manifest(files, descriptor)? else {
            continue;
        };
        found.names.extend(name);
        match all.get_mut(&descriptor.digest) {
            Some(same) => same.names.append(&mut found.names),
            None => drop(all.insert(descriptor.digest, found)),
        }
    }
    Ok(all.into_values().collect())
}

/// The image of a manifest, or the one in an index that runs here.
fn manifest(files: &Files, descriptor: &Descriptor) -> Result<Option<Found>, Failure> {
    let mut descriptor = descriptor.clone();
    for _ in 0..INDEXES_MAX {
        if descriptor
            .platform
            .as_ref()
            .is_some_and(|platform| !platform.runs_here())
        {
            return Ok(None);
        }
        let what = descriptor.digest.to_string();
        let data = read_json(&files.blob(&descriptor)?, &what)?;
        match serde_json::from_slice(&data).or_config(&what)? {
            Manifest::Index { manifests } => {
                let Some(next) = choose(manifests) else {
                    return Ok(None);
                };
                descriptor = next;
            }
            Manifest::Image { config, layers } => {
                let data = read_json(&files.blob(&config)?, &what)?;
                let checked = check_config(&data, &what)?;
                count_layers(&checked, layers.len())?;
                let layers = layers
                    .iter()
                    .map(|layer| files.blob(layer))
                    .collect::<Result<_, _>>()?;
                return Ok(Some(Found {
                    config: data,
                    checked,
                    layers,
                    names: Vec::new(),
                    manifest: Some(descriptor.digest),
                }));
            }
        }
    }
    Err(Failure::config("indexes of indexes of indexes"))
}

/// The manifest in an index that runs here.
pub fn choose(manifests: Vec<Descriptor>) -> Option<Descriptor> {
    let unsaid = |descriptor: &Descriptor| descriptor.platform.is_none();
    let fits = |descriptor: &Descriptor| {
        let platform = descriptor.platform.as_ref();
        platform.is_some_and(super::config::Platform::runs_here)
    };
    let only = manifests.len() == 1;
    manifests
        .into_iter()
        .find(|descriptor| fits(descriptor) || (only && unsaid(descriptor)))
}

/// A configuration and a manifest must tell of equally many layers.
pub fn count_layers(config: &ImageConfig, count: usize) -> Result<(), Failure> {
    let expected = config.rootfs.diff_ids.len();
    match expected == count && count <= LAYERS_MAX {
        true => Ok(()),
        false => Err(Failure::config(format!(
            "there are {count} layers, and its configuration has {expected}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::image::tarball::{Meta, Writer};

    fn files(entries: &[(&str, Kind, &str)]) -> Files {
        let mut out = Writer::new(Vec::new());
        for (name, kind, data) in entries {
            let len = data.len() as u64;
            out.entry(
                name.as_bytes(),
                kind,
                &Meta::default(),
                len,
                &mut data.as_bytes(),
            )
            .unwrap();
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&out.finish().unwrap()).unwrap();
        Files::list(&Section::whole(file).unwrap()).unwrap()
    }

    #[test]
    fn links_in_an_archive_lead_nowhere_else() {
        let symlink = |target: &str| Kind::Symlink(target.as_bytes().to_vec());
        let files = files(&[
            ("./a/layer.tar", Kind::File, "data"),
            ("b/layer.tar", symlink("../a/layer.tar"), ""),
            ("c", Kind::Link(b"b/layer.tar".to_vec()), ""),
            ("d", symlink("/../../a/./layer.tar"), ""),
            ("round", symlink("and-round"), ""),
            ("and-round", symlink("round"), ""),
            ("out", symlink("/etc/passwd"), ""),
        ]);
        for name in ["a/layer.tar", "b/layer.tar", "c", "d", "./a//layer.tar"] {
            let mut text = String::new();
            let found = files.open(name).unwrap().unwrap();
            found.reader().read_to_string(&mut text).unwrap();
            assert_eq!(text, "data", "{name}");
        }
        for name in ["round", "out", "missing", "a"] {
            assert!(files.open(name).unwrap().is_none(), "{name}");
        }
        assert!(files.open("../a").is_err());
    }

    #[test]
    fn names_in_a_folder_lead_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let (root, secret) = (folder.path().join("image"), folder.path().join("secret"));
        std::fs::create_dir_all(root.join("blobs")).unwrap();
        std::fs::write(root.join("blobs/a"), "data").unwrap();
        std::fs::write(&secret, "secret").unwrap();
        std::os::unix::fs::symlink(folder.path(), root.join("out")).unwrap();
        std::os::unix::fs::symlink(&secret, root.join("link")).unwrap();
        let files = Files::Folder(root);
        for name in ["blobs/a", "/blobs/a", "./blobs//a"] {
            assert_eq!(files.open(name).unwrap().unwrap().len(), 4, "{name}");
        }
        let absolute = secret.to_str().unwrap();
        for name in [
            absolute,
            "out/secret",
            "link",
            "../secret",
            "blobs/b",
            "x/y",
        ] {
            assert!(!matches!(files.open(name), Ok(Some(_))), "{name}");
        }
    }

    #[test]
    fn the_one_that_runs_here_is_chosen() {
        let one = |text: &str| -> Descriptor {
            let digest = Digest::of(text.as_bytes());
            let platform = match text.split_once('/') {
                Some((os, architecture)) => {
                    format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"}}"#)
                }
                None => String::new(),
            };
            serde_json::from_str(&format!(r#"{{"digest":"{digest}","size":1{platform}}}"#)).unwrap()
        };
        let chosen = |all: &[&str]| {
            let found = choose(all.iter().map(|text| one(text)).collect())?;
            all.iter().position(|text| one(text).digest == found.digest)
        };
        assert_eq!(
            chosen(&["linux/arm64", "unknown/unknown", "linux/amd64"]),
            Some(2)
        );
        assert_eq!(chosen(&["linux/arm64", "windows/amd64", "unsaid"]), None);
        assert_eq!(chosen(&["unsaid"]), Some(0));
        assert_eq!(chosen(&["linux/arm64"]), None);
        assert_eq!(chosen(&[]), None);
    }
}
