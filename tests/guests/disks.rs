//! Real ext4 disks, inside and outside.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mayfly_testing::guest::Guest;
use mayfly_testing::tools::{random_file, tool};

fn make_ext4(path: &Path, mib: u64) {
    std::fs::File::create(path)
        .unwrap()
        .set_len(mib << 20)
        .unwrap();
    tool("mkfs.ext4", &["-q", path.to_str().unwrap()]);
}

fn check_clean(path: &Path) {
    tool("e2fsck", &["-fn", path.to_str().unwrap()]);
}

/// The checksum of a file inside an ext4 image, read on the host.
fn checksum_in(image: &Path, file: &str) -> String {
    let output = Command::new("debugfs")
        .args(["-R", &format!("cat {file}")])
        .arg(image)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let dump = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(dump.path(), output.stdout).unwrap();
    checksum(dump.path())
}

fn checksum(path: &Path) -> String {
    let line = tool("md5sum", &[path.to_str().unwrap()]);
    line.split(' ').next().unwrap().to_owned()
}

/// What the script printed behind `NAME: `.
fn printed(console: &str, name: &str) -> String {
    let value = console.split(&format!("{name}: ")).nth(1);
    let value = value.unwrap_or_else(|| panic!("no {name} in {console}"));
    value.lines().next().unwrap().trim().to_owned()
}

#[test]
fn ext4_is_read_written_flushed_and_trimmed() {
    let guest = Guest::new(
        "set -e
         md5() { md5sum $1 | cut -d ' ' -f 1; }
         mount -t ext4 /dev/vda /mnt
         cp /dev/vdb /mnt/copy
         echo copied: $(md5 /mnt/copy)
         dd if=/dev/urandom of=/mnt/made bs=64k count=320 2>/dev/null
         sync
         echo 3 > /proc/sys/vm/drop_caches
         echo made: $(md5 /mnt/made)
         dd if=/dev/zero of=/mnt/gone bs=1M count=60 2>/dev/null
         sync
         rm /mnt/gone
         sync
         echo trimmed: $(fstrim -v /mnt)
         echo id: $(cat /sys/block/vda/serial)
         echo read-only: $(cat /sys/block/vdb/ro) $(cat /sys/block/vda/ro)
         echo cache: $(cat /sys/block/vda/queue/write_cache)
         dd if=/dev/zero of=/dev/vdb count=1 2>/dev/null && echo bad: written
         umount /mnt
         echo finished: yes",
    );
    let (disk, source) = (guest.path("disk,1"), guest.path("source"));
    make_ext4(&disk, 200);
    random_file(&source, 16 << 20);
    let before = checksum(&source);
    let blocks = |path: &Path| std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap());
    let name = disk.to_str().unwrap().replace(',', ",,");
    let running = guest
        .args(["--disk", &format!("path={name},id=root-disk")])
        .args(["--disk", &format!("path={},ro", source.display())])
        .start();
    let mut running = running;
    let folder = std::mem::replace(&mut running.folder, tempfile::tempdir().unwrap());
    let ended = running.wait();
    let console = ended.stdout;
    assert_eq!(printed(&console, "finished"), "yes");
    assert_eq!(printed(&console, "copied"), before);
    assert_eq!(printed(&console, "id"), "root-disk");
    assert_eq!(printed(&console, "read-only"), "1 0");
    assert_eq!(printed(&console, "cache"), "write back");
    assert!(printed(&console, "trimmed").contains("bytes"), "{console}");
    assert!(!console.contains("bad:"), "{console}");

    check_clean(&disk);
    assert_eq!(checksum(&source), before);
    assert_eq!(checksum_in(&disk, "/copy"), before);
    assert_eq!(checksum_in(&disk, "/made"), printed(&console, "made"));
    // The 60 MiB that were written and removed take no room on the host.
    assert!(blocks(&disk) * 512 < 60 << 20, "{} blocks", blocks(&disk));
    drop(folder);
}

