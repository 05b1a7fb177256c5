//! Archives and folders.

use std::fs;
use std::path::Path;
use std::process::Command;

use mayfly_testing::tools::run;

use crate::common::{Made, User, assert_same, fingerprint, shell};

/// A root file system with everything that is odd.
const ODD: &str = r#"
    cd "$1"
    chmod 711 .
    mkdir -p bin dev etc/empty tmp "odd/$(printf 'new\nline')" "odd/$(printf '\xff\xfe')"
    chmod 1777 tmp
    cp "$(command -v busybox)" bin/busybox
    ln bin/busybox bin/sh
    ln -s /bin/busybox bin/ls
    ln -s "$(printf 'x%.0s' {1..300})" odd/link
    ln bin/ls bin/linked-link
    chmod 4755 bin/busybox
    setcap cap_net_raw+ep bin/busybox
    cp bin/busybox bin/plain
    setfattr -n user.note -v 0x00ff0a3d22 bin/plain
    setfattr -n user.empty bin/plain
    setfattr -n user.folder -v text etc/empty
    mknod dev/null c 1 3
    mknod dev/disk b 259 70000
    mkfifo dev/pipe
    : >etc/nothing
    truncate -s 20M etc/hole
    printf end >>etc/hole
    printf start | dd of=etc/hole conv=notrunc status=none
    echo owned >etc/owned
    chown 3000000000:70000 etc/owned
    touch -d 2106-01-01 etc/owned
    echo long >"odd/$(printf 'y%.0s' {1..255})"
    mkdir -p "$(printf 'folder-with-a-long-name/%.0s' {1..20})"
"#;

fn odd() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    shell(ODD, &[folder.path()]);
    folder
}

/// Packs a folder by GNU tar.
fn packed(folder: &Path, target: &Path, options: &[&str]) {
    let mut command = Command::new("tar");
    command
        .args(["--numeric-owner", "--xattrs", "--xattrs-include=*"])
        .args(options);
    run(command
        .arg("-C")
        .arg(folder)
        .arg("-cf")
        .arg(target)
        .arg("."));
}

#[test]
fn a_root_file_system_survives_the_round_trip_for_root_and_others() {
    let source = odd();
    let expected = fingerprint(source.path());
    let work = tempfile::tempdir().unwrap();
    run(Command::new("chmod").arg("755").arg(work.path()));
    let path = |name: &str| work.path().join(name).display().to_string();
    packed(
        source.path(),
        &work.path().join("sparse.tar"),
        &["--format=posix", "--sparse"],
    );
    packed(
        source.path(),
        &work.path().join("plain.tar.gz"),
        &["--format=posix", "-z"],
    );
    packed(
        source.path(),
        &work.path().join("old.tar"),
        &["--format=posix", "--sparse", "--sparse-version=0.1"],
    );
    packed(
        source.path(),
        &work.path().join("zstd.tar"),
        &["--format=posix", "--zstd"],
    );
    let (root, nobody) = (User::root(), User::nobody());
    for name in ["sparse.tar", "plain.tar.gz", "old.tar", "zstd.tar"] {
        nobody.ok(&["import", &path(name), "odd"]);
        assert_same(&nobody.fingerprint("odd"), &expected);
    }
    nobody.assert_tidy();
    let folder = source.path().display().to_string();
    for source in [path("sparse.tar"), folder] {
        root.ok(&["import", &source, "odd"]);
        assert_same(&root.fingerprint("odd"), &expected);
    }
    root.assert_tidy();
}

#[test]
fn equal_archives_are_equal_images_and_one_layer() {
    let source = odd();
    let work = tempfile::tempdir().unwrap();
    let tar = work.path().join("a.tar");
    packed(source.path(), &tar, &["--format=posix"]);
    let tar = tar.display().to_string();
    let (one, other) = (User::root(), User::root());
    let id = one.ok(&["import", &tar, "a"]);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let again = other.ok(&["import", &tar, "b"]);
    assert_eq!(again.lines().next(), id.lines().next());
    let read = |user: &User, name: &str| fs::read(&user.layers(name)[0]).unwrap();
    assert!(read(&one, "a") == read(&other, "b"));
    one.ok(&["import", &tar, "c", "--cmd", "[\"x\"]"]);
    assert_eq!(one.files(&["layers"]).len(), 1);
    assert_eq!(one.files(&["images"]).len(), 2);
}

