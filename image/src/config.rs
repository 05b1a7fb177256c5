//! The parts of OCI's and Docker's JSON that matter here.

use std::collections::BTreeMap;

use mayfly_text::printable;
use serde::{Deserialize, Deserializer, Serialize};

use super::digest::Digest;
use super::json;

/// Docker takes no more either.
pub const LAYERS_MAX: usize = 127;
/// The largest JSON that is read.
pub const JSON_MAX: u64 = 8 << 20;

/// An image's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// The time at which it was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// `amd64`, …
    pub architecture: String,
    /// `linux`, …
    pub os: String,
    /// The configuration of its containers.
    pub config: RunConfig,
    /// The layers that it is made of.
    pub rootfs: RootFs,
}

/// How an image is run, unless the user says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct RunConfig {
    /// `USER[:GROUP]`, names or numbers; empty for root.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// The host's name; empty if the image says none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hostname: String,
    /// `PORT/PROTOCOL`.
    #[serde(
        deserialize_with = "keys",
        serialize_with = "as_keys",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub exposed_ports: Vec<String>,
    /// `NAME=VALUE`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// The program that always runs, with its first arguments.
    #[serde(deserialize_with = "words", skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Its arguments, or what runs.
    #[serde(deserialize_with = "words", skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Directories that outlive a container.
    #[serde(
        deserialize_with = "keys",
        serialize_with = "as_keys",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub volumes: Vec<String>,
    /// The working directory; empty for `/`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// What the image's makers say of it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The signal that asks it to end; empty for SIGTERM.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
}

/// Old images write one word without a list.
fn words<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Words {
        Many(Vec<String>),
        One(String),
    }
    Ok(match Option::deserialize(deserializer)? {
        None => Vec::new(),
        Some(Words::Many(words)) => words,
        Some(Words::One(word)) => vec![word],
    })
}

fn keys<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let map: Option<BTreeMap<String, serde::de::IgnoredAny>> = Option::deserialize(deserializer)?;
    Ok(map.unwrap_or_default().into_keys().collect())
}

fn as_keys<S: serde::Serializer>(keys: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(keys.iter().map(|key| (key, BTreeMap::<u8, u8>::new())))
}

/// The layers that an image is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RootFs {
    /// `layers`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The digests of the layers' uncompressed archives, lowest first.
    pub diff_ids: Vec<Digest>,
}

/// A manifest's descriptor of a blob.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The media type.
    #[serde(default)]
    pub media_type: String,
    /// Its name.
    pub digest: Digest,
    /// Its length.
    pub size: u64,
    /// In an index: what it runs on.
    #[serde(default)]
    pub platform: Option<Platform>,
    /// In an index: what it is, if it is no image.
    #[serde(default)]
    artifact_type: String,
    /// Among them: the name of an image in a directory or archive.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// The platform that an image runs on.
#[derive(Clone, Debug, Deserialize)]
pub struct Platform {
    /// `amd64`, …
    #[serde(default)]
    pub architecture: String,
    /// `linux`, …
    #[serde(default)]
    pub os: String,
    /// What of the architecture it needs: `v3`, …; empty if any will do.
    #[serde(default)]
    variant: String,
}

impl Platform {
    /// True for x86-64 Linux.
    fn runs_here(&self) -> bool {
        self.architecture == "amd64" && self.os == "linux"
    }

    /// The lower, the more processors will do.
    pub fn level(&self) -> u32 {
        let digits = self.variant.strip_prefix('v');
        let level = digits.and_then(|digits| digits.parse().ok());
        level.unwrap_or(match self.variant.is_empty() {
            true => 0,
            false => u32::MAX,
        })
    }
}

/// What is a layer's archive. Signatures and the like have others.
const LAYER_TYPES: [&str; 2] = [
    "application/vnd.oci.image.layer.",
    "application/vnd.docker.image.rootfs.",
];
/// What is an image's configuration; old tools do not say.
const CONFIG_TYPES: [&str; 4] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
    "application/octet-stream",
    "",
];

impl Descriptor {
    /// Why this is no image for here, as far as an index tells.
    pub fn not_an_image(&self) -> Option<String> {
        if !self.artifact_type.is_empty() {
            return Some(artifact(&self.artifact_type));
        }
        let platform = self.platform.as_ref();
        let platform = platform.filter(|platform| !platform.runs_here())?;
        let platform = format!("is for {}/{}", platform.os, platform.architecture);
        Some(printable::line(&platform))
    }

    fn is_layer(&self) -> bool {
        let kind = self.media_type.as_str();
        let known = LAYER_TYPES.iter().any(|start| kind.starts_with(start));
        kind.is_empty() || (known && kind.contains("tar") && !kind.ends_with("+encrypted"))
    }
}

/// Says that something is an artifact of a type.
pub fn artifact(kind: &str) -> String {
    let kind = printable::line(kind);
    format!("is no image, but an artifact of type {kind}")
}

/// An image's manifest, an index of several, or a manifest of something else.
#[derive(Clone, Debug)]
pub enum Manifest {
    /// One image.
    Image {
        /// Its configuration.
        config: Descriptor,
        /// Its layers, lowest first.
        layers: Vec<Descriptor>,
    },
    /// One for each platform.
    Index {
        /// Their manifests.
        manifests: Vec<Descriptor>,
    },
    /// A signature, a list of parts, a chart: its type.
    Artifact(String),
}

