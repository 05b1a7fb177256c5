//! The importer of images.

#![allow(unsafe_code, reason = "sets an environment variable")]

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use mayfly_image::{Digest, LAYER_ROOT, Quiet, Store, fuzzing};
use tar::EntryType;

use crate::tarball::{append, sealed};

/// Layers with larger files are only checked.
const DATA_MAX: u64 = 1 << 20;

/// A layer's archive: the first byte says whether it is taken as it is, which may be
/// compressed, or with its headers' sums made right.
pub fn layer(input: &[u8]) {
    let Some((&how, archive)) = input.split_first() else {
        return;
    };
    let archive = match how % 2 {
        0 => sealed(archive),
        _ => archive.to_vec(),
    };
    let Ok(Some((rewritten, told))) = fuzzing::rewritten(crate::file(&archive), DATA_MAX) else {
        return;
    };
    check(&rewritten);
    assert_eq!(fuzzing::told(&rewritten).expect("our own archive"), told);
}

/// What the tool gets holds only plain names in folders that are there, in order, as
/// another reader of archives sees it.
fn check(archive: &[u8]) {
    let mut folders = BTreeSet::from([PathBuf::new()]);
    let mut others = BTreeSet::new();
    for entry in tar::Archive::new(archive).entries().unwrap() {
        let entry = entry.unwrap();
        let path = entry.path().unwrap().into_owned();
        assert!(path.starts_with(LAYER_ROOT), "{path:?}");
        let names: Vec<_> = path
            .components()
            .map(|it| it.as_os_str().to_owned())
            .collect();
        assert!(!names.contains(&OsString::from("..")), "{path:?}");
        assert!(names.iter().all(|name| name.len() <= 255), "{path:?}");
        let parent = path.parent().unwrap_or(Path::new(""));
        assert!(folders.contains(parent), "{path:?} has no folder");
        let new = match entry.header().entry_type() {
            EntryType::Directory => folders.insert(path.clone()),
            EntryType::Link => {
                let target = entry.link_name().unwrap().unwrap();
                assert!(
                    others.contains(&*target),
                    "{path:?} is a link to {target:?}"
                );
                others.insert(path.clone())
            }
            _ => others.insert(path.clone()),
        };
        assert!(new, "{path:?} comes twice");
    }
}

/// A store of its own in a folder of its own, where `sqfstar` is not found.
fn store() -> &'static (PathBuf, Store) {
    static STORE: OnceLock<(PathBuf, Store)> = OnceLock::new();
    STORE.get_or_init(|| {
        // SAFETY: no other thread reads the environment yet.
        unsafe { std::env::set_var("PATH", "/nonexistent") };
        let folder = tempfile::Builder::new()
            .prefix("mayfly-fuzz")
            .tempdir_in("/dev/shm");
        let folder = folder.or_else(|_| tempfile::tempdir()).unwrap().keep();
        let store = Store::open(&folder.join("store")).unwrap();
        (folder, store)
    })
}

/// Loads an archive. All that it may change is the store, where no work is left.
fn load(archive: &[u8]) {
    let (folder, store) = store();
    let path = folder.join("archive.tar");
    fs::write(&path, archive).unwrap();
    if let Ok(images) = store.load(&path, None, &Quiet) {
        for image in images {
            assert!(
                image
                    .layers
                    .iter()
                    .all(|layer| layer.starts_with(folder.join("store")))
            );
            let _ = store.remove(&image.id.hex());
        }
    }
    let names = |path: &Path| {
        let names = fs::read_dir(path).unwrap();
        names
            .map(|entry| entry.unwrap().file_name())
            .collect::<BTreeSet<_>>()
    };
    assert_eq!(names(folder), ["archive.tar".into(), "store".into()].into());
    let work = folder.join("store/tmp");
    assert!(!work.exists() || names(&work).is_empty(), "work is left");
}

/// An archive of images, with its headers' sums made right or as it is.
pub fn archive(input: &[u8]) {
    match input.split_first() {
        Some((how, archive)) if how % 2 == 0 => load(&sealed(archive)),
        Some((_, archive)) => load(archive),
        None => {}
    }
}

/// The documents of images, one behind the other with a line `%%` between, put into an
/// archive. The first is `index.json` or, if it is a list of `docker save`,
/// `manifest.json`; the others are blobs. `@N` in one stands for the digest of the Nth,
/// which comes after it, `#N` for its length, and `%N` for its digest's digits.
pub fn documents(input: &[u8]) {
    let mut blobs: Vec<Vec<u8>> = Vec::new();
    let mut rest = input;
    while let Some(at) = rest.windows(4).position(|window| window == b"\n%%\n") {
        blobs.push(rest[..at].to_vec());
        rest = &rest[at + 4..];
        if blobs.len() >= 9 {
            break;
        }
    }
    blobs.push(rest.to_vec());
    let mut archive = Vec::new();
    let mut digests: Vec<(usize, Digest, usize)> = Vec::new();
    for (number, blob) in blobs.iter().enumerate().rev() {
        // What the last is, all before may name.
        let blob = match number + 1 == blobs.len() {
            true => sealed(blob),
            false => filled(blob, &digests),
        };
        let digest = Digest::of(&blob);
        let name = match (number, blob.first()) {
            (0, Some(b'[')) => "manifest.json".into(),
            (0, _) => "index.json".into(),
            _ => format!("blobs/sha256/{}", digest.hex()),
        };
        append(&mut archive, &name, &blob);
        digests.push((number, digest, blob.len()));
    }
    load(&archive);
}

fn filled(text: &[u8], digests: &[(usize, Digest, usize)]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut bytes = text.iter().peekable();
    while let Some(&byte) = bytes.next() {
        let digit = bytes
            .peek()
            .and_then(|byte| char::from(**byte).to_digit(10));
        let named = digit.and_then(|digit| {
            digests
                .iter()
                .find(|(number, ..)| *number == digit as usize)
        });
        let text = match (byte, named) {
            (b'@', Some((_, digest, _))) => digest.to_string(),
            (b'#', Some((.., len))) => len.to_string(),
            (b'%', Some((_, digest, _))) => digest.hex(),
            _ => {
                out.push(byte);
                continue;
            }
        };
        bytes.next();
        out.extend(text.bytes());
    }
    out
}
