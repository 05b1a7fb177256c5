//! Reading what is to be copied.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Cursor, Read};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::entry::{Data, Entry, Kind, Source};
use super::path::{DEPTH_MAX, PATH_MAX, about};
use super::place::Place;
use super::xattrs;
use crate::agent::Bytes;

/// How many files with several names are remembered; further ones are copied once
/// for each name.
const LINKS_MAX: usize = 1 << 16;
/// File systems of the kernel's own (Linux' `linux/magic.h`): proc, sysfs, cgroup2,
/// devpts, mqueue. Their files have no end, or none that their size shows.
const KERNEL_S: [i64; 5] = [0x9fa0, 0x6265_6572, 0x6367_7270, 0x1cd1, 0x1980_0202];

/// A file or folder, and all that is in it. Symbolic links are not followed.
pub struct Walk {
    first: Option<(Entry, Found)>,
    /// Those that are being read, each in the one before.
    folders: Vec<Folder>,
    file: Option<Current>,
    /// The first names of files with several.
    links: HashMap<(u64, u64), Bytes>,
}

struct Folder {
    path: Bytes,
    entries: Dir,
}

/// The current file.
struct Current {
    content: Content,
    /// How much of it is still to be read.
    left: u64,
}

/// The content of a file.
enum Content {
    /// On a disk; up to which offset there is no hole, and where it is read.
    OnDisk { file: File, solid: u64, at: u64 },
    /// Of a file that does not say how long it is: it was read to know.
    Read(Cursor<Vec<u8>>),
}

/// The opened object of an entry.
enum Found {
    File(Content),
    Folder(OwnedFd),
    /// All else, by its numbers if it has other names.
    Other,
}

impl Walk {
    /// A walk of the file or directory at a place.
    pub fn new(place: &Place) -> io::Result<Self> {
        let name = CString::new(place.name.as_slice())?;
        let (entry, found, stat) = look(&place.folder, &name, Vec::new(), true)
            .map_err(|error| about(&place.name, error))?
            .ok_or_else(|| about(&place.name, io::Error::other("is a socket")))?;
        let mut walk = Walk {
            first: None,
            folders: Vec::new(),
            file: None,
            links: HashMap::new(),
        };
        let entry = walk.with_links(entry, &stat);
        walk.first = Some((entry, found));
        Ok(walk)
    }

    /// True if it is a folder's.
    pub fn is_folder(&self) -> bool {
        let first = self.first.as_ref();
        first.is_some_and(|(entry, _)| entry.kind == Kind::Folder)
    }

    /// A file that was met before is a link to its first name.
    fn with_links(&mut self, mut entry: Entry, stat: &Stat) -> Entry {
        let several = stat.st_nlink > 1 && entry.kind != Kind::Folder;
        let identity = (stat.st_dev, stat.st_ino);
        match self.links.get(&identity) {
            Some(first) if several => entry.kind = Kind::Link(first.clone()),
            None if several && self.links.len() < LINKS_MAX => {
                self.links.insert(identity, entry.path.clone());
            }
            _ => {}
        }
        entry
    }

    fn enter(&mut self, entry: &Entry, found: Found) -> io::Result<()> {
        match (found, &entry.kind) {
            (Found::File(content), &Kind::File(left)) => {
                self.file = Some(Current { content, left });
            }
            (Found::Folder(folder), _) => {
                if self.folders.len() > DEPTH_MAX {
                    return Err(io::Error::other("lies more than 256 folders deep"));
                }
                self.folders.push(Folder {
                    path: entry.path.clone(),
                    entries: Dir::new(folder)?,
                });
            }
            _ => {}
        }
        Ok(())
    }
}

impl Source for Walk {
    fn next(&mut self) -> io::Result<Option<Entry>> {
        self.file = None;
        if let Some((entry, found)) = self.first.take() {
            self.enter(&entry, found)?;
            return Ok(Some(entry));
        }
        while let Some(folder) = self.folders.last_mut() {
            let failed = |error: Errno| about(&folder.path, error);
            let Some(found) = folder.entries.next() else {
                self.folders.pop();
                continue;
            };
            let found = found.map_err(failed)?;
            let name = found.file_name();
            if [c".", c".."].contains(&name) {
                continue;
            }
            let mut path = folder.path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name.to_bytes());
            if path.len() > PATH_MAX {
                return Err(about(
                    &path,
                    io::Error::other("a path of more than 4095 bytes"),
                ));
            }
            let looked = folder.entries.fd().map_err(failed)?;
            let looked = match look(looked, name, path.clone(), false) {
                // Gone meanwhile, or a socket, which is of no use without its process.
                Ok(None) => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(about(&path, error)),
                Ok(Some(looked)) => looked,
            };
            let (entry, found, stat) = looked;
            let entry = self.with_links(entry, &stat);
            self.enter(&entry, found)
                .map_err(|error| about(&path, error))?;
            return Ok(Some(entry));
        }
        Ok(None)
    }
}

