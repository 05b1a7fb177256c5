use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use proptest::prelude::*;

use super::wire::{Incoming, Outgoing, Piece};
use super::*;
use crate::agent::{Frames, Stream, Unpack, send, send_data};

const PLAIN: Keep = Keep {
    owners: false,
    special: false,
};

fn place(path: &Path) -> Place {
    Place::of_target(&Unpack {
        path: path.to_str().unwrap().into(),
        folder: true,
        ..Unpack::default()
    })
    .unwrap()
}

fn walk(path: &Path) -> Walk {
    Walk::new(&Place::of_source(path.to_str().unwrap().as_bytes(), false).unwrap()).unwrap()
}

fn entry(path: &str, kind: Kind) -> Entry {
    Entry {
        path: path.into(),
        kind,
        mode: 0o6755,
        uid: 12345,
        gid: 12345,
        mtime: 7,
        xattrs: Vec::new(),
        sparse: false,
    }
}

/// A folder's names with what they are, links not followed.
fn listing(folder: &Path) -> Vec<String> {
    let mut all = Vec::new();
    let mut waiting = vec![folder.to_owned()];
    while let Some(folder) = waiting.pop() {
        for found in fs::read_dir(folder).unwrap() {
            let found = found.unwrap();
            let meta = found.metadata().unwrap();
            let content = match meta.is_file() {
                true => fs::read_to_string(found.path()).unwrap(),
                false => String::new(),
            };
            if meta.is_dir() {
                waiting.push(found.path());
            }
            let path = found.path();
            all.push(format!("{} {:o} {content}", path.display(), meta.mode()));
        }
    }
    all.sort();
    all
}

#[test]
fn a_tree_arrives_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let from = folder.path().join("from");
    fs::create_dir_all(from.join("a/deep")).unwrap();
    fs::write(from.join("a/file"), "x".repeat(200_000)).unwrap();
    fs::write(from.join("a/empty"), "").unwrap();
    fs::write(from.join("a/deep/closed"), "y").unwrap();
    fs::hard_link(from.join("a/file"), from.join("again")).unwrap();
    symlink("/etc", from.join("a/link")).unwrap();
    let mode =
        |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    mode(&from.join("a/deep/closed"), 0o440);
    mode(&from.join("a/deep"), 0o550);
    mode(&from.join("a/file"), 0o755);
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    fs::File::open(from.join("a/deep"))
        .unwrap()
        .set_modified(old)
        .unwrap();

    let mut wire = Vec::new();
    let mut weight = 0;
    let before = |len| {
        weight += len;
        Ok(())
    };
    copy(
        &mut walk(&from),
        &mut Outgoing::new(&mut wire, Stream::Out, before),
    )
    .unwrap();
    let mut taken = 0;
    let count = |len| {
        taken += len;
        Ok(())
    };
    let mut frames = Frames::new(&wire[..]);
    let to = folder.path().join("to");
    let mut source = Incoming::new(&mut frames, Stream::Out, count);
    copy(&mut source, &mut Files::new(place(&to), PLAIN)).unwrap();
    // What is waited for comes.
    assert_eq!(weight, taken);

    let relative = |folder: &Path| -> Vec<String> {
        let prefix = folder.to_str().unwrap().to_owned();
        listing(folder)
            .iter()
            .map(|line| line.replacen(&prefix, "", 1))
            .collect()
    };
    assert_eq!(relative(&from), relative(&to));
    let meta = |path: &str| fs::symlink_metadata(to.join(path)).unwrap();
    assert_eq!(meta("a/file").ino(), meta("again").ino());
    assert_eq!(meta("a/deep").mtime(), 1_000_000);
    assert_eq!(fs::read_link(to.join("a/link")).unwrap(), Path::new("/etc"));
}

/// The bytes that a sender makes of a tree.
fn sent(from: &Path) -> Vec<u8> {
    let mut wire = Vec::new();
    let mut out = Outgoing::new(&mut wire, Stream::Out, |_| Ok(()));
    copy(&mut walk(from), &mut out).unwrap();
    wire
}

/// Unpacks such bytes to a directory.
fn made(wire: &[u8], to: &Path, keep: Keep) -> io::Result<()> {
    let mut frames = Frames::new(wire);
    let mut source = Incoming::new(&mut frames, Stream::Out, |_| Ok(()));
    copy(&mut source, &mut Files::new(place(to), keep))
}

