//! `mayfly cp`: files between the host and a VM that runs.
//!
//! The guest may be hostile. What it sends is checked entry by entry, made below the
//! place that the user named and nowhere else, and what it calls its things is never
//! asked: a copy of `VM:/etc/hosts` is a file of the name `hosts`, or nothing.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use mayfly_image::normalised;
use mayfly_image::tarball::{self, Entries, Meta, Writer};
use mayfly_protocol::agent::{HostMessage, Unpack};
use mayfly_protocol::copy::{
    Data, Entry, Files, Keep, Kind, Place, Sink, Source, Walk, copy, xattrs,
};
use mayfly_text::printable;

use super::agent::Agent;
use super::record::{self, State};
use crate::arguments::split_at;
use crate::failure::{Class, Failure, OrFail};

/// What to copy, in the user's words.
#[derive(Clone, Debug, Default)]
pub struct CopyOptions {
    /// Keep owners and groups.
    pub archive: bool,
    /// Follow a symbolic link that is named itself.
    pub follow: bool,
    /// `VM:PATH`, a path of the host, or `-` for a tar archive.
    pub from: OsString,
    /// The same.
    pub to: OsString,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side<'a> {
    Tar,
    Host(&'a Path),
    Guest(&'a str, &'a [u8]),
}

/// A path with a colon in it is a VM's, unless it begins with a slash or a dot. VMs have
/// names of ASCII: what is none is a path.
fn side(text: &OsStr) -> Side<'_> {
    let (vm, path) = split_at(text, b':');
    match (std::str::from_utf8(vm), path) {
        _ if text == "-" => Side::Tar,
        (Ok(vm), Some(path)) if !vm.starts_with(['/', '.']) => Side::Guest(vm, path),
        _ => Side::Host(Path::new(text)),
    }
}

/// What a source is called where it goes; nothing, if only what is in it goes there.
fn name_of(path: &[u8]) -> &[u8] {
    let end = path
        .iter()
        .rposition(|&byte| byte != b'/')
        .map_or(0, |last| last + 1);
    let name = path.get(..end).unwrap_or_default();
    let name = name.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    match name {
        // The folder itself.
        _ if path.ends_with(b"/.") || path == b"." => b"",
        b".." => b"",
        name => name,
    }
}

/// Copies.
pub fn cp(options: &CopyOptions) -> Result<(), Failure> {
    match (side(&options.from), side(&options.to)) {
        (Side::Guest(..), Side::Guest(..)) => Err(Failure::config(
            "from one VM to another nothing can be copied; copy it to the host first",
        )),
        (Side::Guest(vm, path), to) => fetch(options, vm, path, &to),
        (from, Side::Guest(vm, path)) => bring(options, &from, vm, path),
        _ => Err(Failure::config(
            "one of the two must be in a VM: write VM:PATH",
        )),
    }
}

fn connect(vm: &str) -> Result<Agent, Failure> {
    let place = record::VmDir::find(vm)?;
    if place.state() == State::Ended {
        return Err(Failure::config(format!(
            "{vm}: has ended, and its files with it; a volume outlives its VM"
        )));
    }
    place.need_unpaused()?;
    Agent::connect(&place.vsock()).or_host(vm)
}

/// Errors may have a guest's words in them.
fn failed(vm: &str) -> impl Fn(io::Error) -> Failure + '_ {
    move |error| Failure::host(format!("{vm}: {}", printable::line(&error.to_string())))
}

/// From a guest.
fn fetch(options: &CopyOptions, vm: &str, path: &[u8], to: &Side) -> Result<(), Failure> {
    if *to == Side::Tar && io::stdout().is_terminal() {
        return Err(Failure::config(
            "an archive is not for a terminal; write its output to a file, or to tar",
        ));
    }
    // In an archive they are zeroes, however many a guest says that there are.
    let holes = *to != Side::Tar;
    let mut agent = connect(vm)?;
    agent
        .ask(&HostMessage::Pack {
            path: path.into(),
            follow: options.follow,
            holes,
        })
        .or_host(vm)?;
    let mut source = agent.entries(holes).map_err(failed(vm))?;
    let name = name_of(path);
    let Side::Host(target) = *to else {
        let mut sink = ToTar::new(name, BufWriter::new(io::stdout()));
        copy(&mut source, &mut sink).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::new(Class::ReaderGone, ""),
            _ => failed(vm)(error),
        })?;
        tell_left_out(vm, sink.left_out);
        return Ok(());
    };
    let first = source.next().map_err(failed(vm))?;
    let first = first.ok_or_else(|| Failure::host(format!("{vm}: nothing came")))?;
    let place = Place::of_target(&Unpack {
        path: target.as_os_str().as_bytes().to_vec(),
        name: name.into(),
        folder: first.kind == Kind::Folder,
        must_exist: false,
    });
    let keep = Keep {
        owners: options.archive && rustix::process::geteuid().is_root(),
        special: false,
    };
    let mut files = Files::new(place.or_config("cp")?, keep);
    files
        .put(&first, &mut source)
        .and_then(|()| copy(&mut source, &mut files))
        .map_err(failed(vm))?;
    tell_left_out(vm, files.left_out());
    Ok(())
}

