//! Images, in the format that their owners say they have.

use std::fs::File;
use std::io;

use super::concat::Concat;
use super::qcow2::{Backing, Qcow2};

/// An opened disk image, in the format that its owner says it has.
#[derive(Debug)]
pub enum Image {
    /// The disk's bytes, whatever they are; or a host's block device.
    Raw(File),
    /// QEMU's format.
    Qcow2(Box<Qcow2>),
    /// Files one after the other.
    Concat(Concat),
}

impl Image {
    /// The image as what another one is the difference to.
    pub fn into_backing(self) -> io::Result<Backing> {
        match self {
            Image::Raw(file) => Backing::raw(file),
            Image::Qcow2(image) => Ok((*image).into()),
            Image::Concat(_) => Err(io::Error::other("a backing image is one file")),
        }
    }
}
