use std::io::{self, Read};

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use tar::{EntryType, Header};

use super::block::BLOCK;
use super::*;

type Whole = (Vec<u8>, Kind, Meta, Vec<u8>);

fn written(entries: &[Whole]) -> Vec<u8> {
    let mut out = Writer::new(Vec::new());
    for (path, kind, meta, data) in entries {
        out.entry(path, kind, meta, data.len() as u64, &mut data.as_slice())
            .unwrap();
    }
    out.finish().unwrap()
}

fn read(archive: &[u8]) -> Result<Vec<Whole>, ArchiveError> {
    let mut entries = Entries::new(archive);
    let mut all = Vec::new();
    while let Some(entry) = entries.next_entry()? {
        let mut data = Vec::new();
        entries.read_to_end(&mut data)?;
        assert_eq!(data.len() as u64, entry.size);
        all.push((entry.path, entry.kind, entry.meta, data));
    }
    Ok(all)
}

fn header(name: &[u8], kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(size);
    header.set_cksum();
    header
}

fn member(name: &[u8], kind: EntryType, data: &[u8]) -> Vec<u8> {
    let mut out = header(name, kind, data.len() as u64).as_bytes().to_vec();
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    out
}

fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let len = (1..).find(|len: &usize| rest + len.to_string().len() == *len);
    format!("{} {key}={value}\n", len.unwrap()).into_bytes()
}

fn names() -> impl Strategy<Value = Vec<u8>> {
    vec(1..=255_u8, 1..300).prop_filter("a folder's name", |name| !name.ends_with(b"/"))
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::File),
        Just(Kind::Directory),
        Just(Kind::Fifo),
        names().prop_map(Kind::Symlink),
        names().prop_map(Kind::Link),
        (0..0xfff_u32, 0..0xf_ffff_u32).prop_map(|(major, minor)| Kind::Char(major, minor)),
        (0..0xfff_u32, 0..0xf_ffff_u32).prop_map(|(major, minor)| Kind::Block(major, minor)),
    ]
}

fn metas() -> impl Strategy<Value = Meta> {
    let xattrs = btree_map("[a-z.]{1,20}", vec(any::<u8>(), 0..600), 0..3);
    (
        0..0o10000_u32,
        any::<u32>(),
        any::<u32>(),
        any::<u32>(),
        xattrs,
    )
        .prop_map(|(mode, uid, gid, mtime, xattrs)| Meta {
            mode,
            uid,
            gid,
            mtime,
            xattrs: xattrs
                .into_iter()
                .map(|(key, value)| (key.into_bytes(), value))
                .collect(),
        })
}

