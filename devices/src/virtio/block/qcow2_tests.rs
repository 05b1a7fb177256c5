use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use imago::FormatCreateBuilder;
use imago::file::File as Storage;
use proptest::prelude::*;

use super::engine::{Completion, Engine, Kind, Operation};
use super::*;

const LEN: usize = 256 << 10;
const CLUSTER: usize = 4096;

/// A new image, and how it is called if it has a backing file.
fn create(backing: bool) -> File {
    let file = tempfile::tempfile().unwrap();
    let storage = Storage::try_from(file.try_clone().unwrap()).unwrap();
    let mut builder = imago::qcow2::Qcow2::<Storage>::create_builder(storage)
        .size(LEN as u64)
        .cluster_size(CLUSTER);
    if backing {
        builder = builder.backing("/nonexistent".into(), "raw".into());
    }
    builder.create().unwrap();
    file
}

fn open(file: &File, backing: Option<Image>) -> Result<Qcow2, ImageError> {
    let backing = backing.map(|image| image.into_backing().unwrap());
    Qcow2::open(file.try_clone().unwrap(), true, backing)
}

/// Does one operation, as the device does.
fn run(engine: &mut Engine, kind: Kind, offset: u64, data: &mut [u8]) -> io::Result<usize> {
    // In pieces that do not end with clusters.
    let iovecs = data
        .chunks_mut(3000)
        .map(|chunk| libc::iovec {
            iov_base: chunk.as_mut_ptr().cast(),
            iov_len: chunk.len(),
        })
        .collect();
    let operation = Operation {
        kind,
        offset,
        iovecs,
    };
    // SAFETY: the completion is waited for.
    unsafe { engine.submit(7, &operation) }.unwrap();
    loop {
        engine.wait().unwrap();
        if let Some((token, result)) = engine.completions().pop() as Option<Completion> {
            assert_eq!(token, 7);
            return result;
        }
    }
}

fn engine(file: &File, backing: Option<Image>) -> Engine {
    Engine::new(
        Image::Qcow2(Box::new(open(file, backing).unwrap())),
        &unprepared(),
    )
    .unwrap()
}

fn read(engine: &mut Engine, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    assert_eq!(run(engine, Kind::Read, offset, &mut data).unwrap(), len);
    data
}

#[test]
fn what_was_flushed_is_in_the_file() {
    let file = create(false);
    let mut first = engine(&file, None);
    let write = Kind::Write { durable: false };
    let mut data: Vec<u8> = (0..10_000u32).map(|n| (n * 7) as u8).collect();
    run(&mut first, write, 512, &mut data).unwrap();
    run(&mut first, Kind::Flush, 0, &mut []).unwrap();
    // Without the first one's end, as if it had been killed.
    let mut second = engine(&repaired(&file), None);
    assert_eq!(read(&mut second, 512, 10_000), data);
    run(
        &mut first,
        Kind::Write { durable: true },
        100_000,
        &mut [3; 700],
    )
    .unwrap();
    let mut second = engine(&repaired(&file), None);
    assert_eq!(read(&mut second, 100_000, 701)[..700], [3; 700]);
}

/// A copy of an image whose counts are right, though it was not closed.
fn repaired(file: &File) -> File {
    let copy = tempfile::tempfile().unwrap();
    copy.write_all_at(&whole(file), 0).unwrap();
    copy.write_all_at(&[0], 79).unwrap();
    copy
}

#[test]
fn an_image_whose_user_was_killed_is_refused() {
    let file = create(false);
    let unchanged = whole(&file);
    let mut first = engine(&file, None);
    read(&mut first, 0, LEN);
    run(&mut first, Kind::Flush, 0, &mut []).unwrap();
    assert_eq!(whole(&file), unchanged);
    let refused = |file: &File| {
        let message = open(file, None).unwrap_err().to_string();
        assert!(message.contains("qemu-img check -r all IMAGE"), "{message}");
    };
    let changes = [
        Kind::Write { durable: false },
        Kind::Discard { len: LEN as u64 },
        Kind::Zero {
            len: LEN as u64,
            unmap: true,
        },
        Kind::Zero {
            len: LEN as u64,
            unmap: false,
        },
    ];
    for change in changes {
        let mut disk = engine(&file, None);
        let data = match change {
            Kind::Write { .. } => &mut [1; CLUSTER][..],
            _ => &mut [],
        };
        run(&mut disk, change, 0, data).unwrap();
        refused(&file);
        run(&mut disk, Kind::Flush, 0, &mut []).unwrap();
        refused(&file);
        drop(disk);
        open(&file, None).unwrap();
    }
}

