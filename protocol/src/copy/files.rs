//! Making what was copied.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, Uid, makedev,
};
use rustix::io::Errno;

use super::entry::{Data, Entry, Kind, Sink};
use super::keep::Keep;
use super::path::{about, names};
use super::place::Place;
use super::xattrs;
use crate::agent::Bytes;

/// Makes files below a place, and nowhere else: every name is looked up in a folder
/// that is open, alone, and no symbolic link is ever followed.
pub struct Files {
    place: Place,
    keep: Keep,
    /// The folders that the last entry is in, the outermost first.
    open: Vec<Folder>,
    begun: bool,
    left_out: u64,
}

struct Folder {
    name: Bytes,
    fd: OwnedFd,
    /// What it is to be when it is left, if it was made here: until then it can be
    /// written to.
    made: Option<Entry>,
}

impl Files {
    /// Makes the outermost entry at a place.
    pub fn new(place: Place, keep: Keep) -> Self {
        Files {
            place,
            keep,
            open: Vec::new(),
            begun: false,
            left_out: 0,
        }
    }

    /// How many entries were left out.
    pub fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Opens the folders in which an entry is; those that no entry told of are made.
    fn enter(&mut self, folders: &[&[u8]]) -> io::Result<()> {
        if self.open.is_empty() {
            return Err(io::Error::other("lies in what is no folder"));
        }
        let pairs = self.open.iter().skip(1).zip(folders);
        let same = pairs.take_while(|(open, name)| open.name == **name).count();
        self.leave(same + 1)?;
        for &name in folders.iter().skip(same) {
            let fd = match self.open_folder(name) {
                Err(Errno::NOENT) => {
                    const IMPLIED: Mode = Mode::from_raw_mode(0o755);
                    rustix::fs::mkdirat(self.folder(), name, IMPLIED)?;
                    self.open_folder(name)?
                }
                Err(Errno::LOOP | Errno::NOTDIR) => {
                    let name = String::from_utf8_lossy(name);
                    return Err(io::Error::other(format!("lies below {name}, no folder")));
                }
                fd => fd?,
            };
            self.open.push(Folder {
                name: name.to_vec(),
                fd,
                made: None,
            });
        }
        Ok(())
    }

    /// Leaves all open directories but the first `but`.
    fn leave(&mut self, but: usize) -> io::Result<()> {
        while self.open.len() > but {
            if let Some(Folder {
                fd,
                made: Some(entry),
                ..
            }) = self.open.pop()
            {
                let finished = self.finish_open(&fd, &entry);
                finished.map_err(|error| about(&entry.path, error))?;
            }
        }
        Ok(())
    }

    /// The folder in which the next name is.
    fn folder(&self) -> &OwnedFd {
        self.open
            .last()
            .map_or(&self.place.folder, |folder| &folder.fd)
    }

    fn open_folder(&self, name: &[u8]) -> Result<OwnedFd, Errno> {
        const HOW: OFlags = OFlags::RDONLY
            .union(OFlags::DIRECTORY)
            .union(OFlags::NOFOLLOW)
            .union(OFlags::CLOEXEC);
        rustix::fs::openat(self.folder(), name, HOW, Mode::empty())
    }

    /// Makes a folder. One that is there stays as it is, but for what comes into it.
    fn make_folder(&mut self, name: &[u8], entry: &Entry) -> io::Result<()> {
        let made = rustix::fs::mkdirat(self.folder(), name, Mode::RWXU);
        let fd = match (made, self.open_folder(name)) {
            (Ok(()) | Err(Errno::EXIST), Ok(fd)) => fd,
            (Err(Errno::EXIST), Err(Errno::LOOP | Errno::NOTDIR)) => {
                return Err(io::Error::other(
                    "is there and no folder, and a folder cannot take its place",
                ));
            }
            (Err(error), _) | (_, Err(error)) => return Err(error.into()),
        };
        self.open.push(Folder {
            name: name.to_vec(),
            fd,
            made: made.is_ok().then(|| entry.clone()),
        });
        Ok(())
    }