/// Tells of what stays with the guest.
fn tell_left_out(vm: &str, count: u64) {
    if count > 0 {
        let _ = writeln!(
            io::stderr(),
            "mayfly: {vm}: {count} devices and named pipes were left out"
        );
    }
}

/// Into a guest.
fn bring(options: &CopyOptions, from: &Side, vm: &str, path: &[u8]) -> Result<(), Failure> {
    let wish = Unpack {
        path: path.into(),
        ..Unpack::default()
    };
    let owned = |source| Owned {
        source,
        keep: options.archive,
    };
    match *from {
        Side::Host(source) => {
            let text = source.as_os_str().as_bytes();
            let place = Place::of_source(text, options.follow).or_config("cp")?;
            let walk = Walk::new(&place).or_config("cp")?;
            let wish = Unpack {
                name: name_of(text).into(),
                folder: walk.is_folder(),
                ..wish
            };
            connect(vm)?.bring(wish, &mut owned(Box::new(walk)))
        }
        _ => {
            let wish = Unpack {
                folder: true,
                must_exist: true,
                ..wish
            };
            let source = FromTar::new(io::stdin().lock()).or_host("standard input")?;
            connect(vm)?.bring(wish, &mut owned(Box::new(source)))
        }
    }
    .map_err(failed(vm))
}

/// Entries whose owners are root, unless they are to be kept.
struct Owned {
    source: Box<dyn Source>,
    keep: bool,
}

impl Source for Owned {
    fn next(&mut self) -> io::Result<Option<Entry>> {
        let entry = self.source.next()?;
        Ok(entry.map(|entry| match self.keep {
            true => entry,
            false => Entry {
                uid: 0,
                gid: 0,
                // Lists of owners go where owners go.
                xattrs: xattrs::without_owners(entry.xattrs),
                ..entry
            },
        }))
    }
}

impl Data for Owned {
    fn skip_hole(&mut self) -> io::Result<u64> {
        self.source.skip_hole()
    }
}

impl Read for Owned {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.source.read(buffer)
    }
}

/// A file up to this length is read before its length is written. A longer one that gets
/// shorter meanwhile ends the copy: zeroes in its place would be as many as a guest says.
const AHEAD_MAX: u64 = 4 << 20;

/// Writes a tar archive of what a guest sends. It may be unpacked by root, with all that is
/// in it: what would lend its owner's rights is left out, as where `Files` makes it.
struct ToTar<W: Write> {
    name: Vec<u8>,
    writer: Option<Writer<W>>,
    /// How many devices and named pipes there were.
    left_out: u64,
}

impl<W: Write> ToTar<W> {
    fn new(name: &[u8], output: W) -> Self {
        ToTar {
            name: name.into(),
            writer: Some(Writer::new(output)),
            left_out: 0,
        }
    }

    fn path(&self, path: &[u8]) -> Vec<u8> {
        match (self.name.as_slice(), path) {
            (b"", b"") => b".".to_vec(),
            (name, b"") => name.to_vec(),
            (b"", path) => path.to_vec(),
            (name, path) => [name, b"/", path].concat(),
        }
    }
}

