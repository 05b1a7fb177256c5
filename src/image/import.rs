//! An image out of a root file system.

use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::config::{ImageConfig, RootFs, RunConfig};
use super::progress::Progress;
use super::reference::Reference;
use super::section::Section;
use super::store::{Image, Store};
use super::tarball::{Kind, Meta, Writer};
use crate::failure::{Failure, OrFail};

impl Store {
    /// Makes an image of a root file system: an archive (plain or compressed), or
    /// a folder. Without a name it goes with the next [`Store::prune`].
    pub fn import(
        &self,
        path: &Path,
        name: Option<&Reference>,
        config: RunConfig,
        progress: &dyn Progress,
    ) -> Result<Image, Failure> {
        let what = path.display().to_string();
        let file = File::open(path).or_config(&what)?;
        let metadata = file.metadata().or_config(&what)?;
        let work;
        let source = if metadata.is_dir() {
            work = self.work()?;
            let archive = work.path().join("root.tar");
            let task = progress.begin(&format!("reading {what}"), None);
            let mut out = Writer::new(BufWriter::new(
                File::create_new(&archive).or_host(self.failed())?,
            ));
            pack(path, &mut out, &|bytes| task.advance(bytes))?;
            out.finish().or_host(self.failed())?;
            Section::whole(File::open(&archive).or_host(self.failed())?)
        } else if metadata.is_file() {
            Section::whole(file)
        } else {
            return Err(Failure::config(format!(
                "{what}: neither a file nor a folder"
            )));
        };
        let source = source.or_config(&what)?;
        if source.is_empty() {
            return Err(Failure::config(format!("{what}: is empty")));
        }
        let layer = self.add_layer(&source, None, &[], &what, progress)?;
        let config = ImageConfig {
            created: None,
            architecture: "amd64".into(),
            os: "linux".into(),
            config,
            rootfs: RootFs {
                kind: "layers".into(),
                diff_ids: vec![layer.record.diff_id],
            },
        };
        let config = serde_json::to_vec(&config).or_internal("configuration")?;
        self.add_image(
            &config,
            &[layer],
            name.map_or(&[], std::slice::from_ref),
            None,
        )
    }
}

/// Writes a folder's files into an archive. Links are not followed.
fn pack<W: io::Write>(
    root: &Path,
    out: &mut Writer<W>,
    advance: &dyn Fn(u64),
) -> Result<(), Failure> {
    let mut seen = std::collections::BTreeMap::new();
    // Folders that wait: paths below the root.
    let mut waiting = vec![std::path::PathBuf::new()];
    while let Some(folder) = waiting.pop() {
        let full = root.join(&folder);
        let what = || full.display();
        let metadata = fs::symlink_metadata(&full).or_config(what())?;
        let meta = meta(&full, &metadata).or_config(what())?;
        let mut nothing = io::empty();
        let name = if folder.as_os_str().is_empty() {
            Path::new(".")
        } else {
            &folder
        };
        out.entry(bytes(name), &Kind::Folder, &meta, 0, &mut nothing)
            .or_host("image store")?;
        let mut names: Vec<_> = fs::read_dir(&full)
            .and_then(|entries| {
                entries
                    .map(|entry| Ok(entry?.file_name()))
                    .collect::<io::Result<_>>()
            })
            .or_config(what())?;
        names.sort();
        for name in names {
            let path = folder.join(&name);
            let full = root.join(&path);
            let metadata = fs::symlink_metadata(&full).or_config(full.display())?;
            if metadata.is_dir() {
                waiting.push(path);
                continue;
            }
            let identity = (metadata.dev(), metadata.ino());
            let again = seen.get(&identity).cloned();
            if metadata.nlink() > 1 && again.is_none() {
                seen.insert(identity, bytes(&path).to_vec());
            }
            advance(pack_file(&full, bytes(&path), &metadata, again, out)?);
        }
    }
    Ok(())
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

/// Writes what is no folder; tells how many bytes it has.
fn pack_file<W: io::Write>(
    full: &Path,
    name: &[u8],
    metadata: &Metadata,
    again: Option<Vec<u8>>,
    out: &mut Writer<W>,
) -> Result<u64, Failure> {
    let what = || full.display();
    let kind = metadata.file_type();
    let device = metadata.rdev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    let mut size = 0;
    let mut data: Box<dyn Read> = Box::new(io::empty());
    let kind = if let Some(first) = again {
        Kind::Link(first)
    } else if kind.is_file() {
        // Nothing may have taken its place that one waits for.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(full)
            .or_config(what())?;
        size = metadata.len();
        data = Box::new(file);
        Kind::File
    } else if kind.is_symlink() {
        let target = fs::read_link(full).or_config(what())?;
        Kind::Symlink(bytes(&target).to_vec())
    } else if kind.is_char_device() {
        Kind::Char(major, minor)
    } else if kind.is_block_device() {
        Kind::Block(major, minor)
    } else if kind.is_fifo() {
        Kind::Fifo
    } else {
        return Ok(0); // a socket: of no use without its process
    };
    let meta = meta(full, metadata).or_config(what())?;
    out.entry(name, &kind, &meta, size, &mut data)
        .or_host(what())?;
    Ok(size)
}

fn meta(path: &Path, metadata: &Metadata) -> io::Result<Meta> {
    let mtime = metadata.mtime().clamp(0, u32::MAX.into());
    Ok(Meta {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: u32::try_from(mtime).unwrap_or_default(),
        xattrs: xattrs::of(path)?,
    })
}

/// Extended attributes, which the standard library does not know.
mod xattrs {
    use super::*;
    use rustix::fs::{lgetxattr, llistxattr};
    use rustix::io::Errno;
    use std::collections::BTreeMap;

    /// Linux' own limit of a list, and of a value.
    const MAX: usize = 64 << 10;

    /// Those of a file, or of a link itself.
    pub fn of(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
        let mut list = Vec::with_capacity(MAX);
        match llistxattr(path, rustix::buffer::spare_capacity(&mut list)) {
            Ok(_) => {}
            Err(Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
            Err(error) => return Err(error.into()),
        }
        let mut found = BTreeMap::new();
        for name in list
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
        {
            let mut value = Vec::with_capacity(MAX);
            if lgetxattr(path, name, rustix::buffer::spare_capacity(&mut value)).is_ok() {
                found.insert(name.to_vec(), value);
            }
        }
        Ok(found)
    }
}