#[test]
fn the_configuration_is_what_the_flags_say() {
    let user = User::root();
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("x"), "x").unwrap();
    let source = source.path().display().to_string();
    user.ok(&[
        "import",
        &source,
        "a",
        "--cmd",
        r#"["sh","-c","x y"]"#,
        "--entrypoint",
        "run it",
        "-e",
        "A=b=c",
        "-w",
        "/w",
        "-u",
        "1:2",
        "--expose",
        "80/tcp",
        "--volume",
        "/v",
        "--stop-signal",
        "SIGINT",
        "--label",
        "l=m",
    ]);
    let all: serde_json::Value = serde_json::from_str(&user.ok(&["inspect", "a"])).unwrap();
    assert_eq!(
        all[0]["config"]["config"],
        serde_json::json!({
            "Cmd": ["sh", "-c", "x y"], "Entrypoint": ["/bin/sh", "-c", "run it"], "Env": ["A=b=c"],
            "WorkingDir": "/w", "User": "1:2", "ExposedPorts": {"80/tcp": {}}, "Volumes": {"/v": {}},
            "StopSignal": "SIGINT", "Labels": {"l": "m"},
        })
    );
    let (code, text) = user.fails(&["import", &source, "a", "-e", "novalue"]);
    assert_eq!(code, 2);
    assert!(text.contains("NAME=VALUE"), "{text}");
}

#[test]
fn saved_archives_and_layouts_are_loaded() {
    let made = Made::image(1);
    let expected = made.fingerprint();
    let path = |name: &str| made.path(name).display().to_string();
    made.copy(
        &[],
        &format!("docker-archive:{}:some/image:1", path("docker.tar")),
    );
    made.copy(
        &[],
        &format!("oci-archive:{}:some/image:2", path("oci.tar")),
    );
    made.copy(
        &["--dest-compress-format", "zstd"],
        &format!("oci:{}:h.example/z:3", path("zstd")),
    );
    shell(
        "gzip -k \"$1\"; zstd -q \"$2\"",
        &[&made.path("docker.tar"), &made.path("oci.tar")],
    );
    run(Command::new("chmod")
        .args(["-R", "go+rX"])
        .arg(made.folder.path()));
    for user in [User::root(), User::nobody()] {
        for (file, name) in [
            ("docker.tar", "some/image:1"),
            ("docker.tar.gz", "some/image:1"),
            ("oci.tar", "some/image:2"),
            ("oci.tar.zst", "some/image:2"),
            ("zstd", "h.example/z:3"),
        ] {
            let told = user.ok(&["load", &path(file)]);
            assert!(told.contains(&format!("named {name}")), "{file}: {told}");
            assert_same(&user.fingerprint(name), &expected);
            user.ok(&["rm", name]);
            user.assert_empty();
        }
        let id = user.ok(&["load", &path("oci"), "--name", "mine"]);
        assert!(id.contains("named mine:latest"), "{id}");
        assert_same(&user.fingerprint("mine"), &expected);
        user.assert_tidy();
    }
}

#[test]
fn a_layout_that_was_tampered_with_is_refused() {
    let made = Made::image(1);
    let user = User::root();
    let source = made.path("oci").display().to_string();
    // One byte of the largest blob.
    let blob = shell(
        "ls -S \"$1\"/oci/blobs/sha256/* | head -n 1",
        &[made.folder.path()],
    );
    shell(
        "printf x | dd of=\"$1\" bs=1 seek=1000 conv=notrunc status=none",
        &[Path::new(blob.trim())],
    );
    let (code, text) = user.fails(&["load", &source]);
    assert_eq!(code, 2);
    assert!(text.contains("its digest is"), "{text}");
    user.assert_empty();
}

#[test]
fn hostile_archives_are_refused_and_leave_nothing() {
    let work = tempfile::tempdir().unwrap();
    let user = User::root();
    shell(
        r#"cd "$1"
        mkdir work; cd work
        echo x >x
        tar -Pcf ../dots.tar --transform 's,x,../../x,' x
        ln -s /etc s; tar -cf ../symlink.tar s; rm s; mkdir s; echo x >s/passwd
        tar -rf ../symlink.tar s/passwd
        head -c 3000000 /dev/urandom >big
        tar -cf ../whole.tar big; head -c 2000000 ../whole.tar >../cut.tar
        gzip -c ../whole.tar | head -c 1500000 >../cut.gz
        head -c 4096 /dev/urandom >../noise
        tar -cf ../bad.tar x; printf '\377' | dd of=../bad.tar bs=1 seek=110 conv=notrunc status=none
        mkdir d; i=0; while [ $i -lt 300 ]; do i=$((i + 1)); d=${d:-.}/d; done; mkdir -p "$d" 2>/dev/null || true
        tar -cf ../deep.tar d
        "#,
        &[work.path()],
    );
    for (name, why) in [
        ("dots.tar", "leads out"),
        ("symlink.tar", "a symbolic link"),
        ("cut.tar", "cut off"),
        ("cut.gz", "cut.gz: "),
        ("noise", "not a tar archive"),
        ("bad.tar", "checksum"),
        ("deep.tar", "256 folders deep"),
    ] {
        let (code, text) =
            user.fails(&["import", &work.path().join(name).display().to_string(), "x"]);
        assert!(text.contains(why), "{name}: {text}");
        assert_eq!((code, text.lines().count()), (2, 1), "{text}");
        user.assert_empty();
    }
    let (code, text) = user.fails(&["load", &work.path().join("whole.tar").display().to_string()]);
    assert_eq!(code, 2);
    assert!(text.contains("image import"), "{text}");
}