impl Read for Walk {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(Current { content, left }) = &mut self.file else {
            return Ok(0);
        };
        // What grows while it is read would have no end.
        let len = match content {
            Content::Read(content) => content.take(*left).read(buffer)?,
            Content::OnDisk { file, solid, at } => {
                let solid = solid.checked_sub(*at).filter(|&solid| solid > 0);
                let most = solid.unwrap_or(u64::MAX).min(*left);
                let len = file.take(most).read(buffer)?;
                *at += len as u64;
                len
            }
        };
        *left -= len as u64;
        Ok(len)
    }
}

impl Data for Walk {
    fn skip_hole(&mut self) -> io::Result<u64> {
        let Some(Current {
            content: Content::OnDisk { file, solid, at },
            left,
        }) = &mut self.file
        else {
            return Ok(0);
        };
        if *at < *solid || *left == 0 {
            return Ok(0);
        }
        let end = *at + *left;
        let data = match rustix::fs::seek(&*file, SeekFrom::Data(*at)) {
            Ok(data) => data.min(end),
            // There are none any more.
            Err(Errno::NXIO) => end,
            // Its file system knows no holes.
            Err(_) => *at,
        };
        *solid = match rustix::fs::seek(&*file, SeekFrom::Hole(data)) {
            Ok(hole) if hole > data => hole,
            _ => end,
        };
        rustix::fs::seek(&*file, SeekFrom::Start(data))?;
        let hole = data.saturating_sub(*at);
        (*at, *left) = (data, *left - hole);
        Ok(hole)
    }
}

/// How much is read of a file that does not say how long it is.
const UNTOLD_MAX: u64 = 16 << 20;
/// The unit of `st_blocks`.
const BLOCK: i64 = 512;

/// Opens a file's content, and tells its length: files of the kernel's own file systems
/// are as long as what they are read to have.
fn content(file: File, stat: &Stat) -> io::Result<(Content, u64, bool)> {
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let kernel_s = || rustix::fs::fstatfs(&file).is_ok_and(|it| KERNEL_S.contains(&it.f_type));
    if size == 0 || (stat.st_blocks == 0 && kernel_s()) {
        let mut content = Vec::new();
        (&file).take(UNTOLD_MAX + 1).read_to_end(&mut content)?;
        let len = content.len() as u64;
        if len > UNTOLD_MAX {
            return Err(io::Error::other(
                "does not say how long it is, and is longer than 16 MiB",
            ));
        }
        return Ok((Content::Read(Cursor::new(content)), len, false));
    }
    let sparse = stat.st_blocks.saturating_mul(BLOCK) < stat.st_size;
    let solid = if sparse { 0 } else { size };
    let at = 0;
    Ok((Content::OnDisk { file, solid, at }, size, sparse))
}

/// Looks at a name, and opens what is to be read; none for what cannot be copied.
fn look(
    folder: impl AsFd,
    name: &CStr,
    path: Bytes,
    outermost: bool,
) -> io::Result<Option<(Entry, Found, Stat)>> {
    const OPEN: OFlags = OFlags::RDONLY
        .union(OFlags::NOFOLLOW)
        .union(OFlags::CLOEXEC)
        // What was a file a moment ago may be what one waits for.
        .union(OFlags::NONBLOCK)
        .union(OFlags::NOCTTY);
    let mut stat = rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let (major, minor) = (
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev),
    );
    let mut found = Found::Other;
    let (mut attributes, mut sparse) = (xattrs::Xattrs::new(), false);
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let file = rustix::fs::openat(&folder, name, OPEN, Mode::empty())?;
            stat = rustix::fs::fstat(&file)?;
            if !FileType::from_raw_mode(stat.st_mode).is_file() {
                return Err(Errno::STALE.into());
            }
            attributes = xattrs::of(&file)?;
            let (content, size, holes) = content(file.into(), &stat)?;
            found = Found::File(content);
            sparse = holes;
            Kind::File(size)
        }
        FileType::Directory => {
            let opened =
                rustix::fs::openat(&folder, name, OPEN | OFlags::DIRECTORY, Mode::empty())?;
            stat = rustix::fs::fstat(&opened)?;
            attributes = xattrs::of(&opened)?;
            let system = rustix::fs::fstatfs(&opened)?.f_type;
            if outermost || !KERNEL_S.contains(&system) {
                found = Found::Folder(opened);
            }
            Kind::Folder
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(&folder, name, Vec::new())?;
            Kind::Symlink(target.into_bytes())
        }
        FileType::CharacterDevice => Kind::Char(major, minor),
        FileType::BlockDevice => Kind::Block(major, minor),
        FileType::Fifo => Kind::Fifo,
        _ => return Ok(None),
    };
    let entry = Entry {
        path,
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: stat.st_mtime,
        xattrs: attributes,
        sparse,
    };
    Ok(Some((entry, found, stat)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_end_is_not_read_for_ever() {
        let endless = File::open("/dev/zero").unwrap();
        let stat = rustix::fs::fstat(&endless).unwrap();
        let error = content(endless, &stat).err().unwrap().to_string();
        assert!(error.contains("longer than 16 MiB"), "{error}");
    }
}