    /// Removes what has a name, so that another can have it.
    fn make_room(&self, name: &[u8]) -> io::Result<()> {
        match rustix::fs::unlinkat(self.folder(), name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR | Errno::PERM) if self.open_folder(name).is_ok() => Err(
                io::Error::other("is there and a folder, and what is none cannot take its place"),
            ),
            Err(error) => Err(error.into()),
        }
    }

    fn make_file(&self, name: &[u8], entry: &Entry, data: &mut dyn Data) -> io::Result<()> {
        const HOW: OFlags = OFlags::WRONLY
            .union(OFlags::CREATE)
            .union(OFlags::EXCL)
            .union(OFlags::NOFOLLOW)
            .union(OFlags::CLOEXEC);
        let file = rustix::fs::openat(self.folder(), name, HOW, Mode::RUSR | Mode::WUSR)?;
        let file = File::from(file);
        let filled = fill(&file, entry.sparse, data);
        let made = filled.and_then(|()| self.finish_open(&file, entry));
        if made.is_err() {
            // A part is not what was asked for.
            let _ = rustix::fs::unlinkat(self.folder(), name, AtFlags::empty());
        }
        made
    }

    /// Gives what is open its owner, its mode, its attributes and its time.
    fn finish_open(&self, fd: impl AsFd, entry: &Entry) -> io::Result<()> {
        // In this order: a new owner takes bits from the mode, and capabilities; a list of
        // owners has the mode in it.
        if self.keep.owners {
            let (uid, gid) = owner(entry)?;
            rustix::fs::fchown(&fd, Some(uid), Some(gid))?;
        }
        rustix::fs::fchmod(&fd, self.mode(entry))?;
        xattrs::set(&fd, &entry.xattrs, self.keep)?;
        Ok(rustix::fs::futimens(&fd, &times(entry))?)
    }

    /// The same for what cannot be opened.
    fn finish_named(&self, name: &[u8], entry: &Entry) -> io::Result<()> {
        const ITSELF: AtFlags = AtFlags::SYMLINK_NOFOLLOW;
        if self.keep.owners {
            let (uid, gid) = owner(entry)?;
            rustix::fs::chownat(self.folder(), name, Some(uid), Some(gid), ITSELF)?;
        }
        Ok(rustix::fs::utimensat(
            self.folder(),
            name,
            &times(entry),
            ITSELF,
        )?)
    }

    fn mode(&self, entry: &Entry) -> Mode {
        const ALL: u32 = 0o7777;
        const HARMLESS: u32 = 0o777;
        const STICKY: u32 = 0o1000;
        let mask = match entry.kind {
            _ if self.keep.special => ALL,
            Kind::Folder => HARMLESS | STICKY,
            _ => HARMLESS,
        };
        Mode::from_raw_mode(entry.mode & mask)
    }

    fn make_special(
        &mut self,
        name: &[u8],
        entry: &Entry,
        kind: FileType,
        (major, minor): (u32, u32),
    ) -> io::Result<()> {
        if !self.keep.special {
            self.left_out += 1;
            return Ok(());
        }
        self.make_room(name)?;
        let (mode, device) = (self.mode(entry), makedev(major, minor));
        rustix::fs::mknodat(self.folder(), name, kind, mode, device)?;
        // It was made less what this process's mask takes away. What has the name may
        // be another by now: only a link would lead elsewhere.
        let how = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(self.folder(), name, how, Mode::empty())?;
        if !FileType::from_raw_mode(rustix::fs::fstat(&made)?.st_mode).is_symlink() {
            let own = format!("/proc/self/fd/{}", made.as_raw_fd());
            rustix::fs::chmod(own, mode)?;
        }
        self.finish_named(name, entry)
    }

    /// Makes another name of what was made here: every folder on the way is opened
    /// by itself, like those of any entry.
    fn make_link(&self, name: &[u8], entry: &Entry, target: &[u8]) -> io::Result<()> {
        if target == entry.path {
            return Ok(());
        }
        let target = names(target)?;
        let (Some((last, folders)), Some(outermost)) = (target.split_last(), self.open.first())
        else {
            return Err(io::Error::other("a hard link to a folder"));
        };
        const HOW: OFlags = OFlags::PATH
            .union(OFlags::DIRECTORY)
            .union(OFlags::NOFOLLOW)
            .union(OFlags::CLOEXEC);
        let mut folder = outermost.fd.try_clone()?;
        for &name in folders {
            folder = rustix::fs::openat(&folder, name, HOW, Mode::empty())?;
        }
        self.make_room(name)?;
        let how = AtFlags::empty();
        Ok(rustix::fs::linkat(
            &folder,
            *last,
            self.folder(),
            name,
            how,
        )?)
    }

    fn make(&mut self, entry: &Entry, data: &mut dyn Data) -> io::Result<()> {
        let names = names(&entry.path)?;
        let own;
        let name = match names.split_last() {
            Some((&name, folders)) => {
                self.enter(folders)?;
                name
            }
            // Again: archives of others may have it somewhere.
            None if self.begun && entry.kind == Kind::Folder && !self.open.is_empty() => {
                return Ok(());
            }
            None if self.begun => return Err(io::Error::other("comes twice")),
            None => {
                own = self.place.name.clone();
                own.as_slice()
            }
        };
        self.begun = true;
        match &entry.kind {
            Kind::Folder => self.make_folder(name, entry),
            Kind::File(_) => {
                self.make_room(name)?;
                self.make_file(name, entry, data)
            }
            Kind::Symlink(target) => {
                self.make_room(name)?;
                rustix::fs::symlinkat(target.as_slice(), self.folder(), name)?;
                self.finish_named(name, entry)
            }
            Kind::Link(target) => self.make_link(name, entry, target),
            &Kind::Char(major, minor) => {
                self.make_special(name, entry, FileType::CharacterDevice, (major, minor))
            }
            &Kind::Block(major, minor) => {
                self.make_special(name, entry, FileType::BlockDevice, (major, minor))
            }
            Kind::Fifo => self.make_special(name, entry, FileType::Fifo, (0, 0)),
        }
    }
}