#[test]
fn what_was_synced_survives_a_kill() {
    let guest = Guest::new(
        "mount -t ext4 /dev/vda /mnt
         n=0
         while :; do
             n=$((n + 1))
             dd if=/dev/urandom of=/mnt/f$n bs=4k count=$((n % 40 + 1)) conv=fsync 2>/dev/null &&
                 echo synced: $n $(md5sum /mnt/f$n | cut -d ' ' -f 1) end
             dd if=/dev/urandom of=/mnt/noise bs=64k count=16 2>/dev/null
         done",
    );
    let disk = guest.path("disk");
    make_ext4(&disk, 256);
    let mut running = guest
        .args(["--disk", &format!("path={}", disk.display())])
        .start();
    running.expect("synced: 12 ");
    running.signal(9);
    let folder = std::mem::replace(&mut running.folder, tempfile::tempdir().unwrap());
    let ended = running.wait();
    assert_eq!(ended.signal(), Some(9), "{ended:?}");

    // Replays the journal, and nothing else.
    let replay = Command::new("e2fsck")
        .args(["-p", "-E", "journal_only"])
        .arg(&disk)
        .output()
        .unwrap();
    assert!(matches!(replay.status.code(), Some(0 | 1)), "{replay:?}");
    check_clean(&disk);
    let mut count = 0;
    for line in ended.stdout.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["synced:", number, sum, "end"] = words[..] {
            assert_eq!(
                checksum_in(&disk, &format!("/f{number}")),
                sum,
                "file {number}"
            );
            count += 1;
        }
    }
    assert!(count >= 11, "{count} files were synced");
    drop(folder);
}

#[test]
fn a_disk_is_locked_while_a_vm_may_write_to_it() {
    let guest = Guest::new("echo ready; sleep 1000");
    let (writable, shared) = (guest.path("w"), guest.path("s"));
    for path in [&writable, &shared] {
        std::fs::File::create(path)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
    }
    let mut first = guest
        .args(["--disk", &format!("path={}", writable.display())])
        .args(["--disk", &format!("path={},ro", shared.display())])
        .start();
    first.expect("ready");
    let second = |disk: String| Guest::new("").args(["--disk", &disk]).start().wait();
    for refused in [
        format!("path={}", writable.display()),
        format!("path={},ro", writable.display()),
        format!("path={}", shared.display()),
    ] {
        let ended = second(refused);
        assert_eq!(ended.code(), Some(3), "{ended:?}");
        assert!(
            ended.stderr.contains("--disk") && ended.stderr.contains("locked"),
            "{ended:?}"
        );
    }
    let ended = second(format!("path={},ro", shared.display()));
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    first.signal(9);
    std::thread::sleep(Duration::from_millis(500));
    let ended = second(format!("path={}", writable.display()));
    assert_eq!(ended.code(), Some(0), "{ended:?}");
}

#[test]
fn several_disks_keep_their_order() {
    let guest = Guest::new("for d in a b c d; do echo vd$d: $(cat /sys/block/vd$d/size); done");
    let mut args = Vec::new();
    for sectors in 1..=4u64 {
        let path = guest.path(&format!("d{sectors}"));
        std::fs::File::create(&path)
            .unwrap()
            .set_len(sectors * 512)
            .unwrap();
        args.extend(["--disk".to_owned(), format!("path={}", path.display())]);
    }
    let console = guest.args(args).run();
    for (name, sectors) in [("vda", 1), ("vdb", 2), ("vdc", 3), ("vdd", 4)] {
        assert_eq!(printed(&console, name), sectors.to_string());
    }
}

fn qemu_img(args: &[&str]) -> String {
    tool("qemu-img", args)
}

#[test]
fn a_killed_vms_qcow2_image_is_taken_when_it_was_repaired() {
    // Each in another table of the image; the last is not flushed.
    let guest = Guest::new(
        "dd if=/dev/urandom of=/dev/vda bs=64k count=4 conv=fsync 2>/dev/null
         echo sum: $(head -c 256k /dev/vda | md5sum | cut -d ' ' -f 1)
         dd if=/dev/urandom of=/dev/vda bs=64k count=4 seek=20000 oflag=direct 2>/dev/null
         echo written: yes
         sleep 1000",
    );
    let image = guest.path("image");
    let path = image.to_str().unwrap().to_owned();
    qemu_img(&["create", "-q", "-f", "qcow2", &path, "4G"]);
    let disk = format!("path={path},format=qcow2");
    let mut running = guest.args(["--disk", &disk]).start();
    running.expect("written: ");
    running.signal(9);
    let folder = std::mem::replace(&mut running.folder, tempfile::tempdir().unwrap());
    let sum = printed(&running.wait().stdout, "sum");
    let again = || {
        Guest::new("echo sum: $(head -c 256k /dev/vda | md5sum | cut -d ' ' -f 1)")
            .args(["--disk", &disk])
            .start()
            .wait()
    };
    let ended = again();
    assert_eq!(ended.code(), Some(2), "{ended:?}");
    assert!(ended.stderr.contains("qemu-img check -r all"), "{ended:?}");
    qemu_img(&["check", "-q", "-r", "all", "-f", "qcow2", &path]);
    let ended = again();
    assert_eq!(printed(&ended.stdout, "sum"), sum, "{ended:?}");
    drop(folder);
}