fn wholes() -> impl Strategy<Value = Vec<Whole>> {
    let one = (names(), kinds(), metas(), vec(any::<u8>(), 0..2000));
    vec(one, 0..8).prop_map(|mut all| {
        for (_, kind, _, data) in &mut all {
            if *kind != Kind::File {
                data.clear();
            }
        }
        all
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(entries in wholes()) {
        prop_assert_eq!(read(&written(&entries)).unwrap(), entries);
    }

    #[test]
    fn what_is_cut_off_is_told_from_what_is_whole(entries in wholes(), cut in any::<prop::sample::Index>()) {
        let archive = written(&entries);
        let len = cut.index(archive.len());
        match read(&archive[..len]) {
            Ok(some) => prop_assert_eq!(some.as_slice(), &entries[..some.len()]),
            Err(error) => {
                let truncated = matches!(&error, ArchiveError::Truncated)
                    || matches!(&error, ArchiveError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof);
                prop_assert!(truncated, "{error}");
            }
        }
    }

    #[test]
    fn broken_archives_are_refused_without_a_panic(
        entries in wholes(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        fix in any::<bool>(),
    ) {
        let mut archive = written(&entries);
        for (at, byte) in changes {
            let at = at.index(archive.len());
            archive[at] = byte;
        }
        // Else the checksum keeps all else from being looked at.
        if fix {
            for block in archive.chunks_exact_mut(BLOCK) {
                if &block[257..262] == b"ustar" {
                    let mut header = Header::from_byte_slice(block).clone();
                    header.set_cksum();
                    block.copy_from_slice(header.as_bytes());
                }
            }
        }
        let mut entries = Entries::new(archive.as_slice());
        for _ in 0..100 {
            match entries.next_entry() {
                Ok(Some(_)) => drop(io::copy(&mut (&mut entries).take(1 << 20), &mut io::sink())),
                _ => break,
            }
        }
    }

    #[test]
    fn any_bytes_are_no_panic(archive in vec(any::<u8>(), 0..3000)) {
        let _ = read(&archive);
    }

    #[test]
    fn any_extended_header_is_no_panic(data in vec(any::<u8>(), 0..600), text in "([0-9]{1,3} [a-zA-Z.]{0,12}[a-z]{1,8}=[0-9,.-]{0,20}\n){0,6}") {
        for data in [data.as_slice(), text.as_bytes()] {
            let archive = [member(b"x", EntryType::XHeader, data), member(b"f", EntryType::Regular, b"data")].concat();
            let _ = read(&archive);
        }
    }
}

#[test]
fn long_names_and_old_formats_are_read() {
    let long = [b'x'; 150];
    let archive = [
        member(
            b"././@LongLink",
            EntryType::GNULongName,
            &[&long[..], b"\0"].concat(),
        ),
        member(b"short", EntryType::Regular, b"data"),
        member(
            b"pax_global_header",
            EntryType::XGlobalHeader,
            &record("comment", "c"),
        ),
        member(b"folder/", EntryType::Regular, b""),
        member(
            b"x",
            EntryType::XHeader,
            &[record("path", "a\nb"), record("mtime", "7.25")].concat(),
        ),
        member(b"c", EntryType::Continuous, b"more"),
    ];
    let all = read(&archive.concat()).unwrap();
    let told: Vec<_> = all
        .iter()
        .map(|(path, kind, meta, data)| {
            (path.as_slice(), kind.clone(), meta.mtime, data.as_slice())
        })
        .collect();
    assert_eq!(
        told,
        [
            (&long[..], Kind::File, 1, &b"data"[..]),
            (b"folder/", Kind::Directory, 1, b""),
            (b"a\nb", Kind::File, 7, b"more"),
        ]
    );
}

#[test]
fn files_with_holes_are_read_in_all_formats() {
    let expected = [&[0; 600][..], b"abc", &[0; 100], b"de", &[0; 5]].concat();
    let numbers = "600,3,703,2";
    let common = [
        record("GNU.sparse.size", "710"),
        record("GNU.sparse.numblocks", "2"),
    ]
    .concat();
    let pairs = ["600", "3", "703", "2"];
    let pairs = pairs.iter().enumerate().flat_map(|(at, number)| {
        record(
            if at % 2 == 0 {
                "GNU.sparse.offset"
            } else {
                "GNU.sparse.numbytes"
            },
            number,
        )
    });
    let mut newest = b"2\n600\n3\n703\n2\n".to_vec();
    newest.resize(BLOCK, 0);
    newest.extend_from_slice(b"abcde");
    let newest_header = [
        record("GNU.sparse.major", "1"),
        record("GNU.sparse.minor", "0"),
        record("GNU.sparse.name", "file"),
        record("GNU.sparse.realsize", "710"),
    ];
    let mut old = header(b"file", EntryType::GNUSparse, 5);
    let gnu = old.as_gnu_mut().unwrap();
    gnu.sparse[0].set_offset(600);
    gnu.sparse[0].set_length(3);
    gnu.set_is_extended(true);
    gnu.set_real_size(710);
    old.set_cksum();
    let mut more = tar::GnuExtSparseHeader::new();
    more.sparse_mut()[0].set_offset(703);
    more.sparse_mut()[0].set_length(2);
    let mut old = [&old.as_bytes()[..], more.as_bytes(), b"abcde"].concat();
    old.resize(3 * BLOCK, 0);
    let packed = member(b"file", EntryType::Regular, b"abcde");
    for archive in [
        [
            member(
                b"x",
                EntryType::XHeader,
                &[common.clone(), pairs.collect()].concat(),
            ),
            packed.clone(),
        ]
        .concat(),
        [
            member(
                b"x",
                EntryType::XHeader,
                &[common, record("GNU.sparse.map", numbers)].concat(),
            ),
            packed,
        ]
        .concat(),
        [
            member(b"x", EntryType::XHeader, &newest_header.concat()),
            member(b"GNUSparseFile.0/file", EntryType::Regular, &newest),
        ]
        .concat(),
        old,
    ] {
        let archive = [archive, member(b"next", EntryType::Regular, b"n")].concat();
        let all = read(&archive).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].0.as_slice(), &all[0].3), (&b"file"[..], &expected));
        assert_eq!(all[1].3, b"n");
    }
}

#[test]
fn maps_that_lie_are_refused() {
    for map in [
        "0,3,1,2",
        "600,3",
        "0,5,9,1",
        "0,18446744073709551615,0,6",
        "5",
        "x",
        "0,5,18446744073709551615,1",
    ] {
        let extended = [
            record("GNU.sparse.size", "8"),
            record("GNU.sparse.map", map),
        ]
        .concat();
        let archive = [
            member(b"x", EntryType::XHeader, &extended),
            member(b"f", EntryType::Regular, b"abcde"),
        ];
        assert!(read(&archive.concat()).is_err(), "{map}");
    }
}

#[test]
fn attributes_that_cannot_be_written_are_refused() {
    let read = |key: &str| {
        let data = record(&format!("LIBARCHIVE.xattr.user.{key}"), "aGVsbG8");
        let extended = member(b"x", EntryType::XHeader, &data);
        let archive = [extended, member(b"f", EntryType::Regular, b"")].concat();
        read(&archive)
    };
    let xattrs = read("a%25b").unwrap().remove(0).2.xattrs;
    assert_eq!(xattrs[&b"user.a%b"[..]], b"hello");
    for key in ["a%3Db", "a%00b"] {
        assert!(read(key).is_err(), "{key}");
    }
}