#[test]
fn holes_stay_holes_and_cost_nothing_on_the_way() {
    const LEN: u64 = 1 << 40;
    const AT: u64 = 1 << 30;
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    fs::create_dir(&from).unwrap();
    let file = fs::File::create(from.join("disk")).unwrap();
    file.write_all_at(b"in the middle", AT).unwrap();
    file.set_len(LEN).unwrap();
    fs::File::create(from.join("hole"))
        .unwrap()
        .set_len(LEN)
        .unwrap();
    fs::write(from.join("zeroes"), vec![0; 200_000]).unwrap();
    let wire = sent(&from);
    assert!(wire.len() < 1 << 20, "{}", wire.len());
    made(&wire, &to, PLAIN).unwrap();
    for name in ["disk", "hole"] {
        let meta = fs::metadata(to.join(name)).unwrap();
        assert_eq!(meta.len(), LEN);
        assert!(meta.blocks() < 2048, "{name}: {}", meta.blocks());
    }
    let mut middle = [0; 20];
    let file = fs::File::open(to.join("disk")).unwrap();
    file.read_exact_at(&mut middle, AT).unwrap();
    assert_eq!(&middle, b"in the middle\0\0\0\0\0\0\0");
    // What is there is there.
    assert!(fs::metadata(to.join("zeroes")).unwrap().blocks() >= 200_000 / 512);

    // Nor are zeroes written that a file system without holes has for them (squashfs).
    let to = folder.path().join("sparse");
    let mut files = Files::new(place(&to), PLAIN);
    files
        .put(&entry("", Kind::Folder), &mut io::empty())
        .unwrap();
    let sparse = Entry {
        sparse: true,
        ..entry("f", Kind::File(1 << 20))
    };
    let data = [vec![0; 1 << 19], vec![1; 1 << 16], vec![0; 7 << 16]].concat();
    files.put(&sparse, &mut data.as_slice()).unwrap();
    files.finish().unwrap();
    let file = to.join("f");
    assert!(fs::metadata(&file).unwrap().blocks() < 512);
    assert!(fs::read(&file).unwrap() == data);

    // A receiver that does not know holes gets zeroes.
    fs::File::create(from.join("disk"))
        .unwrap()
        .set_len(300_000)
        .unwrap();
    fs::remove_file(from.join("hole")).unwrap();
    let mut wire = Vec::new();
    let out = Outgoing::new(&mut wire, Stream::Out, |_| Ok(()));
    copy(&mut walk(&from), &mut out.without_holes()).unwrap();
    assert!(wire.len() > 500_000);
}

#[test]
fn no_hole_is_longer_than_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let hole = |holes: &[u64], taken: bool| {
        let mut wire = Vec::new();
        send(&mut wire, &Piece::Entry(entry("", Kind::File(100)))).unwrap();
        for &hole in holes {
            send(&mut wire, &Piece::Hole(hole)).unwrap();
        }
        send_data(&mut wire, Stream::Out, b"").unwrap();
        send(&mut wire, &Piece::End).unwrap();
        let mut frames = Frames::new(&wire[..]);
        let mut source = Incoming::new(&mut frames, Stream::Out, |_| Ok(()));
        if !taken {
            source = source.without_holes();
        }
        let to = folder.path().join("to");
        let place = Place::of_target(&Unpack {
            path: to.to_str().unwrap().into(),
            ..Unpack::default()
        });
        copy(&mut source, &mut Files::new(place.unwrap(), PLAIN))
            .map(|()| fs::metadata(to).unwrap().len())
    };
    assert_eq!(hole(&[60, 40], true).unwrap(), 100);
    for (holes, taken) in [
        (&[101][..], true),
        (&[u64::MAX], true),
        (&[60, 41], true),
        (&[0], true),
        (&[1], false),
    ] {
        assert!(hole(holes, taken).is_err(), "{holes:?}");
    }
    // Nor is one where no file is.
    let mut wire = Vec::new();
    send(&mut wire, &Piece::Entry(entry("", Kind::Folder))).unwrap();
    send(&mut wire, &Piece::Hole(1)).unwrap();
    assert!(made(&wire, &folder.path().join("folder"), PLAIN).is_err());
}