#[test]
fn version_2_is_only_read() {
    let file = create(false);
    file.write_all_at(&[0, 0, 0, 2], 4).unwrap();
    let message = open(&file, None).unwrap_err().to_string();
    assert!(message.contains("compat=v3"), "{message}");
    Qcow2::open(file, false, None).unwrap();
}

#[test]
fn zeroes_beside_a_write_leave_it_alone() {
    use super::engine::Worker;
    let file = create(false);
    let image = open(&file, None).unwrap();
    let run = |kind, offset: u64, data: &mut [u8]| {
        let iovec = libc::iovec {
            iov_base: data.as_mut_ptr().cast(),
            iov_len: data.len(),
        };
        // SAFETY: it is over when it returns.
        unsafe { image.run(kind, offset, &iovec, usize::from(!data.is_empty())) }.unwrap();
    };
    let len = CLUSTER as u64 - 512;
    for _ in 0..20 {
        for start in (0..LEN as u64).step_by(CLUSTER) {
            let both = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    both.wait();
                    run(Kind::Write { durable: false }, start, &mut [7; 512]);
                });
                scope.spawn(|| {
                    both.wait();
                    run(Kind::Zero { len, unmap: false }, start + 512, &mut []);
                });
            });
            let mut data = [0; 512];
            run(Kind::Read, start, &mut data);
            assert_eq!(data, [7; 512]);
        }
        run(Kind::Discard { len: LEN as u64 }, 0, &mut []);
    }
}

#[test]
fn the_backing_file_is_read_and_left_alone() {
    let base = tempfile::tempfile().unwrap();
    let content: Vec<u8> = (0..LEN / 2).map(|n| (n / 512) as u8 | 1).collect();
    base.write_all_at(&content, 0).unwrap();
    for qcow2_base in [false, true] {
        let base = match qcow2_base {
            false => base.try_clone().unwrap(),
            true => {
                let file = create(false);
                let mut engine = engine(&file, None);
                let write = Kind::Write { durable: true };
                run(&mut engine, write, 0, &mut content.clone()).unwrap();
                file
            }
        };
        let image = |file: &File| match qcow2_base {
            false => Image::Raw(file.try_clone().unwrap()),
            true => Image::Qcow2(Box::new(
                Qcow2::open(file.try_clone().unwrap(), false, None).unwrap(),
            )),
        };
        let before = whole(&base);
        let overlay = create(true);
        assert!(matches!(
            open(&overlay, None),
            Err(ImageError::BackingNeeded)
        ));
        assert!(matches!(
            open(&create(false), Some(image(&base))),
            Err(ImageError::NoBacking)
        ));
        let mut engine = engine(&overlay, Some(image(&base)));
        assert_eq!(read(&mut engine, 0, LEN / 2), content);
        assert_eq!(read(&mut engine, LEN as u64 / 2, LEN / 2), [0; LEN / 2]);
        let write = Kind::Write { durable: false };
        run(&mut engine, write, 1000, &mut [0xab; 5000]).unwrap();
        let discard = Kind::Discard {
            len: 2 * CLUSTER as u64,
        };
        run(&mut engine, discard, 4 * CLUSTER as u64, &mut []).unwrap();
        let zero = Kind::Zero {
            len: 100,
            unmap: false,
        };
        run(&mut engine, zero, 10 * CLUSTER as u64 + 9, &mut []).unwrap();
        let mut expected = content.clone();
        expected[1000..6000].fill(0xab);
        expected[4 * CLUSTER..6 * CLUSTER].fill(0);
        expected[10 * CLUSTER + 9..10 * CLUSTER + 109].fill(0);
        assert_eq!(read(&mut engine, 0, LEN / 2), expected);
        drop(engine);
        assert_eq!(whole(&base), before);
    }
}

fn whole(file: &File) -> Vec<u8> {
    let mut data = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut data, 0).unwrap();
    data
}

