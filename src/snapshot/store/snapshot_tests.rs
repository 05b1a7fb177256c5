//! Snapshots come whole, travel as one file, and a foreign one is read as a hostile one.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use mayfly_image::Digest;

use super::key::tests::key;
use super::tests::eventually;
use super::*;
use crate::spec::check::MEMORY_MIN;
use crate::spec::{BlockSpec, DeviceKind, DeviceSpec, MachineSpec};

const MEMORY: u64 = MEMORY_MIN;
const DISK: u64 = 300_000;

struct Folder {
    root: tempfile::TempDir,
    snapshots: Snapshots,
}

impl Folder {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::open(&root.path().join("snapshots")).unwrap();
        Folder { root, snapshots }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("snapshots").join(name)
    }

    /// Whatever is there beside what is complete.
    fn unfinished(&self) -> usize {
        fs::read_dir(self.path("tmp")).unwrap().count()
    }
}

fn machine() -> MachineSpec {
    let disk = BlockSpec {
        queues: 1,
        ..Default::default()
    };
    let mut machine = key().machine;
    machine.memory.size = MEMORY;
    machine.devices.push(DeviceSpec {
        name: "scratch".into(),
        kind: DeviceKind::Block(disk),
    });
    machine
}

fn source() -> Source {
    Source {
        name: "web".into(),
        machine: machine(),
        host: key().host,
    }
}

/// One with memory here and there, and a disk that ends within a block.
fn make(snapshots: &Snapshots, name: &str) -> Snapshot {
    let mut new = snapshots.create(name).unwrap();
    new.memory.set_len(MEMORY).unwrap();
    for at in [0, 0x1_0000, MEMORY / 2 - 1, MEMORY - 1] {
        new.memory.write_all_at(&[7], at).unwrap();
    }
    new.state.write_all_at(b"state", 0).unwrap();
    let disk = new.add_disk("scratch").unwrap();
    disk.set_len(DISK).unwrap();
    disk.write_all_at(b"end", DISK - 3).unwrap();
    new.publish(source()).unwrap()
}

fn exported(snapshots: &Snapshots, name: &str) -> Vec<u8> {
    let mut file = Vec::new();
    let snapshot = snapshots.find(name).unwrap();
    snapshots.export(&snapshot, &mut file).unwrap();
    file
}

fn content(file: &fs::File) -> Vec<u8> {
    let mut content = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut content, 0).unwrap();
    content
}

#[test]
fn a_snapshot_travels_as_one_file_and_is_the_same() {
    let (here, there) = (Folder::new(), Folder::new());
    let made = make(&here.snapshots, "a");
    let file = exported(&here.snapshots, "a");
    assert!(file.len() < 6 * 65536 + 4096, "{}", file.len());
    parse_export(&file).unwrap();
    let taken = there.snapshots.import(&mut &file[..], None).unwrap();
    assert_eq!(taken.manifest, made.manifest);
    for (one, other) in [(&taken.memory, &made.memory), (&taken.state, &made.state)] {
        assert!(content(one) == content(other));
    }
    assert!(content(&taken.disks[0]) == content(&made.disks[0]));
    // It has holes there, too.
    assert!(taken.bytes().unwrap() < 1 << 20);
    drop(taken);
    // It is the same file when it goes on, and another name is its owner's choice.
    assert!(exported(&there.snapshots, "a") == file);
    let taken = there.snapshots.import(&mut &file[..], Some("b")).unwrap();
    assert_eq!(taken.manifest.name, "b");
    let expected = [("a".to_owned(), false), ("b".to_owned(), true)];
    eventually(|| {
        let names = { there.snapshots.list().unwrap().into_iter() }.map(|it| (it.name, it.busy));
        names.eq(expected.iter().cloned()).then_some(())
    });
    for (name, expected) in [("a", "one of that name"), ("../b", "write 1 to")] {
        let failed = there.snapshots.import(&mut &file[..], Some(name));
        let failed = failed.unwrap_err().to_string();
        assert!(failed.contains(expected), "{failed}");
    }
    let busy = there.snapshots.remove("b").unwrap_err().to_string();
    assert!(busy.contains("uses it"), "{busy}");
    drop(taken);
    eventually(|| there.snapshots.remove("b").ok());
    let none = there.snapshots.find("b").unwrap_err().to_string();
    assert!(none.contains("there is none"), "{none}");
    assert_eq!(there.unfinished(), 0);
}