#[test]
fn attributes_arrive_but_for_what_lends_rights() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::write(from.join("file"), "x").unwrap();
    let of = |path: &Path| xattrs::of(fs::File::open(path).unwrap()).unwrap();
    let own = |value: &str| (b"user.mayfly".to_vec(), value.as_bytes().to_vec());
    let set = |path: &Path, value: &str| {
        let file = fs::File::open(path).unwrap();
        xattrs::set(file, &[own(value)], PLAIN).unwrap();
    };
    set(&from, "folder");
    set(&from.join("file"), "file");
    made(&sent(&from), &to, PLAIN).unwrap();
    assert_eq!(of(&to), [own("folder")]);
    assert_eq!(of(&to.join("file")), [own("file")]);

    let to = folder.path().join("hostile");
    let capability = (
        b"security.capability".to_vec(),
        [&[1, 0, 0, 2, 4][..], &[0; 15]].concat(),
    );
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, mode, id) in [
        (1, 6, -1),
        (2, 7, 12345),
        (4, 4, -1),
        (0x10, 7, -1),
        (0x20, 4, -1),
    ] {
        acl.extend::<[u8; 2]>(u16::to_le_bytes(tag));
        acl.extend::<[u8; 2]>(u16::to_le_bytes(mode));
        acl.extend::<[u8; 4]>(i32::to_le_bytes(id));
    }
    let list = (b"system.posix_acl_access".to_vec(), acl);
    let with = |xattrs: Vec<(Vec<u8>, Vec<u8>)>| {
        Entry {
            xattrs,
            ..entry("", Kind::File(1))
        }
        .checked()
    };
    let all = with(vec![capability, list, own("x")]).unwrap();
    let target = Place::of_target(&Unpack {
        path: to.to_str().unwrap().into(),
        ..Unpack::default()
    });
    let mut files = Files::new(target.unwrap(), PLAIN);
    files.put(&all, &mut &b"x"[..]).unwrap();
    assert_eq!(of(&to), [own("x")]);
    let value = |len| vec![0; len];
    for wrong in [
        vec![(b"security.selinux".to_vec(), value(1))],
        vec![(b"trusted.overlay.opaque".to_vec(), value(1))],
        vec![(b"user.".to_vec(), value(1))],
        vec![(b"user.a\0b".to_vec(), value(1))],
        vec![([&b"user."[..], &[b'x'; 255]].concat(), value(1))],
        vec![(b"user.a".to_vec(), value((64 << 10) + 1))],
        vec![
            (b"user.a".to_vec(), value(60 << 10)),
            (b"user.b".to_vec(), value(60 << 10)),
            (b"user.c".to_vec(), value(60 << 10)),
        ],
    ] {
        assert!(with(wrong).is_err());
    }
}

#[test]
fn files_that_do_not_say_how_long_they_are_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let copied = |path: &str| {
        let to = Unpack {
            path: folder.path().to_str().unwrap().into(),
            name: b"copy".to_vec(),
            ..Unpack::default()
        };
        let wire = sent(Path::new(path));
        let mut frames = Frames::new(&wire[..]);
        let mut source = Incoming::new(&mut frames, Stream::Out, |_| Ok(()));
        let place = Place::of_target(&to)?;
        copy(&mut source, &mut Files::new(place, PLAIN))?;
        fs::read(folder.path().join("copy"))
    };
    for path in [
        "/proc/version",
        "/proc/self/mountinfo",
        "/sys/kernel/mm/transparent_hugepage/enabled",
    ] {
        let copy = copied(path).unwrap();
        assert!(
            !copy.is_empty() && copy == fs::read(path).unwrap(),
            "{path}"
        );
    }
}

