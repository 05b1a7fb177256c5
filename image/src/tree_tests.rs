use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::digest::Digest;
use crate::layers::Record;
use crate::tarball::Writer;

/// A path, a kind and a mode.
type Simple<'a> = (&'a [u8], Kind, u32);

fn archive(entries: &[Simple]) -> Vec<u8> {
    let mut out = Writer::new(Vec::new());
    for (path, kind, mode) in entries {
        let meta = Meta {
            mode: *mode,
            mtime: 9,
            ..Meta::default()
        };
        let data: &[u8] = if *kind == Kind::File { b"data" } else { b"" };
        out.entry(path, kind, &meta, data.len() as u64, &mut &*data)
            .unwrap();
    }
    out.finish().unwrap()
}

fn tree(entries: &[Simple]) -> Result<Tree, ArchiveError> {
    Tree::read(
        &mut Entries::new(archive(entries).as_slice()),
        &Limits::default(),
    )
}

/// Names, and what they are: a letter, and the mode.
fn told(tree: &Tree) -> Vec<String> {
    let letter = |inode: &Inode| match &inode.kind {
        InodeKind::Directory { opaque: true, .. } => 'o',
        InodeKind::Directory { implied: true, .. } => 'i',
        InodeKind::Directory { .. } => 'd',
        InodeKind::File { .. } => 'f',
        InodeKind::Other(Kind::Symlink(_)) => 'l',
        InodeKind::Other(_) => 'x',
    };
    let names = tree.names().filter(|(path, ..)| !path.is_empty());
    let names = names.map(|(path, _, inode)| {
        format!(
            "{} {} {:o}",
            String::from_utf8_lossy(path),
            letter(inode),
            inode.meta.mode
        )
    });
    names
        .chain(
            tree.whiteouts()
                .map(|path| format!("{} w", String::from_utf8_lossy(path))),
        )
        .collect()
}

#[test]
fn the_last_of_what_comes_twice_is_there() {
    let tree = tree(&[
        (b"./", Kind::Directory, 0o711),
        (b"a", Kind::File, 0o600),
        (b"./a", Kind::File, 0o644),
        (b"d/", Kind::Directory, 0o700),
        (b"d/x", Kind::File, 0o644),
        (b"/d", Kind::Directory, 0o755),
        (b"e/y/z", Kind::File, 0o644),
        (b"e", Kind::File, 0o600),
        (b"s", Kind::Symlink(b"/etc".to_vec()), 0o777),
        (b"s", Kind::Directory, 0o750),
        (b"s/t", Kind::File, 0o640),
    ])
    .unwrap();
    assert_eq!(
        told(&tree),
        [
            "a f 644",
            "d d 755",
            "d/x f 644",
            "e f 600",
            "s d 750",
            "s/t f 640"
        ]
    );
}

#[test]
fn whiteouts_hide_what_is_below_only() {
    let tree = tree(&[
        (b"d/.wh.gone", Kind::File, 0),
        (b"d/.wh.new", Kind::File, 0),
        (b"d/new", Kind::File, 0o644),
        (b".wh.fresh", Kind::File, 0),
        (b"fresh/x", Kind::File, 0o644),
        (b"o/.wh..wh..opq", Kind::File, 0),
        (b".wh..wh.plnk", Kind::Directory, 0o700),
        (b".wh..wh.plnk/12.34", Kind::File, 0o600),
        (b"r/.wh.x", Kind::File, 0),
        (b"r", Kind::File, 0o644),
    ])
    .unwrap();
    assert_eq!(
        told(&tree),
        [
            "d i 755",
            "d/new f 644",
            "fresh o 755",
            "fresh/x f 644",
            "o o 755",
            "r f 644",
            "d/gone w"
        ]
    );
}

#[test]
fn a_whiteout_brings_no_directory_back() {
    for entries in [
        [&b".wh.gone"[..], b"gone/.wh.x"],
        [b"gone/.wh.x", b".wh.gone"],
        [b".wh.gone", b"gone/a/b/.wh.x"],
        [b".wh.gone", b"gone/a/.wh..wh..opq"],
    ] {
        let entries = entries.map(|path| (path, Kind::File, 0));
        assert_eq!(told(&tree(&entries).unwrap()), ["gone w"], "{entries:?}");
    }
    // One that the layer has otherwise stays, and so does one of a layer below.
    let tree = tree(&[
        (b".wh.new", Kind::File, 0),
        (b"new/file", Kind::File, 0o644),
        (b"new/.wh.x", Kind::File, 0),
        (b"below/a/.wh.x", Kind::File, 0),
        (b"file/.wh.x", Kind::File, 0),
        (b"file", Kind::File, 0o644),
    ]);
    assert_eq!(
        told(&tree.unwrap()),
        [
            "below i 755",
            "below/a i 755",
            "file f 644",
            "new o 755",
            "new/file f 644",
            "below/a/x w",
            "new/x w"
        ]
    );
}

