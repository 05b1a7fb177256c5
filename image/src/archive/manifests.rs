//! What images there are in an archive's files.

use std::collections::BTreeMap;

use mayfly_text::printable;
use serde::Deserialize;

use super::files::Files;
use super::found::{Contents, Found};
use crate::config::{Descriptor, LAYERS_MAX, Manifest, artifact};
use crate::config::{ImageConfig, Platform};
use crate::digest::Digest;
use crate::error::{Context, Error};
use crate::json;
use crate::reference::Reference;
use crate::store::{foreign, read_config};

/// How many indexes lie in one another.
const INDEXES_MAX: usize = 4;
const IMAGES_MAX: usize = 1000;
/// How many manifests of an index are looked at that do not say what they are for.
const SILENT_MAX: usize = 8;

/// `manifest.json` of `docker save`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Vec<String>,
    #[serde(default)]
    layers: Vec<String>,
}

/// Where containerd and OCI keep an image's name.
const FULL_NAME: &str = "io.containerd.image.name";
const NAME: &str = "org.opencontainers.image.ref.name";

/// What `docker save` and `podman save` write.
pub fn saved(files: &Files) -> Result<Contents, Error> {
    let list: Vec<Saved> =
        json::from_slice(&files.json("manifest.json")?).or_invalid("manifest.json")?;
    if list.len() > IMAGES_MAX {
        return Err(Error::invalid("more than 1000 images"));
    }
    let mut all = Contents::default();
    for one in list {
        let config = files.json(&one.config)?;
        let checked = read_config(&config, &printable::line(&one.config))?;
        let named = one.config.rsplit('/').next().unwrap_or_default();
        let named = Digest::from_hex(named.strip_suffix(".json").unwrap_or(named));
        if named.is_some_and(|digest| digest != Digest::of(&config)) {
            return Err(Error::invalid(format!(
                "{}: its digest is another",
                printable::line(&one.config)
            )));
        }
        if let Some(why) = foreign(&checked) {
            all.others
                .push(format!("{} {why}", printable::line(&one.config)));
            continue;
        }
        count_layers(&checked, one.layers.len())?;
        let layers = one
            .layers
            .iter()
            .map(|name| files.need(name))
            .collect::<Result<_, _>>()?;
        let names = one.repo_tags.iter();
        let names = names.map(|tag| tag.parse().or_invalid("manifest.json"));
        all.images.push(Found {
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
pub fn laid_out(files: &Files) -> Result<Contents, Error> {
    let index = Manifest::read(&files.json("index.json")?).or_invalid("index.json")?;
    let Manifest::Index { manifests } = index else {
        return Err(Error::invalid("index.json: is no index"));
    };
    if manifests.len() > IMAGES_MAX {
        return Err(Error::invalid("more than 1000 images"));
    }
    let mut all: BTreeMap<Digest, Found> = BTreeMap::new();
    let mut others = Vec::new();
    for descriptor in &manifests {
        let names = descriptor
            .annotations
            .get(FULL_NAME)
            .or(descriptor.annotations.get(NAME));
        // A mere tag does not say of what.
        let names = names.filter(|name| name.contains([':', '/']));
        let name: Option<Reference> = names.and_then(|name| name.parse().ok());
        if let Some(same) = all.get_mut(&descriptor.digest) {
            same.names.extend(name);
            continue;
        }
        match manifest(files, descriptor, 0)? {
            Ok(mut found) => {
                found.names.extend(name);
                all.insert(descriptor.digest, found);
            }
            Err(why) => others.push(format!("{} {why}", descriptor.digest)),
        }
    }
    Ok(Contents {
        images: all.into_values().collect(),
        others,
    })
}

/// The image of a manifest, or the one in an index that runs here; or why it is none.
fn manifest(
    files: &Files,
    descriptor: &Descriptor,
    depth: usize,
) -> Result<Result<Found, String>, Error> {
    if depth >= INDEXES_MAX {
        return Err(Error::invalid("indexes of indexes of indexes"));
    }
    if let Some(why) = descriptor.not_an_image() {
        return Ok(Err(why));
    }
    // Of other platforms often nothing is there but their names.
    if !files.has_blob(descriptor)? {
        return Ok(Err("is not in the archive".into()));
    }
    let what = descriptor.digest.to_string();
    let data = files.json_blob(descriptor)?;
    match Manifest::read(&data).or_invalid(&what)? {
        Manifest::Artifact(kind) => Ok(Err(artifact(&kind))),
        Manifest::Index { manifests } => {
            let mut none = "is an index without linux/amd64".to_owned();
            for candidate in candidates(manifests) {
                match manifest(files, &candidate, depth.saturating_add(1))? {
                    Ok(found) => return Ok(Ok(found)),
                    Err(why) => none = format!("is an index of what {why}"),
                }
            }
            Ok(Err(none))
        }
        Manifest::Image { config, layers } => {
            let data = files.json_blob(&config)?;
            let checked = read_config(&data, &what)?;
            if let Some(why) = foreign(&checked) {
                return Ok(Err(why));
            }
            count_layers(&checked, layers.len())?;
            let layers = layers
                .iter()
                .map(|layer| files.blob(layer))
                .collect::<Result<_, _>>()?;
            Ok(Ok(Found {
                config: data,
                checked,
                layers,
                names: Vec::new(),
                manifest: Some(descriptor.digest),
            }))
        }
    }
}

/// The manifests in an index that may run here: the one of its platform, for any
/// processor of that if there is a choice; or those that say nothing, as their images
/// will.
pub fn candidates(manifests: Vec<Descriptor>) -> Vec<Descriptor> {
    let mut silent = Vec::new();
    let mut ours: Option<Descriptor> = None;
    for descriptor in manifests {
        if descriptor.not_an_image().is_some() {
            continue;
        }
        let Some(platform) = &descriptor.platform else {
            silent.push(descriptor);
            continue;
        };
        let level = Platform::level(platform);
        let better = |best: &Descriptor| {
            let best = best.platform.as_ref();
            best.is_some_and(|best| level < best.level())
        };
        if ours.as_ref().is_none_or(better) {
            ours = Some(descriptor);
        }
    }
    silent.truncate(SILENT_MAX);
    ours.map_or(silent, |ours| vec![ours])
}

/// A configuration and a manifest must tell of equally many layers.
pub fn count_layers(config: &ImageConfig, count: usize) -> Result<(), Error> {
    let expected = config.rootfs.diff_ids.len();
    match expected == count && count <= LAYERS_MAX {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "there are {count} layers, and its configuration has {expected}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_runs_here_is_chosen() {
        let one = |text: &str| -> Descriptor {
            let digest = Digest::of(text.as_bytes());
            let more = match text.split('/').collect::<Vec<_>>().as_slice() {
                ["artifact"] => r#","artifactType":"application/spdx+json""#.to_owned(),
                [os, architecture] => {
                    format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"}}"#)
                }
                [os, architecture, variant] => format!(
                    r#","platform":{{"OS":"{os}","architecture":"{architecture}","variant":"{variant}"}}"#
                ),
                _ => String::new(),
            };
            json::from_slice(format!(r#"{{"digest":"{digest}","size":1{more}}}"#).as_bytes())
                .unwrap()
        };
        let chosen = |all: &[&str]| -> Vec<usize> {
            let found = candidates(all.iter().map(|text| one(text)).collect());
            let place =
                |found: &Descriptor| all.iter().position(|it| one(it).digest == found.digest);
            found.iter().filter_map(place).collect()
        };
        assert_eq!(
            chosen(&["linux/arm64", "unknown/unknown", "linux/amd64"]),
            [2]
        );
        assert_eq!(chosen(&["linux/arm64", "windows/amd64", "unsaid"]), [2]);
        assert_eq!(chosen(&["unsaid", "unknown/unknown", "artifact"]), [0]);
        assert_eq!(chosen(&["unsaid", "unsaid too"]), [0, 1]);
        assert_eq!(chosen(&["unsaid"]), [0]);
        assert_eq!(
            chosen(&["linux/amd64/v3", "linux/amd64/v2", "linux/amd64"]),
            [2]
        );
        assert_eq!(chosen(&["linux/amd64/v3", "linux/amd64/v1"]), [1]);
        assert_eq!(chosen(&["linux/arm64"]), [0; 0]);
        assert_eq!(chosen(&["artifact"]), [0; 0]);
        assert_eq!(chosen(&[]), [0; 0]);
    }
}