impl<W: Write> Sink for ToTar<W> {
    fn put(&mut self, entry: &Entry, data: &mut dyn Data) -> io::Result<()> {
        const HARMLESS: u32 = 0o777;
        const STICKY: u32 = 0o1000;
        let (kind, size) = match &entry.kind {
            &Kind::File(size) => (tarball::Kind::File, size),
            Kind::Folder => (tarball::Kind::Directory, 0),
            Kind::Symlink(target) => (tarball::Kind::Symlink(target.clone()), 0),
            Kind::Link(target) => (tarball::Kind::Link(self.path(target)), 0),
            Kind::Char(..) | Kind::Block(..) | Kind::Fifo => {
                self.left_out = self.left_out.saturating_add(1);
                return Ok(());
            }
        };
        let bits = match entry.kind {
            Kind::Folder => HARMLESS | STICKY,
            _ => HARMLESS,
        };
        let xattrs = entry.xattrs.iter();
        let xattrs = xattrs.filter(|(name, _)| !name.starts_with(b"security."));
        let meta = Meta {
            mode: entry.mode & bits,
            uid: entry.uid,
            gid: entry.gid,
            mtime: u32::try_from(entry.mtime.max(0)).unwrap_or(u32::MAX),
            xattrs: xattrs.cloned().collect(),
        };
        let path = self.path(&entry.path);
        let Some(writer) = &mut self.writer else {
            return Ok(());
        };
        if size > AHEAD_MAX {
            let mut data = data;
            return writer.entry(&path, &kind, &meta, size, &mut data);
        }
        // It may have got shorter since it was looked at.
        let mut all = Vec::new();
        data.take(size).read_to_end(&mut all)?;
        writer.entry(&path, &kind, &meta, all.len() as u64, &mut all.as_slice())
    }

    fn finish(&mut self) -> io::Result<()> {
        match self.writer.take() {
            // What it holds back may be what cannot be written.
            Some(writer) => writer.finish().and_then(|mut output| output.flush()),
            None => Ok(()),
        }
    }
}

/// Reads a tar archive, plain or by gzip.
struct FromTar {
    entries: Entries<Box<dyn Read>>,
    begun: bool,
}

impl FromTar {
    fn new(input: impl Read + 'static) -> io::Result<Self> {
        let mut input = BufReader::with_capacity(128 << 10, input);
        let input: Box<dyn Read> = match input.fill_buf()? {
            [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(input)),
            _ => Box::new(input),
        };
        Ok(FromTar {
            entries: Entries::new(input),
            begun: false,
        })
    }
}

impl Source for FromTar {
    fn next(&mut self) -> io::Result<Option<Entry>> {
        // All lies in a folder that is there.
        if !std::mem::replace(&mut self.begun, true) {
            return Ok(Some(Entry {
                path: Vec::new(),
                kind: Kind::Folder,
                mode: 0o755,
                uid: 0,
                gid: 0,
                mtime: 0,
                xattrs: Vec::new(),
                sparse: false,
            }));
        }
        let Some(entry) = self.entries.next_entry().map_err(io::Error::other)? else {
            return Ok(None);
        };
        let plain = |path: &[u8]| {
            let refused = |why| io::Error::other(format!("{}: {why}", tarball::show(path)));
            normalised(path).map_err(refused)
        };
        let kind = match entry.kind {
            tarball::Kind::File => Kind::File(entry.size),
            tarball::Kind::Directory => Kind::Folder,
            tarball::Kind::Symlink(target) => Kind::Symlink(target),
            tarball::Kind::Link(target) => Kind::Link(plain(&target)?),
            tarball::Kind::Char(major, minor) => Kind::Char(major, minor),
            tarball::Kind::Block(major, minor) => Kind::Block(major, minor),
            tarball::Kind::Fifo => Kind::Fifo,
        };
        Ok(Some(Entry {
            path: plain(&entry.path)?,
            kind,
            mode: entry.meta.mode,
            uid: entry.meta.uid,
            gid: entry.meta.gid,
            mtime: entry.meta.mtime.into(),
            xattrs: entry
                .meta
                .xattrs
                .into_iter()
                .filter(|(name, _)| xattrs::is_known(name))
                .collect(),
            sparse: false,
        }))
    }
}

impl Data for FromTar {}

