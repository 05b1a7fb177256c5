//! The parts of OCI's and Docker's JSON that matter here.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::digest::Digest;

/// Docker takes no more either.
pub const LAYERS_MAX: usize = 127;
/// The largest JSON that is read.
pub const JSON_MAX: u64 = 8 << 20;

/// Docker writes `null` for what is empty.
fn or_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// An image's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// When it was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// `amd64`, …
    #[serde(deserialize_with = "or_empty")]
    pub architecture: String,
    /// `linux`, …
    #[serde(deserialize_with = "or_empty")]
    pub os: String,
    /// How it is run.
    #[serde(deserialize_with = "or_empty")]
    pub config: RunConfig,
    /// What it is made of.
    #[serde(deserialize_with = "or_empty")]
    pub rootfs: RootFs,
}

/// How an image is run, unless the user says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct RunConfig {
    /// `USER[:GROUP]`, names or numbers; empty for root.
    #[serde(
        deserialize_with = "or_empty",
        skip_serializing_if = "String::is_empty"
    )]
    pub user: String,
    /// The host's name; empty if the image says none.
    #[serde(
        deserialize_with = "or_empty",
        skip_serializing_if = "String::is_empty"
    )]
    pub hostname: String,
    /// `PORT/PROTOCOL`.
    #[serde(
        deserialize_with = "keys",
        serialize_with = "as_keys",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub exposed_ports: Vec<String>,
    /// `NAME=VALUE`.
    #[serde(deserialize_with = "or_empty", skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// What always runs.
    #[serde(deserialize_with = "words", skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Its arguments, or what runs.
    #[serde(deserialize_with = "words", skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Folders that outlive a container.
    #[serde(
        deserialize_with = "keys",
        serialize_with = "as_keys",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub volumes: Vec<String>,
    /// Where it runs; empty for `/`.
    #[serde(
        deserialize_with = "or_empty",
        skip_serializing_if = "String::is_empty"
    )]
    pub working_dir: String,
    /// What the image's makers say of it.
    #[serde(
        deserialize_with = "or_empty",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub labels: BTreeMap<String, String>,
    /// The signal that asks it to end; empty for SIGTERM.
    #[serde(
        deserialize_with = "or_empty",
        skip_serializing_if = "String::is_empty"
    )]
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

/// What an image is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RootFs {
    /// `layers`.
    #[serde(rename = "type", deserialize_with = "or_empty")]
    pub kind: String,
    /// The digests of the layers' uncompressed archives, lowest first.
    #[serde(deserialize_with = "or_empty")]
    pub diff_ids: Vec<Digest>,
}

/// What a manifest says of a blob.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Its name.
    pub digest: Digest,
    /// Its length.
    pub size: u64,
    /// In an index: what it runs on.
    #[serde(default)]
    pub platform: Option<Platform>,
    /// Among them: the name of an image in a folder or archive.
    #[serde(default, deserialize_with = "or_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// What an image runs on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Platform {
    /// `amd64`, …
    #[serde(default)]
    pub architecture: String,
    /// `linux`, …
    #[serde(default)]
    pub os: String,
}

impl Platform {
    /// True for x86-64 Linux.
    pub fn runs_here(&self) -> bool {
        self.architecture == "amd64" && self.os == "linux"
    }
}

/// An image's manifest, or an index of several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Manifest {
    /// One image.
    Image {
        /// Its configuration.
        config: Descriptor,
        /// Its layers, lowest first.
        #[serde(default)]
        layers: Vec<Descriptor>,
    },
    /// One for each platform.
    Index {
        /// Their manifests.
        manifests: Vec<Descriptor>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_nulls_and_words_are_read() {
        let text = r#"{"architecture":"amd64","os":"linux","config":{"Cmd":null,"Entrypoint":"/bin/x",
            "ExposedPorts":{"80/tcp":{}},"Volumes":null,"Env":["A=b"],"Labels":null,"User":"1:2","Unknown":3}}"#;
        let image: ImageConfig = serde_json::from_str(text).unwrap();
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
            serde_json::from_str(&image).unwrap(),
            Manifest::Image { layers, .. } if layers.len() == 1
        ));
        let index = format!(r#"{{"manifests":[{blob}]}}"#);
        assert!(matches!(
            serde_json::from_str(&index).unwrap(),
            Manifest::Index { .. }
        ));
        assert!(serde_json::from_str::<Manifest>(r#"{"fsLayers":[]}"#).is_err());
    }
}