/// The reason why a document is no manifest.
#[derive(Debug, thiserror::Error)]
pub enum NotAManifest {
    /// It is no JSON, or has something where something else should be.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// It names neither a configuration nor manifests, or both.
    #[error("a manifest in a format that is not known")]
    Format,
}

impl Manifest {
    /// Reads a document.
    pub fn read(text: &[u8]) -> Result<Self, NotAManifest> {
        #[derive(Deserialize)]
        #[serde(default, rename_all = "camelCase")]
        #[derive(Default)]
        struct Document {
            artifact_type: String,
            config: Option<Descriptor>,
            layers: Option<Vec<Descriptor>>,
            manifests: Option<Vec<Descriptor>>,
        }
        let document: Document = json::from_slice(text)?;
        if let Some(manifests) = document.manifests {
            // One that is both is one thing to some, and another to others.
            return match document.config.is_none() && document.layers.is_none() {
                true => Ok(Manifest::Index { manifests }),
                false => Err(NotAManifest::Format),
            };
        }
        let layers = document.layers.unwrap_or_default();
        let Some(config) = document.config else {
            return match document.artifact_type.is_empty() {
                true => Err(NotAManifest::Format),
                false => Ok(Manifest::Artifact(document.artifact_type)),
            };
        };
        let odd = if !document.artifact_type.is_empty() {
            Some(&document.artifact_type)
        } else if !CONFIG_TYPES.contains(&config.media_type.as_str()) {
            Some(&config.media_type)
        } else {
            let odd = layers.iter().find(|layer| !layer.is_layer());
            odd.map(|layer| &layer.media_type)
        };
        Ok(match odd {
            Some(kind) => Manifest::Artifact(kind.clone()),
            None => Manifest::Image { config, layers },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_nulls_and_words_are_read() {
        let text = r#"{"architecture":"amd64","os":"linux","config":{"Cmd":null,"Entrypoint":"/bin/x",
            "ExposedPorts":{"80/tcp":{}},"Volumes":null,"Env":["A=b"],"Labels":null,"User":"1:2","Unknown":3}}"#;
        let image: ImageConfig = json::from_slice(text.as_bytes()).unwrap();
        assert_eq!(image.config.entrypoint, ["/bin/x"]);
        assert_eq!(image.config.exposed_ports, ["80/tcp"]);
        assert!(image.config.cmd.is_empty() && image.rootfs.diff_ids.is_empty());
        let again: ImageConfig =
            serde_json::from_str(&serde_json::to_string(&image).unwrap()).unwrap();
        assert_eq!(again, image);
    }

    #[test]
    fn a_manifest_and_an_index_are_told_apart() {
        let blob = format!(r#"{{"digest":"{}","size":3}}"#, Digest::of(b"x"));
        let image = format!(r#"{{"schemaVersion":2,"config":{blob},"layers":[{blob}]}}"#);
        assert!(matches!(
            Manifest::read(image.as_bytes()).unwrap(),
            Manifest::Image { layers, .. } if layers.len() == 1
        ));
        let index = format!(r#"{{"manifests":[{blob}]}}"#);
        assert!(matches!(
            Manifest::read(index.as_bytes()).unwrap(),
            Manifest::Index { .. }
        ));
        assert!(Manifest::read(br#"{"fsLayers":[]}"#).is_err());
        let both = format!(r#"{{"config":{blob},"layers":[],"manifests":[]}}"#);
        assert!(Manifest::read(both.as_bytes()).is_err());
    }

    #[test]
    fn artifacts_are_told_from_images() {
        let read = |config: &str, layer: &str, more: &str| {
            let blob = |kind: &str| {
                let digest = Digest::of(b"x");
                format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":3}}"#)
            };
            let text = format!(
                r#"{{"config":{},"layers":[{}]{more}}}"#,
                blob(config),
                blob(layer)
            );
            match Manifest::read(text.as_bytes()).unwrap() {
                Manifest::Image { .. } => "image".to_owned(),
                Manifest::Artifact(kind) => kind,
                Manifest::Index { .. } => "index".to_owned(),
            }
        };
        let oci = "application/vnd.oci.image.config.v1+json";
        let tar = "application/vnd.oci.image.layer.v1.tar+zstd";
        for (config, layer) in [
            (oci, tar),
            ("", ""),
            (
                "application/vnd.docker.container.image.v1+json",
                "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            ),
            (
                oci,
                "application/vnd.oci.image.layer.nondistributable.v1.tar",
            ),
        ] {
            assert_eq!(read(config, layer, ""), "image", "{config} {layer}");
        }
        let signature = "application/vnd.dev.cosign.simplesigning.v1+json";
        assert_eq!(read(oci, signature, ""), signature);
        let encrypted = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted";
        assert_eq!(read(oci, encrypted, ""), encrypted);
        let chart = "application/vnd.cncf.helm.config.v1+json";
        assert_eq!(read(chart, tar, ""), chart);
        let more = r#","artifactType":"application/spdx+json""#;
        assert_eq!(read(oci, tar, more), "application/spdx+json");
    }
}