#[test]
fn a_bomb_ends_early() {
    let work = tempfile::tempdir().unwrap();
    let bomb = work.path().join("bomb");
    shell("yes | head -c 4000M | zstd -q -1 >\"$1\"", &[&bomb]);
    let user = User::root();
    // The header of a file, and then what it has.
    shell(
        r#"cd "$2"; truncate -s 4G zeroes; tar -c zeroes | head -c 512 | zstd -q >head; cat head "$1" >tar.zst"#,
        &[&bomb, work.path()],
    );
    let (code, text) = user.fails(&[
        "import",
        &work.path().join("tar.zst").display().to_string(),
        "x",
    ]);
    assert!(text.contains("far more"), "{text}");
    assert_eq!(code, 2);
    user.assert_empty();
}

/// Makes layers of the folders `1`, `2`, …, of what `1.list` names if it is there,
/// and an archive of them as `docker save` does.
const SAVE: &str = r#"
    diff_ids= layers=
    for layer in [0-9]; do
        names=.
        [ ! -e $layer.list ] || names=$(cat $layer.list)
        tar -C $layer --format=posix --pax-option=delete=atime,delete=ctime --numeric-owner -cf $layer.tar $names
        diff_ids="$diff_ids${diff_ids:+,}\"sha256:$(sha256sum <$layer.tar | cut -d ' ' -f 1)\""
        layers="$layers${layers:+,}\"$layer.tar\""
    done
    printf '{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[%s]}}' "$diff_ids" >config.json
    printf '[{"Config":"config.json","RepoTags":["made:1"],"Layers":[%s]}]' "$layers" >manifest.json
    tar -cf saved.tar manifest.json config.json [0-9].tar
"#;

/// Layers, and what they are together.
fn assert_made(script: &str, layers: usize) {
    let work = tempfile::tempdir().unwrap();
    let touch = "find . -exec touch -h -d @1700000000 {} +";
    shell(
        &format!("cd \"$1\"; mkdir 1 2 expected; {script}; {touch}; {SAVE}"),
        &[work.path()],
    );
    let user = User::root();
    user.ok(&["load", &work.path().join("saved.tar").display().to_string()]);
    assert_eq!(user.layers("made:1").len(), layers);
    assert_same(
        &user.fingerprint("made:1"),
        &fingerprint(&work.path().join("expected")),
    );
}

#[test]
fn layers_lie_upon_one_another_as_whiteouts_say() {
    assert_made(
        r#"
        chmod 711 1 expected; chown 7:8 1 expected
        mkdir -p 1/{a,b/deep,c,gone} 2/{a,b,c,gone} expected/{a,b,c,gone}
        chmod 700 {1,expected}/c; chown 5:6 {1,expected}/c
        echo x >1/a/x; echo y | tee 1/a/y >expected/a/y; echo z >1/b/deep/z
        echo w | tee 1/c/w >expected/c/w; echo g >1/gone/g
        touch 2/a/.wh.x 2/b/.wh..wh..opq
        echo n | tee 2/b/n >expected/b/n; echo v | tee 2/c/v >expected/c/v
        # Gone, and there again with something else.
        touch 2/.wh.gone; echo h | tee 2/gone/h >expected/gone/h
        # Not a word of the folder c, nor of the root.
        printf '%s\n' a b .wh.gone gone c/v >2.list"#,
        2,
    );
}

#[test]
fn a_root_that_hides_all_below_is_the_lowest_layer() {
    assert_made(
        "echo x >1/x; touch 2/.wh..wh..opq; echo y | tee 2/y >expected/y",
        1,
    );
}

#[test]
fn a_layer_that_comes_again_is_there_once() {
    assert_made(
        "mkdir 3; echo x | tee 1/x 3/x >expected/x; echo y >2/y; echo y >expected/y; touch 2/.wh.x",
        2,
    );
}

#[test]
fn a_layer_without_anything_is_left_out() {
    assert_made(
        "echo x | tee 1/x >expected/x; echo '-T /dev/null' >2.list",
        1,
    );
}
