//! What is found in an archive of images.

use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::reference::Reference;
use crate::section::Section;

/// An image that was found in the files.
pub struct Found {
    /// Its configuration, as its digest is made of it.
    pub config: Vec<u8>,
    /// The same, read.
    pub checked: ImageConfig,
    /// The archives of its layers, lowest first.
    pub layers: Vec<Section>,
    /// Its names.
    pub names: Vec<Reference>,
    /// The digest of its manifest.
    pub manifest: Option<Digest>,
}

/// The images and other entries that an archive's files have.
#[derive(Default)]
pub struct Contents {
    /// The images.
    pub images: Vec<Found>,
    /// What is there and no image for here, and why not.
    pub others: Vec<String>,
}