#[test]
fn links_to_notes_of_aufs_are_names_of_one_file() {
    let link = || Kind::Link(b".wh..wh.plnk/12.34".to_vec());
    let tree = tree(&[
        (b".wh..wh.plnk", Kind::Directory, 0o700),
        (b"./.wh..wh.plnk/12.34", Kind::File, 0o640),
        (b"one", link(), 0),
        (b"d/two", link(), 0),
    ])
    .unwrap();
    assert_eq!(told(&tree), ["d i 755", "d/two f 640", "one f 640"]);
    let inodes: BTreeSet<usize> = tree
        .names()
        .filter(|(path, ..)| [&b"one"[..], b"d/two"].contains(path))
        .map(|(_, inode, _)| inode)
        .collect();
    assert_eq!(inodes.len(), 1);
}

/// The same again and again.
struct Repeated {
    data: Vec<u8>,
    at: usize,
}

impl Read for Repeated {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = (&self.data[self.at..]).read(buffer)?;
        self.at = (self.at + count) % self.data.len();
        Ok(count)
    }
}

/// Each of these is small when compressed, and 4 KiB in memory.
#[test]
fn targets_of_symbolic_links_count() {
    let mut one = archive(&[(b"x", Kind::Symlink(vec![b'x'; PATH_MAX]), 0o777)]);
    one.truncate(one.len() - 1024);
    // A few more than make 256 MiB, so that it ends where they do not count.
    let len = one.len() as u64 * ((256 << 20) / PATH_MAX as u64 + 100);
    let all = Repeated { data: one, at: 0 }.take(len);
    let all: Box<dyn Read> = Box::new(all);
    let read = Tree::read(&mut Entries::new(all), &Limits::default());
    let error = read.err().unwrap().to_string();
    assert!(error.contains("names of more than 256 MiB"), "{error}");
}

#[test]
fn files_have_no_more_bytes_than_an_image_may() {
    let read = |limits: Limits| {
        let archive = archive(&[(b"a", Kind::File, 0), (b"b", Kind::File, 0)]);
        Tree::read(&mut Entries::new(archive.as_slice()), &limits)
    };
    let limits = Limits::default().with_size(8);
    assert_eq!(read(limits).unwrap().data(), 8);
    let error = read(limits.less(1)).err().unwrap().to_string();
    assert!(
        error.contains("more than 8 bytes") && error.contains("--max-size"),
        "{error}"
    );
}

#[test]
fn hard_links_are_names_of_what_was_there() {
    let tree = tree(&[
        (b"a", Kind::File, 0o644),
        (b"b", Kind::Link(b"./a".to_vec()), 0),
        (b"a", Kind::File, 0o600),
        (b"c", Kind::Link(b"/b".to_vec()), 0),
        (b"c", Kind::Link(b"c".to_vec()), 0),
    ])
    .unwrap();
    let inodes: BTreeMap<&[u8], usize> =
        tree.names().map(|(path, inode, _)| (path, inode)).collect();
    assert_eq!(inodes[&b"b"[..]], inodes[&b"c"[..]]);
    assert_ne!(inodes[&b"a"[..]], inodes[&b"b"[..]]);
    assert_eq!(told(&tree), ["a f 600", "b f 644", "c f 644"]);
}