#[test]
fn headers_that_are_refused() {
    for (at, bytes, expected) in [
        (0, &b"RAW!"[..], "not a qcow2 image"),
        (4, &[0, 0, 0, 9], "version 9"),
        (8, &[0, 0, 0, 0, 0, 0, 1, 0], "name that, too: backing="),
        (20, &[0, 0, 0, 8], "cluster size"),
        (20, &[0, 0, 0, 22], "cluster size"),
        (20, &[255; 4], "cluster size"),
        (24, &[255; 8], "its size"),
        (32, &[0, 0, 0, 1], "is encrypted"),
        (32, &[0, 0, 0, 2], "is encrypted"),
        (36, &[0, 64, 0, 1], "L1 table"),
        (36, &[255; 4], "L1 table"),
        (56, &[255; 4], "refcount table"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 1], "not closed cleanly"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 2], "corrupt"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 4], "data in another file"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 8], "not compressed by zlib"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 16], "extended L2"),
        (72, &[128, 0, 0, 0, 0, 0, 0, 0], "not known: 0x80"),
        (88, &[0, 0, 0, 0, 0, 0, 0, 1], "bitmaps"),
        (96, &[0, 0, 0, 7], "refcount size"),
    ] {
        let file = create(false);
        file.write_all_at(bytes, at).unwrap();
        let before = whole(&file);
        let message = open(&file, None).unwrap_err().to_string();
        assert!(message.contains(expected), "{at}: {message}");
        assert_eq!(whole(&file), before);
    }
    let empty = tempfile::tempfile().unwrap();
    assert!(matches!(open(&empty, None), Err(ImageError::NoQcow2)));
    // A data file's name alone opens nothing.
    let file = create(false);
    let read_only = Qcow2::open(file.try_clone().unwrap(), false, None).unwrap();
    assert_eq!(read_only.size(), LEN as u64);
}

