//! Disks.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use mayfly_devices::virtio::block::{
    Block, Concat, Disk, ID_LEN, Image, ImageError, Prepare, Qcow2, SECTOR,
};

use super::pending::{PendingDevice, unfit};
use crate::failure::{Class, Failure};
use crate::link::{BlamePart, ImageLayout, Part, VmmFailure};
use crate::spec::BlockSpec;

/// A disk on an image's files.
pub fn make(
    name: &str,
    spec: &BlockSpec,
    layout: &ImageLayout,
    files: Vec<OwnedFd>,
    prepare: &Arc<dyn Prepare>,
) -> Result<PendingDevice, VmmFailure> {
    let part = || Part::Device(name.to_owned());
    let mut files = files.into_iter().map(File::from);
    let image = image(layout, !spec.read_only, &mut files);
    let Some((image, size)) = image.map_err(|failed| failed.blame(name))? else {
        return Err(unfit(name));
    };
    let mut id = [0; ID_LEN];
    for (target, source) in id.iter_mut().zip(spec.id.bytes()) {
        *target = source;
    }
    let disk = Disk {
        image,
        sectors: whole_sectors(size, part())?,
        read_only: spec.read_only,
        id,
        queues: spec.queues.into(),
        limits: spec.limits,
    };
    let device = Block::with_prepared(disk, prepare).or_host_of(part())?;
    let limits = device.limit_handle();
    Ok(PendingDevice::limited(device, limits))
}

/// An image that cannot be used.
#[derive(Debug)]
struct Unusable {
    /// It is not the disk's own, but what that is the difference to.
    backing: bool,
    error: ImageError,
}

impl<E: Into<ImageError>> From<E> for Unusable {
    fn from(error: E) -> Self {
        Unusable {
            backing: false,
            error: error.into(),
        }
    }
}

impl Unusable {
    fn blame(self, disk: &str) -> VmmFailure {
        let part = match self.backing {
            true => Part::Backing(disk.to_owned()),
            false => Part::Device(disk.to_owned()),
        };
        VmmFailure::of(&self.error, Class::Config, part)
    }
}

/// Takes as many files as a layout has: none if there are fewer. The size is the disk's, in
/// bytes.
fn image(
    layout: &ImageLayout,
    writable: bool,
    files: &mut impl Iterator<Item = File>,
) -> Result<Option<(Image, u64)>, Unusable> {
    match layout {
        ImageLayout::Raw(len) => Ok(files.next().map(|file| (Image::Raw(file), *len))),
        ImageLayout::Qcow2(backing) => {
            let Some(file) = files.next() else {
                return Ok(None);
            };
            let backing = match backing {
                None => None,
                // What is behind an image is only read.
                Some(layout) => match self::image(layout, false, files) {
                    Ok(Some((image, _))) => Some(image.into_backing()?),
                    Ok(None) => return Ok(None),
                    Err(Unusable { error, .. }) => {
                        let backing = true;
                        return Err(Unusable { backing, error });
                    }
                },
            };
            let image = Qcow2::open(file, writable, backing)?;
            let size = image.size();
            Ok(Some((Image::Qcow2(Box::new(image)), size)))
        }
        ImageLayout::Concat(lens) => {
            let mut parts = Concat::default();
            for len in lens {
                let Some(file) = files.next() else {
                    return Ok(None);
                };
                parts.push(file, *len)?;
            }
            let size = parts.size();
            Ok(Some((Image::Concat(parts), size)))
        }
    }
}

/// The supervisor has looked at all but what a qcow2 image says of itself.
fn whole_sectors(size: u64, part: Part) -> Result<u64, VmmFailure> {
    let refused = |message: String| VmmFailure {
        part: Some(part),
        ..Failure::config(message).into()
    };
    match (size / SECTOR, size % SECTOR) {
        (0, _) => Err(refused(format!(
            "is smaller than a sector of {SECTOR} bytes; make it larger with qemu-img resize"
        ))),
        (sectors, 0) => Ok(sectors),
        (_, rest) => Err(refused(format!(
            "has {rest} bytes behind its last whole sector of {SECTOR}, which a guest cannot \
             have; make it longer with qemu-img resize"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn an_image_has_the_files_of_its_layout() {
        let both = ImageLayout::Concat(vec![512, 1024]);
        let open = |layout: &ImageLayout, lens: &[u64]| {
            let mut files = lens.iter().map(|len| file(*len));
            image(layout, false, &mut files)
        };
        assert_eq!(open(&both, &[512, 1024]).unwrap().unwrap().1, 1536);
        assert!(open(&both, &[512]).unwrap().is_none());
        assert_eq!(
            open(&ImageLayout::Raw(512), &[512]).unwrap().unwrap().1,
            512
        );
        assert!(open(&ImageLayout::Raw(512), &[]).unwrap().is_none());
        let qcow2 = ImageLayout::Qcow2(Some(Box::new(ImageLayout::Raw(512))));
        // It is no qcow2 image.
        let failed = open(&qcow2, &[1024, 512]).unwrap_err();
        assert_eq!(
            failed.blame("disk0").part,
            Some(Part::Device("disk0".into()))
        );
        let chain = ImageLayout::Qcow2(Some(Box::new(ImageLayout::Qcow2(None))));
        let failed = open(&chain, &[1024, 512]).unwrap_err();
        assert_eq!(
            failed.blame("disk0").part,
            Some(Part::Backing("disk0".into()))
        );
        assert!(open(&qcow2, &[1024]).unwrap().is_none());
    }

    #[test]
    fn a_disk_has_whole_sectors() {
        let of = |size| whole_sectors(size, Part::Device("disk0".into()));
        assert_eq!(of(1024).unwrap(), 2);
        assert!(
            of(511)
                .unwrap_err()
                .message
                .contains("smaller than a sector")
        );
        assert!(
            of(1025)
                .unwrap_err()
                .message
                .starts_with("has 1 bytes behind")
        );
    }
}