#[test]
fn tricks_make_nothing_outside() {
    use Kind::*;
    let folder = tempfile::tempdir().unwrap();
    let outside = folder.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "s").unwrap();
    let before = listing(&outside);
    let out = outside.to_str().unwrap();
    let tricks: &[&[(&str, Kind)]] = &[
        &[("../x", File(1))],
        &[("/x", File(1))],
        &[("a/../../x", File(1))],
        &[("a\0", File(1))],
        &[("a", Symlink(out.into())), ("a/x", File(1))],
        &[("a", Symlink(out.into())), ("a", Folder)],
        &[
            ("a", Folder),
            ("a/b", Symlink("../../outside".into())),
            ("a/b/x", File(1)),
        ],
        &[("a", Folder), ("a", Symlink(out.into()))],
        &[("a", Link(b"../outside/secret".to_vec()))],
        &[("a", Link(format!("{out}/secret").into()))],
        &[
            ("s", Symlink(out.into())),
            ("a", Link(b"s/secret".to_vec())),
        ],
        // There already, in what the user has.
        &[("own", Folder), ("own/x", File(1))],
        &[("own/x", File(1))],
    ];
    for trick in tricks {
        let to = folder.path().join("to");
        fs::create_dir(&to).unwrap();
        symlink(&outside, to.join("own")).unwrap();
        let mut files = Files::new(place(&to), PLAIN);
        files.put(&entry("", Folder), &mut io::empty()).unwrap();
        let results = trick.iter().map(|(path, kind)| {
            let entry = entry(path, kind.clone()).checked()?;
            files.put(&entry, &mut &b"x"[..])
        });
        assert!(
            results.collect::<Vec<_>>().pop().unwrap().is_err(),
            "{trick:?}"
        );
        assert_eq!(listing(&outside), before, "{trick:?}");
        fs::remove_dir_all(&to).unwrap();
    }
    // What takes a link's place does not follow it.
    let to = folder.path().join("to");
    fs::create_dir(&to).unwrap();
    symlink(outside.join("secret"), to.join("file")).unwrap();
    let mut files = Files::new(place(&to), PLAIN);
    for (path, kind) in [
        ("", Folder),
        ("file", File(1)),
        ("device", Char(1, 3)),
        ("pipe", Fifo),
    ] {
        files.put(&entry(path, kind), &mut &b"x"[..]).unwrap();
    }
    files.finish().unwrap();
    assert_eq!(listing(&outside), before);
    assert_eq!(files.left_out(), 2);
    let meta = fs::symlink_metadata(to.join("file")).unwrap();
    assert!(meta.is_file() && meta.mode() & 0o7777 == 0o755 && meta.uid() != 12345);
    // A file is a file, and nothing beside it.
    let mut files = Files::new(
        Place::of_target(&Unpack {
            path: to.to_str().unwrap().into(),
            name: b"hosts".to_vec(),
            ..Unpack::default()
        })
        .unwrap(),
        PLAIN,
    );
    files.put(&entry("", File(1)), &mut &b"x"[..]).unwrap();
    for path in ["", "x"] {
        assert!(files.put(&entry(path, File(1)), &mut &b"x"[..]).is_err());
        assert!(files.put(&entry(path, Folder), &mut &b"x"[..]).is_err());
    }
}

#[test]
fn a_file_is_no_longer_than_was_said_and_no_part_of_it_stays() {
    let data = |stream, data: &'static [u8]| (stream, data);
    for frames in [
        vec![data(Stream::Out, b"abcd")],
        vec![data(Stream::In, b"abc"), data(Stream::In, b"")],
        vec![data(Stream::Out, b"abc")],
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut wire = Vec::new();
        send(&mut wire, &Piece::Entry(entry("", Kind::File(3)))).unwrap();
        for (stream, data) in frames {
            send_data(&mut wire, stream, data).unwrap();
        }
        let mut frames = Frames::new(&wire[..]);
        let mut source = Incoming::new(&mut frames, Stream::Out, |_| Ok(()));
        let place = Place::of_target(&Unpack {
            path: folder.path().to_str().unwrap().into(),
            name: b"x".to_vec(),
            ..Unpack::default()
        });
        assert!(copy(&mut source, &mut Files::new(place.unwrap(), PLAIN)).is_err());
        assert_eq!(listing(folder.path()), [""; 0]);
    }
}