#[test]
fn several_threads_do_not_mix_data_up() {
    let file = create(false);
    let image = Arc::new(open(&file, None).unwrap());
    let work = |image: Arc<Qcow2>, part: usize| {
        move || {
            use super::engine::Worker;
            let offset = part as u64 * 4 * CLUSTER as u64;
            let run = |kind, data: &mut [u8]| {
                let iovec = libc::iovec {
                    iov_base: data.as_mut_ptr().cast(),
                    iov_len: data.len(),
                };
                // SAFETY: it is over when it returns.
                unsafe { image.run(kind, offset, &iovec, 1) }.unwrap();
            };
            for round in 0..50u8 {
                let fill = round ^ (part as u8) << 6 | 1;
                run(
                    Kind::Write { durable: false },
                    &mut vec![fill; 4 * CLUSTER - 100],
                );
                let mut data = vec![0; 4 * CLUSTER - 100];
                run(Kind::Read, &mut data);
                assert!(data.iter().all(|&byte| byte == fill));
                let len = 3 * CLUSTER as u64;
                match round % 3 {
                    0 => run(Kind::Discard { len }, &mut []),
                    1 => run(Kind::Zero { len, unmap: true }, &mut []),
                    _ => run(Kind::Flush, &mut []),
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for part in 0..4 {
            scope.spawn(work(image.clone(), part));
        }
    });
}

#[test]
fn counts_of_references_that_lie_do_not_crash_it() {
    let file = create(false);
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 48).unwrap();
    let table = u64::from_be_bytes(bytes);
    file.read_exact_at(&mut bytes, table).unwrap();
    let counts = u64::from_be_bytes(bytes);
    for (at, len) in [(table, 8), (counts, CLUSTER), (table, CLUSTER)] {
        let file = create(false);
        file.write_all_at(&vec![0; len], at).unwrap();
        let Ok(image) = open(&file, None) else {
            continue;
        };
        let mut disk = Engine::new(Image::Qcow2(Box::new(image)), &unprepared()).unwrap();
        for offset in (0..LEN).step_by(CLUSTER) {
            let _ = run(
                &mut disk,
                Kind::Write { durable: true },
                offset as u64,
                &mut [1; 4096],
            );
        }
    }
}

#[test]
fn behind_the_end_of_the_file_are_zeroes() {
    let file = create(false);
    let mut disk = engine(&file, None);
    run(
        &mut disk,
        Kind::Write { durable: true },
        0,
        &mut [7; CLUSTER],
    )
    .unwrap();
    drop(disk);
    // Its last cluster is the data's.
    let len = file.metadata().unwrap().len();
    file.set_len(len - 1000).unwrap();
    let mut expected = vec![7; CLUSTER];
    expected[CLUSTER - 1000..].fill(0);
    assert_eq!(
        difference(&read(&mut engine(&file, None), 0, CLUSTER), &expected),
        None
    );
}

#[test]
fn room_that_is_used_again_does_not_shorten_the_file() {
    let file = create(false);
    let mut disk = engine(&file, None);
    let write = Kind::Write { durable: false };
    // Whole clusters, so that none is filled up with zeroes.
    run(&mut disk, write, 0, &mut [7; 4 * CLUSTER]).unwrap();
    let discard = Kind::Discard {
        len: CLUSTER as u64,
    };
    run(&mut disk, discard, 0, &mut []).unwrap();
    // Goes where the first was, with zeroes around it.
    let last = LEN - CLUSTER;
    run(&mut disk, write, last as u64 + 9, &mut [8; 100]).unwrap();
    let mut expected = vec![0; LEN];
    expected[CLUSTER..4 * CLUSTER].fill(7);
    expected[last + 9..last + 109].fill(8);
    assert_eq!(difference(&read(&mut disk, 0, LEN), &expected), None);
}

/// Where two differ first, and how.
fn difference(found: &[u8], expected: &[u8]) -> Option<(usize, u8, u8)> {
    assert_eq!(found.len(), expected.len());
    let mut pairs = found.iter().zip(expected).enumerate();
    pairs.find_map(|(at, (&found, &expected))| (found != expected).then_some((at, found, expected)))
}

fn step() -> impl Strategy<Value = (u8, usize, usize, u8)> {
    (0u8..5, 0..LEN, 1usize..40_000, any::<u8>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn an_image_is_what_was_written(steps in prop::collection::vec(step(), 1..30)) {
        let file = create(false);
        let mut disk = engine(&file, None);
        let mut model = vec![0; LEN];
        for (what, start, len, fill) in steps {
            let len = len.min(LEN - start);
            let range = start..start + len;
            let (start, bytes) = (start as u64, len as u64);
            match what {
                0 | 1 => {
                    // No two pieces are alike.
                    let mut data: Vec<u8> = (0..len).map(|n| fill.wrapping_add((n / 500) as u8)).collect();
                    model[range].copy_from_slice(&data);
                    run(&mut disk, Kind::Write { durable: what == 1 }, start, &mut data).unwrap();
                }
                2 | 3 => {
                    model[range].fill(0);
                    run(&mut disk, Kind::Zero { len: bytes, unmap: what == 2 }, start, &mut []).unwrap();
                }
                _ => prop_assert_eq!(difference(&read(&mut disk, start, len), &model[range]), None),
            }
        }
        prop_assert_eq!(difference(&read(&mut disk, 0, LEN), &model), None);
        drop(disk);
        prop_assert_eq!(difference(&read(&mut engine(&file, None), 0, LEN), &model), None);
    }

    #[test]
    fn a_damaged_image_fails_and_no_more(
        damage in prop::collection::vec((0usize..40 * CLUSTER, any::<u8>()), 1..20),
        header in prop::collection::vec((0usize..200, any::<u8>()), 0..3),
    ) {
        let file = create(false);
        let mut disk = engine(&file, None);
        let write = Kind::Write { durable: true };
        run(&mut disk, write, 3000, &mut [0x55; 60_000]).unwrap();
        drop(disk);
        let len = file.metadata().unwrap().len() as usize;
        for (at, value) in damage.into_iter().chain(header) {
            file.write_all_at(&[value], (at % len) as u64).unwrap();
        }
        let Ok(image) = open(&file, None) else { return Ok(()) };
        prop_assume!(image.size() < 1 << 40);
        let mut disk = Engine::new(Image::Qcow2(Box::new(image)), &unprepared()).unwrap();
        for offset in (0..LEN).step_by(16 << 10) {
            let _ = run(&mut disk, Kind::Read, offset as u64, &mut [0; 16 << 10]);
            let _ = run(&mut disk, write, offset as u64 + 5, &mut [1; 6000]);
        }
        let _ = run(&mut disk, Kind::Discard { len: 100_000 }, 0, &mut []);
        let _ = run(&mut disk, Kind::Flush, 0, &mut []);
    }
}