impl Sink for Files {
    fn put(&mut self, entry: &Entry, data: &mut dyn Data) -> io::Result<()> {
        self.make(entry, data)
            .map_err(|error| match entry.path.is_empty() {
                true => about(&self.place.name, error),
                false => about(&entry.path, error),
            })
    }

    fn finish(&mut self) -> io::Result<()> {
        self.leave(0)
    }
}

/// Writes a file's data, and leaves holes where it has them.
fn fill(mut file: &File, sparse: bool, data: &mut dyn Data) -> io::Result<()> {
    const PIECE: usize = 64 << 10;
    let mut buffer = vec![0; PIECE];
    let (mut at, mut written) = (0_u64, 0_u64);
    loop {
        let hole = data.skip_hole()?;
        let len = match hole {
            0 => match data.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read?,
            },
            _ => 0,
        };
        let piece = buffer.get(..len).unwrap_or_default();
        let next = at
            .checked_add(hole)
            .and_then(|at| at.checked_add(len as u64));
        let next = next.ok_or(io::ErrorKind::FileTooLarge)?;
        if next == at {
            break;
        }
        if hole == 0 && !(sparse && piece.iter().all(|&byte| byte == 0)) {
            if written != at {
                file.seek(SeekFrom::Start(at))?;
            }
            file.write_all(piece)?;
            written = next;
        }
        at = next;
    }
    match written == at {
        true => Ok(()),
        false => file.set_len(at),
    }
}

fn owner(entry: &Entry) -> io::Result<(Uid, Gid)> {
    // Which Linux takes for none.
    if entry.uid == u32::MAX || entry.gid == u32::MAX {
        return Err(Errno::INVAL.into());
    }
    Ok((Uid::from_raw(entry.uid), Gid::from_raw(entry.gid)))
}

fn times(entry: &Entry) -> Timestamps {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_NOW,
    };
    let changed = Timespec {
        tv_sec: entry.mtime,
        tv_nsec: 0,
    };
    Timestamps {
        last_access: now,
        last_modification: changed,
    }
}