#[test]
fn places_are_docker_s() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().canonicalize().unwrap();
    fs::create_dir(root.join("dir")).unwrap();
    fs::write(root.join("file"), "").unwrap();
    symlink("file", root.join("link")).unwrap();
    symlink("dir", root.join("dirlink")).unwrap();
    let target = |path: &str, name: &str, folder: bool, must_exist: bool| {
        let place = Place::of_target(&Unpack {
            path: format!("{}/{path}", root.display()).into(),
            name: name.into(),
            folder,
            must_exist,
        })
        .ok()?;
        let parent = fs::read_link(format!("/proc/self/fd/{}", place.folder.as_raw_fd()));
        let path = parent.unwrap().join(str::from_utf8(&place.name).unwrap());
        Some(
            path.strip_prefix(&root)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned(),
        )
    };
    for (path, name, folder, must_exist, expected) in [
        ("dir", "a", false, false, Some("dir/a")),
        ("dir/", "a", true, false, Some("dir/a")),
        ("dirlink", "a", true, false, Some("dir/a")),
        ("dir", "", true, false, Some("dir")),
        ("file", "a", false, false, Some("file")),
        ("link", "a", false, false, Some("file")),
        ("file", "a", true, false, None),
        ("file/", "a", false, false, None),
        ("new", "a", false, false, Some("new")),
        ("new", "a", true, false, Some("new")),
        ("new/", "a", true, false, Some("new")),
        ("new/", "a", false, false, None),
        ("new/er", "a", true, false, None),
        ("new", "", true, true, None),
        ("file", "", true, true, None),
        ("dir", "", true, true, Some("dir")),
    ] {
        let found = target(path, name, folder, must_exist);
        assert_eq!(found.as_deref(), expected, "{path} {name} {folder}");
    }
    let source = |path: &str, follow| {
        let place =
            Place::of_source(format!("{}/{path}", root.display()).as_bytes(), follow).ok()?;
        Some(String::from_utf8(place.name).unwrap())
    };
    assert_eq!(source("link", false).unwrap(), "link");
    assert_eq!(source("link", true).unwrap(), "file");
    assert_eq!(source("dirlink/", false).unwrap(), "dir");
    assert_eq!(source("file/.", false), None);
}

fn name() -> impl Strategy<Value = String> {
    const NAMES: &[&str] = &["a", "b", "c", "own", "..", ".", "", "outside", "/etc"];
    prop::collection::vec(prop::sample::select(NAMES), 1..4).prop_map(|it| it.join("/"))
}

fn kind() -> impl Strategy<Value = Kind> {
    let target = || {
        prop_oneof![
            name(),
            Just("../outside".into()),
            Just("../../outside/secret".into())
        ]
    };
    prop_oneof![
        (0u64..4).prop_map(Kind::File),
        Just(Kind::Folder),
        target().prop_map(|it| Kind::Symlink(it.into())),
        target().prop_map(|it| Kind::Link(it.into())),
        Just(Kind::Char(1, 3)),
        Just(Kind::Fifo),
    ]
}

proptest! {
    #[test]
    fn whatever_comes_stays_inside(
        entries in prop::collection::vec((name(), kind(), 0u32..0o10000), 1..24),
        broken in any::<Option<(u16, u8)>>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (outside, to) = (folder.path().join("outside"), folder.path().join("to"));
        fs::create_dir_all(&outside).unwrap();
        fs::create_dir_all(&to).unwrap();
        fs::write(outside.join("secret"), "s").unwrap();
        symlink("../outside", to.join("own")).unwrap();
        let before = listing(&outside);
        let mut wire = Vec::new();
        send(&mut wire, &Piece::Entry(entry("", Kind::Folder))).unwrap();
        for (path, kind, mode) in entries {
            let data = matches!(kind, Kind::File(_));
            send(&mut wire, &Piece::Entry(Entry { mode, ..entry(&path, kind) })).unwrap();
            if data {
                send_data(&mut wire, Stream::Out, b"").unwrap();
            }
        }
        if let Some((at, bit)) = broken {
            let at = usize::from(at) % wire.len();
            wire[at] ^= 1 << (bit % 8);
        }
        let mut frames = Frames::new(&wire[..]);
        let mut source = Incoming::new(&mut frames, Stream::Out, |_| Ok(()));
        let mut files = Files::new(place(&to), PLAIN);
        // One that is refused does not end it here, so that more is tried.
        for _ in 0..64 {
            match source.next() {
                Ok(Some(entry)) => drop(files.put(&entry, &mut source)),
                Ok(None) => break,
                Err(_) => {}
            }
        }
        let _ = files.finish();
        prop_assert_eq!(listing(&outside), before);
        let mut there: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
        there.sort();
        prop_assert_eq!(there, ["outside", "to"]);
        for line in listing(&to) {
            let mode = line.split(' ').nth(1).unwrap();
            let mode = u32::from_str_radix(mode, 8).unwrap();
            prop_assert!(mode & 0o6000 == 0 && [0o100_000, 0o40_000, 0o120_000].contains(&(mode & 0o170_000)), "{}", line);
        }
    }
}