#[test]
fn hostile_headers_are_refused() {
    let huge = header(b"x", EntryType::XHeader, 1 << 40);
    assert!(matches!(
        read(huge.as_bytes()),
        Err(ArchiveError::TooMuch(_))
    ));
    let long = header(b"x", EntryType::GNULongName, 1 << 40);
    assert!(matches!(
        read(long.as_bytes()),
        Err(ArchiveError::TooMuch(_))
    ));
    let large = header(b"x", EntryType::Regular, u64::MAX);
    assert!(read(large.as_bytes()).is_err());
    let mut wrong = header(b"x", EntryType::Regular, 0);
    wrong.as_old_mut().cksum = *b"0000000\0";
    assert!(matches!(
        read(wrong.as_bytes()),
        Err(ArchiveError::Malformed(_))
    ));
    let odd = member(b"x", EntryType::new(b'Z'), b"");
    assert!(read(&odd).unwrap_err().to_string().contains("'Z'"));
    assert!(read(&member(b"x", EntryType::XHeader, &record("path", "y"))).is_err());
    assert!(read(b"\x7fELF and no archive").is_err());
}

/// One that fits is no leave for any number of them.
#[test]
fn extended_headers_of_an_entry_count_together() {
    let file = member(b"f", EntryType::Regular, b"");
    let header = |name: &str, size| {
        let records = record(&format!("SCHILY.xattr.user.{name}"), &"x".repeat(size));
        member(b"x", EntryType::XHeader, &records)
    };
    let (a, b) = (header("a", 600 << 10), header("b", 600 << 10));
    // Those of two entries do not.
    let apart = [&a[..], &file, &b, &file].concat();
    assert_eq!(read(&apart).unwrap().len(), 2);
    let long = member(b"x", EntryType::GNULongName, &vec![b'x'; 600 << 10]);
    for second in [b, long] {
        let archive = [&a[..], &second, &file].concat();
        assert!(matches!(read(&archive), Err(ArchiveError::TooMuch(_))));
    }
}

#[test]
fn labels_and_dumped_directories_are_read_past() {
    let dump = b"Yfile\0\0".repeat(200);
    let archive = [
        member(b"backup-1", EntryType::new(b'V'), b""),
        member(b"folder/", EntryType::new(b'D'), &dump),
        member(b"acl", EntryType::new(b'A'), b"user::rwx"),
        member(
            b"long",
            EntryType::new(b'X'),
            &record("path", "folder/file"),
        ),
        member(b"short", EntryType::Regular, b"data"),
        vec![0; 1024],
    ];
    let all = read(&archive.concat()).unwrap();
    let told: Vec<_> = all
        .iter()
        .map(|(path, kind, _, data)| (&path[..], kind, &data[..]))
        .collect();
    assert_eq!(
        told,
        [
            (&b"folder/"[..], &Kind::Directory, &b""[..]),
            (b"folder/file", &Kind::File, b"data"),
        ]
    );
    let error = read(&member(b"rest", EntryType::new(b'M'), b"x"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("several volumes"), "{error}");
    let error = read(&member(b"odd", EntryType::new(b'Q'), b""))
        .unwrap_err()
        .to_string();
    assert!(error.contains("'Q'"), "{error}");
}

/// As writers in the world fill them: with nothing, blanks, or a version of zeroes.
#[test]
fn headers_of_other_writers_are_read() {
    let mut odd = Header::new_ustar();
    let name = b"file";
    odd.as_old_mut().name[..4].copy_from_slice(name);
    odd.as_old_mut().mode.copy_from_slice(b"  644 \0\0");
    odd.as_old_mut().uid.copy_from_slice(&[0; 8]);
    odd.as_old_mut().gid.copy_from_slice(b"        ");
    odd.as_old_mut().mtime.copy_from_slice(&[0; 12]);
    odd.set_size(4);
    let fields = odd.as_ustar_mut().unwrap();
    fields.version = [0; 2];
    fields.prefix[..6].copy_from_slice(b"folder");
    odd.set_cksum();
    let archive = [odd.as_bytes(), &b"data"[..], &[0; 508]].concat();
    let all = read(&archive).unwrap();
    let (path, kind, meta, data) = &all[0];
    assert_eq!(
        (&path[..], kind, &data[..]),
        (&b"folder/file"[..], &Kind::File, &b"data"[..])
    );
    assert_eq!(
        (meta.mode, meta.uid, meta.gid, meta.mtime),
        (0o644, 0, 0, 0)
    );
    // A record without a value leaves the header's.
    let records = ["uid", "gid", "size", "mtime"]
        .map(|key| record(key, ""))
        .concat();
    let archive = [member(b"x", EntryType::XHeader, &records), archive].concat();
    assert_eq!(read(&archive).unwrap(), all);
}