#[test]
fn tricks_are_refused() {
    let link = |target: &str| Kind::Link(target.as_bytes().to_vec());
    let symlink = |target: &str| Kind::Symlink(target.as_bytes().to_vec());
    let deep = b"d/".repeat(257);
    let long = b"x".repeat(256);
    let cases: [(&[Simple], &str); 20] = [
        (&[(b"../x", Kind::File, 0)], "leads out"),
        (&[(b"a/../../x", Kind::File, 0)], "leads out"),
        (&[(b"a/..", Kind::Directory, 0)], "leads out"),
        (
            &[(b"s", symlink("/etc"), 0), (b"s/passwd", Kind::File, 0)],
            "below s, a symbolic link",
        ),
        (
            &[(b"s", symlink("/etc"), 0), (b"s/.wh.passwd", Kind::File, 0)],
            "below s, a symbolic link",
        ),
        (
            &[
                (b"s", symlink("/etc"), 0),
                (b"s/a/.wh..wh..opq", Kind::File, 0),
            ],
            "below s, a symbolic link",
        ),
        (
            &[(b"f", Kind::File, 0), (b"f/x", Kind::File, 0)],
            "below f, no folder",
        ),
        (&[(b"s", symlink(""), 0)], "symbolic link to nothing"),
        (&[(b"l", link("missing"), 0)], "no entry before"),
        (
            &[(b"l", link("m"), 0), (b"m", link("l"), 0)],
            "no entry before",
        ),
        (&[(b"l", link("l"), 0)], "no entry before"),
        (
            &[(b"d", Kind::Directory, 0), (b"l", link("d"), 0)],
            "a folder",
        ),
        (&[(b"l", link("../../etc/passwd"), 0)], "leads out"),
        (&[(b".", Kind::File, 0)], "the root is no folder"),
        (&[(b".wh.", Kind::File, 0)], "no name"),
        (&[(b"d/.wh...", Kind::File, 0)], "no name"),
        (&[(b".wh.d/x", Kind::File, 0)], "below a whiteout"),
        (&[(&deep, Kind::Directory, 0)], "deep"),
        (&[(&long, Kind::File, 0)], "255"),
        (&[(b"c", Kind::Char(0x1000, 0), 0)], "too large"),
    ];
    for (entries, why) in cases {
        let error = tree(entries).err().unwrap().to_string();
        assert!(error.contains(why), "{error}: {why}");
    }
    assert!(normalised(b"a\0b").is_err());
    assert!(normalised(&b"abc/".repeat(1100)).is_err());
}

#[test]
fn a_layer_that_changes_nothing_is_known() {
    assert!(tree(&[]).unwrap().is_empty());
    assert!(!tree(&[(b"./", Kind::Directory, 0o755)]).unwrap().is_empty());
    assert!(!tree(&[(b".wh.x", Kind::File, 0)]).unwrap().is_empty());
    assert!(
        !tree(&[(b".wh..wh..opq", Kind::File, 0)])
            .unwrap()
            .is_empty()
    );
}

proptest! {
    #[test]
    fn whatever_comes_every_name_lies_in_directories(
        entries in vec(
            (
                "(\\.wh\\.|/|\\./|\\.\\./)?[ab](/(\\.wh\\.)?[ab.]{1,2}){0,3}/?",
                prop_oneof![
                    4 => Just(Kind::File),
                    4 => Just(Kind::Directory),
                    1 => Just(Kind::Fifo),
                    1 => Just(Kind::Symlink(b"a".to_vec())),
                    2 => "[ab](/[ab]){0,2}".prop_map(|target| Kind::Link(target.into_bytes())),
                ],
            ),
            0..30,
        ),
    ) {
        let mut out = Writer::new(Vec::new());
        for (path, kind) in &entries {
            out.entry(path.as_bytes(), kind, &Meta::default(), 0, &mut std::io::empty()).unwrap();
        }
        let archive = out.finish().unwrap();
        if let Ok(tree) = Tree::read(&mut Entries::new(archive.as_slice()), &Limits::default()) {
            let directories: BTreeSet<&[u8]> = tree
                .names()
                .filter(|(_, _, inode)| matches!(inode.kind, InodeKind::Directory { .. }))
                .map(|(path, ..)| path)
                .collect();
            for path in tree.names().map(|(path, ..)| path).chain(tree.whiteouts()) {
                prop_assert!(directories.contains(split(path).0), "{path:?}");
                prop_assert_eq!(normalised(path).unwrap(), path);
            }
            for path in tree.whiteouts() {
                prop_assert!(!tree.names().any(|(name, ..)| name == path));
            }
        }
    }
}

#[test]
fn a_directory_that_hides_is_known_whether_it_is_described_or_not() {
    let tree = tree(&[
        (b"a", Kind::Directory, 0o755),
        (b"a/.wh..wh..opq", Kind::File, 0o644),
        (b"b/c/.wh..wh..opq", Kind::File, 0o644),
        (b"d/.wh.e", Kind::File, 0o644),
    ])
    .unwrap();
    let record = Record::new(Digest::of(b""), &tree);
    let directories: Vec<_> = record.opaque_directories().collect();
    assert_eq!(directories, [b"a".to_vec(), b"b/c".to_vec()]);
    assert_eq!(record.whiteouts().collect::<Vec<_>>(), [b"d/e".to_vec()]);
}

#[test]
fn directories_that_no_entry_describes_are_so_many_and_no_more() {
    let deep = |name: usize| format!("{name}{}/f", "/d".repeat(200)).into_bytes();
    let files = |count| (0..count).map(deep).collect::<Vec<_>>();
    let read = |paths: &[Vec<u8>]| {
        let entries = paths.iter().map(|path| (&path[..], Kind::File, 0o644));
        tree(&entries.collect::<Vec<_>>()).map(|_| ())
    };
    assert!(read(&files(400)).is_ok());
    assert!(matches!(read(&files(500)), Err(ArchiveError::TooMuch(_))));
}
