//! Writes plain archives: POSIX headers, and extended ones where those are too small.

use std::io::{self, Read, Write};

use tar::{EntryType, Header};

use super::block::{BLOCK, padding};
use super::entry::{Kind, Meta};

const NAME_MAX: usize = 100;
/// The largest number of seven octal digits.
const SMALL_MAX: u64 = 0o7_777_777;
/// The largest of eleven.
const LARGE_MAX: u64 = 0o77_777_777_777;

/// An archive that is being written.
pub struct Writer<W> {
    output: W,
}

impl<W: Write> Writer<W> {
    /// An empty one.
    pub fn new(output: W) -> Self {
        Writer { output }
    }

    /// Writes an entry; a file's data come from `data`, which has `size` of them.
    pub fn entry(
        &mut self,
        path: &[u8],
        kind: &Kind,
        meta: &Meta,
        size: u64,
        data: &mut dyn Read,
    ) -> io::Result<()> {
        self.head(path, kind, meta, size, Vec::new())?;
        self.data(size, data)
    }

    /// Writes a file with holes, as GNU tar does. `pieces` are where its data are,
    /// `(offset, length)`, in order; `data` has them and nothing else.
    pub fn file_with_holes(
        &mut self,
        path: &[u8],
        meta: &Meta,
        size: u64,
        pieces: &[(u64, u64)],
        data: &mut dyn Read,
    ) -> io::Result<()> {
        let mut extended = Vec::new();
        record(&mut extended, b"GNU.sparse.major", b"1");
        record(&mut extended, b"GNU.sparse.minor", b"0");
        record(&mut extended, b"GNU.sparse.name", path);
        record(
            &mut extended,
            b"GNU.sparse.realsize",
            size.to_string().as_bytes(),
        );
        let mut map = format!("{}\n", pieces.len());
        for (offset, len) in pieces {
            map.push_str(&format!("{offset}\n{len}\n"));
        }
        let mut map = map.into_bytes();
        map.resize(map.len().next_multiple_of(BLOCK), 0);
        let stored = pieces.iter().map(|(_, len)| *len);
        let stored = stored.fold(map.len() as u64, u64::saturating_add);
        self.head(path, &Kind::File, meta, stored, extended)?;
        self.data(stored, &mut map.as_slice().chain(data))
    }

    /// Writes a header, with records before it.
    fn head(
        &mut self,
        path: &[u8],
        kind: &Kind,
        meta: &Meta,
        size: u64,
        mut extended: Vec<u8>,
    ) -> io::Result<()> {
        let mut header = Header::new_ustar();
        header.set_mode(meta.mode);
        header.set_mtime(meta.mtime.into());
        header.set_entry_type(match kind {
            Kind::File => EntryType::Regular,
            Kind::Directory => EntryType::Directory,
            Kind::Symlink(_) => EntryType::Symlink,
            Kind::Link(_) => EntryType::Link,
            Kind::Char(..) => EntryType::Char,
            Kind::Block(..) => EntryType::Block,
            Kind::Fifo => EntryType::Fifo,
        });
        let fields = header.as_old_mut();
        name(&mut fields.name, b"path", path, &mut extended);
        if let Kind::Symlink(target) | Kind::Link(target) = kind {
            name(&mut fields.linkname, b"linkpath", target, &mut extended);
        }
        if let Kind::Char(major, minor) | Kind::Block(major, minor) = kind {
            header.set_device_major(*major)?;
            header.set_device_minor(*minor)?;
        }
        let mut small = |key: &[u8], value: u64, max: u64| match value > max {
            true => {
                record(&mut extended, key, value.to_string().as_bytes());
                0
            }
            false => value,
        };
        header.set_uid(small(b"uid", meta.uid.into(), SMALL_MAX));
        header.set_gid(small(b"gid", meta.gid.into(), SMALL_MAX));
        header.set_size(small(b"size", size, LARGE_MAX));
        for (key, value) in &meta.xattrs {
            record(
                &mut extended,
                &[b"SCHILY.xattr.", key.as_slice()].concat(),
                value,
            );
        }
        if !extended.is_empty() {
            let mut before = Header::new_ustar();
            name(
                &mut before.as_old_mut().name,
                b"",
                b"extended",
                &mut Vec::new(),
            );
            before.set_entry_type(EntryType::XHeader);
            before.set_mode(0);
            before.set_size(extended.len() as u64);
            before.set_cksum();
            self.output.write_all(before.as_bytes())?;
            self.output.write_all(&extended)?;
            self.pad(extended.len() as u64)?;
        }
        header.set_cksum();
        self.output.write_all(header.as_bytes())
    }

    /// Writes data, and what fills up their last block.
    fn data(&mut self, size: u64, data: &mut dyn Read) -> io::Result<()> {
        if io::copy(&mut data.take(size), &mut self.output)? != size {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "a file is shorter than it was",
            ));
        }
        self.pad(size)
    }

    fn pad(&mut self, len: u64) -> io::Result<()> {
        io::copy(&mut io::repeat(0).take(padding(len)), &mut self.output).map(drop)
    }

    /// Writes the end.
    pub fn finish(mut self) -> io::Result<W> {
        self.output.write_all(&[0; 1024])?;
        self.output.flush()?;
        Ok(self.output)
    }
}

/// Fills in a name, or what fits of it and a record with all.
fn name(field: &mut [u8; NAME_MAX], key: &[u8], value: &[u8], extended: &mut Vec<u8>) {
    for (target, source) in field.iter_mut().zip(value) {
        *target = *source;
    }
    if value.len() > NAME_MAX {
        record(extended, key, value);
    }
}

fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3; // a space, =, a newline
    let mut len = rest + 1;
    while rest + len.to_string().len() > len {
        len += 1;
    }
    out.extend_from_slice(len.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}