#[test]
fn what_was_damaged_on_disk_is_not_exported() {
    let folder = Folder::new();
    drop(make(&folder.snapshots, "a"));
    let path = folder.path("named/a/memory");
    let mut permissions = fs::metadata(&path).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
    fs::set_permissions(&path, permissions).unwrap();
    let memory = fs::File::options().write(true).open(path).unwrap();
    memory.write_all_at(&[1], 4096).unwrap();
    let snapshot = folder.snapshots.find("a").unwrap();
    let failed = folder.snapshots.export(&snapshot, &mut io::sink());
    let failed = failed.unwrap_err().to_string();
    assert!(
        failed.contains("the SHA-256 of its memory is another"),
        "{failed}"
    );
}

/// An import that must fail, and leave nothing.
fn refused(file: &[u8]) -> String {
    let folder = Folder::new();
    let failed = folder.snapshots.import(&mut &file[..], None);
    assert_eq!(folder.unfinished(), 0);
    assert!(folder.snapshots.list().unwrap().is_empty());
    assert!(parse_export(file).is_err());
    failed.unwrap_err().to_string()
}

#[test]
fn an_export_that_is_cut_off_or_damaged_anywhere_is_refused() {
    let folder = Folder::new();
    drop(make(&folder.snapshots, "a"));
    let file = exported(&folder.snapshots, "a");
    let beginning = 3000;
    let steps = (0..beginning)
        .step_by(97)
        .chain((beginning..file.len()).step_by(10_007));
    for at in steps.chain([file.len() - 1]) {
        let refused_as = refused(&file[..at]);
        assert!(refused_as.contains("incomplete"), "{at}: {refused_as}");
        let mut damaged = file.clone();
        damaged[at] ^= 0x10;
        refused(&damaged);
    }
    let longer = [&file[..], &[0]].concat();
    assert!(refused(&longer).contains("behind its end"));
}

/// An export with the manifest that somebody wrote, whose digests are right.
fn forged(manifest: &str, rest: &[u8]) -> Vec<u8> {
    let mut file = b"mayflySN\x01\0\0\0".to_vec();
    file.extend((manifest.len() as u32).to_le_bytes());
    file.extend(manifest.as_bytes());
    let sum = *Digest::of(&file).bytes();
    [&file, &sum[..], rest].concat()
}

fn manifest_text() -> String {
    let folder = Folder::new();
    let made = make(&folder.snapshots, "a");
    serde_json::to_string(&made.manifest).unwrap()
}