impl Read for FromTar {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.entries.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_docker_s() {
        for (text, expected) in [
            ("-", Side::Tar),
            ("web:/etc", Side::Guest("web", b"/etc")),
            ("web:", Side::Guest("web", b"")),
            ("a/b", Side::Host(Path::new("a/b"))),
            ("./a:b", Side::Host(Path::new("./a:b"))),
            ("/a:b", Side::Host(Path::new("/a:b"))),
        ] {
            assert_eq!(side(text.as_ref()), expected, "{text}");
        }
        for (path, name) in [
            ("/etc", "etc"),
            ("/etc/", "etc"),
            ("etc/hosts", "hosts"),
            ("/etc/.", ""),
            (".", ""),
            ("/", ""),
            ("", ""),
            ("a/..", ""),
        ] {
            assert_eq!(name_of(path.as_bytes()), name.as_bytes(), "{path}");
        }
        let words = |from: &str, to: &str| {
            cp(&CopyOptions {
                from: from.into(),
                to: to.into(),
                ..CopyOptions::default()
            })
        };
        assert!(words("a", "b").unwrap_err().to_string().contains("VM:PATH"));
        assert!(words("a:b", "c:d").is_err());
    }

    /// An archive's bytes, written and read.
    fn through_tar(
        name: &str,
        entries: &[Entry],
        data: &[u8],
    ) -> io::Result<Vec<(Entry, Vec<u8>)>> {
        let path = tempfile::NamedTempFile::new()?;
        let mut sink = ToTar::new(name.as_bytes(), path.reopen()?);
        for entry in entries {
            sink.put(entry, &mut &*data)?;
        }
        sink.finish()?;
        let mut source = FromTar::new(path.reopen()?)?;
        let mut all = Vec::new();
        while let Some(entry) = source.next()? {
            let mut data = Vec::new();
            source.read_to_end(&mut data)?;
            all.push((entry, data));
        }
        Ok(all)
    }

    #[test]
    fn archives_have_what_is_copied_and_no_more() {
        let entry = |path: &str, kind| Entry {
            path: path.into(),
            kind,
            mode: 0o1755,
            uid: 3_000_000,
            gid: 5,
            mtime: 7,
            xattrs: vec![(b"user.a".to_vec(), b"b\0\n".to_vec())],
            sparse: false,
        };
        let entries = [
            entry("", Kind::Folder),
            entry("f", Kind::File(5)),
            entry("l", Kind::Link(b"f".to_vec())),
            entry("s", Kind::Symlink(b"/x".to_vec())),
        ];
        // A file that got shorter.
        let all = through_tar("etc", &entries, b"abc").unwrap();
        let paths = all
            .iter()
            .map(|(entry, _)| str::from_utf8(&entry.path).unwrap());
        let paths: Vec<_> = paths.collect();
        assert_eq!(paths, ["", "etc", "etc/f", "etc/l", "etc/s"]);
        assert_eq!(all[2].1, b"abc");
        assert_eq!(all[3].0.kind, Kind::Link(b"etc/f".to_vec()));
        let link = Entry {
            mode: 0o755,
            ..entry("etc/s", Kind::Symlink(b"/x".to_vec()))
        };
        assert_eq!(all[4].0, link);
        let all = through_tar("", &entries, b"abcdef").unwrap();
        let f = Entry {
            mode: 0o755,
            ..entry("f", Kind::File(5))
        };
        let f = (f, b"abcde".to_vec());
        assert_eq!((&all[1].0, &all[2]), (&entry("", Kind::Folder), &f));
        // A long file that got shorter: as many zeroes as a guest says would have no end.
        let long = [entry("f", Kind::File(u64::MAX >> 1))];
        let error = through_tar("", &long, b"abc").unwrap_err();
        assert!(error.to_string().contains("shorter"), "{error}");
        // What stays with the guest.
        let special = [Kind::Char(1, 3), Kind::Block(8, 0), Kind::Fifo];
        let special = special.map(|kind| entry("x", kind));
        let mut sink = ToTar::new(b"", Vec::new());
        for entry in &special {
            sink.put(entry, &mut io::empty()).unwrap();
        }
        assert_eq!(sink.left_out, 3);
        assert_eq!(through_tar("", &special, b"").unwrap().len(), 1);
        for (kind, mode) in [(Kind::File(0), 0o755), (Kind::Folder, 0o1755)] {
            let lending = Entry {
                mode: 0o7755,
                xattrs: vec![(b"security.capability".to_vec(), b"x".to_vec())],
                ..entry("f", kind)
            };
            let (came, _) = through_tar("", &[lending], b"").unwrap().remove(1);
            assert_eq!((came.mode, came.xattrs), (mode, vec![]), "{:?}", came.kind);
        }
        // What leads out of it.
        let out = [entry("../x", Kind::File(0))];
        assert!(through_tar("", &out, b"").is_err());
    }
}