/// Images that QEMU's tools make, and check afterwards.
#[test]
fn qcow2_images_are_read_and_written_as_qemu_does() {
    let guest = Guest::new(
        "set -e
         md5() { md5sum $1 | cut -d ' ' -f 1; }
         for disk in vda vdb vdc; do
             mount -t ext4 /dev/$disk /mnt
             echo old-$disk: $(md5 /mnt/old)
             dd if=/dev/urandom of=/mnt/new bs=64k count=40 2>/dev/null
             dd if=/dev/urandom of=/mnt/old bs=4k seek=100 count=300 conv=notrunc 2>/dev/null
             dd if=/dev/zero of=/mnt/gone bs=1M count=4 2>/dev/null
             sync
             rm /mnt/gone
             echo trimmed-$disk: $(fstrim -v /mnt)
             sync
             echo 3 > /proc/sys/vm/drop_caches
             echo new-$disk: $(md5 /mnt/new)
             echo now-$disk: $(md5 /mnt/old)
             umount /mnt
         done
         echo finished: yes
         read line < /dev/console || true",
    );
    let path = |name: &str| guest.path(name).to_str().unwrap().to_owned();
    let (raw, old) = (path("raw"), path("old"));
    make_ext4(raw.as_ref(), 48);
    random_file(old.as_ref(), 2 << 20);
    let write = format!("write {old} old");
    tool("debugfs", &["-w", "-R", &write, &raw]);
    // A whole image, compressed; the difference to a raw one; to a qcow2 one.
    let (whole, on_raw, on_qcow2) = (path("whole"), path("on-raw"), path("on,qcow2"));
    let base = path("base");
    qemu_img(&["convert", "-c", "-O", "qcow2", &raw, &whole]);
    qemu_img(&["convert", "-O", "qcow2", &raw, &base]);
    qemu_img(&["snapshot", "-c", "before", &whole]);
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", &raw, "-F", "raw", &on_raw,
    ]);
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &on_qcow2,
    ]);
    let (raw_before, base_before) = (checksum(raw.as_ref()), checksum(base.as_ref()));

    let disks = [
        format!("path={whole},format=qcow2"),
        format!("path={on_raw},format=qcow2,backing={raw}"),
        format!(
            "path={},format=qcow2,backing={base},backing-format=qcow2",
            on_qcow2.replace(',', ",,")
        ),
    ];
    let mut running = guest
        .args(disks.iter().flat_map(|disk| ["--disk", disk]))
        .start();
    running.expect("finished: ");
    // All of them are locked, the backing files shared.
    for (refused, code) in [(&raw, 3), (&base, 3), (&whole, 3)] {
        let disk = format!("path={refused}");
        let ended = Guest::new("").args(["--disk", &disk]).start().wait();
        assert_eq!(ended.code(), Some(code), "{ended:?}");
        assert!(ended.stderr.contains("locked"), "{ended:?}");
    }
    let folder = std::mem::replace(&mut running.folder, tempfile::tempdir().unwrap());
    running.signal(15);
    let ended = running.wait();
    let console = &ended.stdout;
    assert_eq!(printed(console, "finished"), "yes", "{ended:?}");
    assert_eq!(checksum(raw.as_ref()), raw_before);
    assert_eq!(checksum(base.as_ref()), base_before);
    for (disk, image) in [("vda", &whole), ("vdb", &on_raw), ("vdc", &on_qcow2)] {
        qemu_img(&["check", "-q", "-f", "qcow2", image]);
        let flat = format!("{image}.flat");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", image, &flat]);
        check_clean(flat.as_ref());
        let printed = |what: &str| printed(console, &format!("{what}-{disk}"));
        assert_eq!(printed("old"), checksum(old.as_ref()), "{disk}");
        assert_eq!(checksum_in(flat.as_ref(), "/new"), printed("new"), "{disk}");
        assert_eq!(checksum_in(flat.as_ref(), "/old"), printed("now"), "{disk}");
        assert!(printed("trimmed").contains("bytes"), "{console}");
    }
    // What the snapshot kept is still there.
    let snapshot = format!("{whole}.snapshot");
    qemu_img(&["convert", "-l", "before", "-O", "raw", &whole, &snapshot]);
    qemu_img(&["compare", "-q", "-f", "raw", "-F", "raw", &snapshot, &raw]);
    drop(folder);
}