#[test]
fn a_hostile_manifest_is_refused() {
    let good = manifest_text();
    assert!(refused(&forged(&good, &[])).contains("incomplete"));
    let replaced = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        good.replacen(from, to, 1)
    };
    let size = format!("\"bytes\":{MEMORY}");
    let device = r#""device":"scratch""#;
    let corpus = [
        (
            replaced(r#""name":"a""#, r#""name":"../../a""#),
            "its name is impossible",
        ),
        (
            replaced(r#""name":"a""#, r#""name":"""#),
            "its name is impossible",
        ),
        (
            replaced(r#""name":"a""#, r#""name":".a""#),
            "its name is impossible",
        ),
        (
            replaced(r#""name":"a""#, r#""name":"a\u0000""#),
            "its name is impossible",
        ),
        (replaced(r#""version":1"#, r#""version":2"#), "version 2"),
        (replaced(r#""version":1"#, r#""version":-1"#), "manifest"),
        (
            replaced(r#""version":1"#, r#""version":1,"program":"/bin/sh""#),
            "unknown field",
        ),
        (
            replaced(&size, r#""bytes":18446744073709551615"#),
            "another size",
        ),
        (replaced(&size, r#""bytes":1e300"#), "manifest"),
        (
            replaced(r#""bytes":5"#, r#""bytes":0"#),
            "impossible length",
        ),
        (
            replaced(r#""bytes":5"#, r#""bytes":99999999999"#),
            "impossible length",
        ),
        (
            replaced(r#""bytes":300000"#, r#""bytes":18446744073709551615"#),
            "impossible size",
        ),
        (
            replaced(device, r#""device":"rng""#),
            "a disk that its machine has not",
        ),
        (
            replaced(device, r#""device":"/dev/sda""#),
            "a disk that its machine has not",
        ),
        (replaced(r#""cpus":1"#, r#""cpus":0"#), "0 CPUs"),
        (replaced(r#""cpus":1"#, r#""cpus":255"#), "255 CPUs"),
        (replaced("sha256:", "md5:"), "not a digest"),
        ("[".repeat(100_000), "manifest"),
        ("{}".into(), "manifest"),
        (String::new(), "manifest"),
        (" ".repeat(2 << 20), "longer than 1024 KiB"),
    ];
    for (manifest, expected) in corpus {
        let told = refused(&forged(&manifest, &[]));
        let start: String = manifest.chars().take(200).collect();
        assert!(told.contains(expected), "{told}: {start}");
        assert!(told.len() < 500 && !told.contains('\n'), "{told}");
    }
    // A length that nobody sends takes no memory.
    let mut endless = b"mayflySN\x01\0\0\0".to_vec();
    endless.extend((1_u32 << 20).to_le_bytes());
    assert!(refused(&endless).contains("incomplete"));
    for (at, byte, expected) in [
        (0, b'x', "no snapshot"),
        (8, 2, "layout 2"),
        (10, 1, "header"),
    ] {
        let mut other = forged(&good, &[]);
        other[at] = byte;
        assert!(refused(&other).contains(expected));
    }
}

#[test]
fn hostile_blocks_are_refused() {
    let good = manifest_text();
    let block = |offset: u64, len: u32, byte: u8| {
        let content = vec![byte; usize::try_from(len.min(65536)).unwrap()];
        [&offset.to_le_bytes()[..], &len.to_le_bytes(), &content].concat()
    };
    let first = block(0, 65536, 7);
    let cannot = "a block that it cannot have";
    let corpus = [
        // Zeroes take no room in an export, so they may take none here.
        (block(0, 65536, 0), cannot),
        ([first.clone(), first.clone()].concat(), cannot),
        ([block(65536, 65536, 7), first.clone()].concat(), cannot),
        (block(1, 65536, 7), cannot),
        (block(0, 100, 7), cannot),
        (block(0, u32::MAX, 7), cannot),
        (block(MEMORY, 65536, 7), cannot),
        (block(!0xffff, 65536, 7), cannot),
        (block(u64::MAX, u32::MAX, 7), cannot),
        (block(0, 0, 0), cannot),
        (block(MEMORY, 0, 0), "the SHA-256 of its memory is another"),
        (
            [first, block(MEMORY, 0, 0)].concat(),
            "the SHA-256 of its memory is another",
        ),
    ];
    for (index, (blocks, expected)) in corpus.into_iter().enumerate() {
        let told = refused(&forged(&good, &blocks));
        assert!(told.contains(expected), "{index}: {told}");
    }
}

#[test]
fn a_source_that_fails_leaves_nothing() {
    struct Failing<'a>(&'a [u8]);
    impl Read for Failing<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::Error::other("the line is dead")),
                count => Ok(count),
            }
        }
    }
    let folder = Folder::new();
    drop(make(&folder.snapshots, "a"));
    let file = exported(&folder.snapshots, "a");
    for len in [0, 10, 100, 70_000, file.len() - 1] {
        let mut input = Failing(&file[..len]);
        let failed = folder.snapshots.import(&mut input, Some("b")).unwrap_err();
        assert!(failed.to_string().contains("the line is dead"), "{failed}");
        assert_eq!(folder.unfinished(), 0);
    }
}
