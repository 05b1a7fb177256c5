//! An image out of a root file system.

use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::config::{ImageConfig, RootFs, RunConfig};
use super::limits::Limits;
use super::progress::Progress;
use super::reference::Reference;
use super::section::Section;
use super::source::Source;
use super::store::{Image, Store};
use super::tarball::{HOLE_MIN, Kind, Meta, PIECES_MAX, Writer};
use crate::error::{Context, Error};

impl Store {
    /// Makes an image of a root file system: an archive (plain or compressed), or
    /// a directory. Without a name it goes with the next [`Store::prune`].
    pub fn import(
        &self,
        path: &Path,
        name: Option<&Reference>,
        config: RunConfig,
        progress: &dyn Progress,
    ) -> Result<Image, Error> {
        let what = super::source::shown(path);
        let source = match self.source(path, progress)? {
            Source::Archive(archive) => archive,
            Source::Directory => self.pack(path, progress)?,
        };
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

impl Store {
    /// Makes an archive of a directory.
    fn pack(&self, path: &Path, progress: &dyn Progress) -> Result<Section, Error> {
        let work = self.work()?;
        let archive = tempfile::tempfile_in(work.path()).or_host(self.failed())?;
        let task = progress.begin(&format!("reading {}", path.display()), None);
        let mut out = Writer::new(BufWriter::new(archive));
        pack(path, &mut out, &self.limits, &|bytes| task.advance(bytes))?;
        let archive = out.finish().or_host(self.failed())?.into_inner();
        let archive = archive.map_err(io::IntoInnerError::into_error);
        archive.and_then(Section::whole).or_host(self.failed())
    }
}

/// Writes a directory's files into an archive. Links are not followed.
fn pack<W: io::Write>(
    root: &Path,
    out: &mut Writer<W>,
    limits: &Limits,
    advance: &dyn Fn(u64),
) -> Result<(), Error> {
    let mut total = 0_u64;
    let mut seen = std::collections::BTreeMap::new();
    // Directories that wait: paths below the root.
    let mut waiting = vec![std::path::PathBuf::new()];
    while let Some(directory) = waiting.pop() {
        let full = root.join(&directory);
        let what = || full.display();
        let metadata = fs::symlink_metadata(&full).or_invalid(what())?;
        let meta = meta(&full, &metadata).or_invalid(what())?;
        let mut nothing = io::empty();
        let name = if directory.as_os_str().is_empty() {
            Path::new(".")
        } else {
            &directory
        };
        out.entry(bytes(name), &Kind::Directory, &meta, 0, &mut nothing)
            .or_host("image store")?;
        // What the host's kernel shows there is none of the directory's files.
        if is_kernels(&full).or_invalid(what())? && !directory.as_os_str().is_empty() {
            continue;
        }
        let mut names: Vec<_> = fs::read_dir(&full)
            .and_then(|entries| {
                entries
                    .map(|entry| Ok(entry?.file_name()))
                    .collect::<io::Result<_>>()
            })
            .or_invalid(what())?;
        names.sort();
        for name in names {
            let path = directory.join(&name);
            let full = root.join(&path);
            let metadata = fs::symlink_metadata(&full).or_invalid(full.display())?;
            if metadata.is_dir() {
                waiting.push(path);
                continue;
            }
            if metadata.is_file() {
                total = total.saturating_add(metadata.len());
                if total > limits.size() {
                    return Err(Error::invalid(format!(
                        "{}: with this file there is {}",
                        full.display(),
                        limits.too_large()
                    )));
                }
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

/// True for a directory of a file system that has the kernel's state: its files have lengths
/// that mean nothing, and what they hold is the host's.
fn is_kernels(directory: &Path) -> io::Result<bool> {
    /// proc, sysfs, cgroup2, securityfs, debugfs, tracefs
    const MAGIC: [i64; 6] = [
        0x9fa0,
        0x6265_6572,
        0x6367_7270,
        0x7363_6673,
        0x6462_6720,
        0x7472_6163,
    ];
    Ok(MAGIC.contains(&rustix::fs::statfs(directory)?.f_type))
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

/// Writes what is no directory; tells how many bytes it has.
fn pack_file<W: io::Write>(
    full: &Path,
    name: &[u8],
    metadata: &Metadata,
    again: Option<Vec<u8>>,
    out: &mut Writer<W>,
) -> Result<u64, Error> {
    let what = || full.display();
    let kind = metadata.file_type();
    let device = metadata.rdev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    let meta = || meta(full, metadata).or_invalid(what());
    let kind = if let Some(first) = again {
        Kind::Link(first)
    } else if kind.is_file() {
        // Nothing may have taken its place that one waits for.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(full)
            .or_invalid(what())?;
        let size = metadata.len();
        let pieces = pieces(&file, size).or_invalid(what())?;
        let mut data = Pieces {
            file: &file,
            left: &pieces,
            position: 0,
        };
        match pieces.as_slice() {
            [(0, len)] if *len == size => out.entry(name, &Kind::File, &meta()?, size, &mut data),
            pieces => out.file_with_holes(name, &meta()?, size, pieces, &mut data),
        }
        .or_host(what())?;
        return Ok(size);
    } else if kind.is_symlink() {
        let target = fs::read_link(full).or_invalid(what())?;
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
    out.entry(name, &kind, &meta()?, 0, &mut io::empty())
        .or_host(what())?;
    Ok(0)
}

/// Where a file has data: `(offset, length)`, in order.
fn pieces(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    let mut end = 0;
    while end < size {
        let start = match seek(file, SeekFrom::Data(end)) {
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            // A file system that knows no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => end,
            other => other?,
        };
        let hole = match seek(file, SeekFrom::Hole(start)) {
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NXIO) => size,
            other => other?,
        };
        let before = end;
        let start = start.max(end).min(size);
        end = match pieces.len() < PIECES_MAX {
            true => hole.clamp(start, size),
            false => size,
        };
        match pieces.last_mut() {
            Some((offset, len)) if start.saturating_sub(*offset + *len) < HOLE_MIN => {
                *len = end.saturating_sub(*offset);
            }
            _ if end > start => pieces.push((start, end.saturating_sub(start))),
            _ => {}
        }
        if end <= before {
            // It changes while it is read.
            break;
        }
    }
    match pieces.as_slice() {
        [] if size == 0 => Ok(vec![(0, 0)]),
        _ => Ok(pieces),
    }
}

/// Reads what a file has in some places.
struct Pieces<'a> {
    file: &'a File,
    left: &'a [(u64, u64)],
    /// The bytes of the first that are read.
    position: u64,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(((offset, len), rest)) = self.left.split_first() {
            let left = len.saturating_sub(self.position);
            if left > 0 {
                let most = buffer
                    .len()
                    .min(usize::try_from(left).unwrap_or(usize::MAX));
                let buffer = buffer.get_mut(..most).unwrap_or_default();
                let at = offset.saturating_add(self.position);
                let count = self.file.read_at(buffer, at)?;
                self.position = self.position.saturating_add(count as u64);
                return Ok(count);
            }
            self.left = rest;
            self.position = 0;
        }
        Ok(0)
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tarball::Entries;
    use std::io::Write;

    /// A file of these pieces, of a length.
    fn file(pieces: &[(u64, &[u8])], size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (offset, data) in pieces {
            file.write_all_at(data, *offset).unwrap();
        }
        file
    }

    #[test]
    fn holes_of_files_stay_holes() {
        let directory = tempfile::tempdir().unwrap();
        let size = 40 << 30;
        let mut sparse = File::create(directory.path().join("sparse")).unwrap();
        sparse.set_len(size).unwrap();
        sparse.write_all_at(b"in the middle", 20 << 30).unwrap();
        sparse.write_all(b"start").unwrap();
        let path = directory.path().join("nothing");
        File::create(path).unwrap().set_len(1 << 30).unwrap();
        fs::write(directory.path().join("dense"), "dense").unwrap();
        fs::write(directory.path().join("empty"), "").unwrap();

        let mut out = Writer::new(Vec::new());
        pack(directory.path(), &mut out, &Limits::default(), &|_| {}).unwrap();
        let archive = out.finish().unwrap();
        assert!(archive.len() < 1 << 20, "{}", archive.len());
        let mut entries = Entries::new(archive.as_slice());
        let mut found = Vec::new();
        while let Some(entry) = entries.next_entry().unwrap() {
            if entry.path == b"sparse" {
                let mut start = [0; 8];
                entries.read_exact(&mut start).unwrap();
                assert_eq!(&start, b"start\0\0\0");
            }
            found.push((String::from_utf8(entry.path).unwrap(), entry.size));
        }
        let expected = [
            (".", 0),
            ("dense", 5),
            ("empty", 0),
            ("nothing", 1 << 30),
            ("sparse", size),
        ];
        assert_eq!(found, expected.map(|(name, size)| (name.to_owned(), size)));
        // What is beyond the limit is refused before anything of it is written.
        let mut out = Writer::new(Vec::new());
        let limits = Limits::default().with_size(size);
        let refused = pack(directory.path(), &mut out, &limits, &|_| {}).unwrap_err();
        let text = refused.to_string();
        assert!(
            text.contains("sparse: ") && text.contains("more than 40 GiB"),
            "{text}"
        );
    }

    #[test]
    fn pieces_of_a_file_are_where_its_data_are() {
        let mib = 1 << 20;
        let all = file(
            &[(0, &[1; 4096]), (mib, &[1; 8192]), (3 * mib, b"end")],
            3 * mib + 3,
        );
        let found = pieces(&all, 3 * mib + 3).unwrap();
        assert_eq!(found.len(), 3, "{found:?}");
        let mut read = Vec::new();
        let mut reader = Pieces {
            file: &all,
            left: &found,
            position: 0,
        };
        reader.read_to_end(&mut read).unwrap();
        let len: u64 = found.iter().map(|(_, len)| len).sum();
        assert_eq!(read.len() as u64, len);
        assert!(read.ends_with(b"end") && read.starts_with(&[1; 4096]));
        // A hole that is too small to be worth it, and a file that is all hole.
        let small = file(&[(0, &[1; 4096]), (8192, &[1; 4096])], 12288);
        assert_eq!(pieces(&small, 12288).unwrap(), [(0, 12288)]);
        assert_eq!(pieces(&file(&[], mib), mib).unwrap(), []);
        assert_eq!(pieces(&file(&[], 0), 0).unwrap(), [(0, 0)]);
    }
}
