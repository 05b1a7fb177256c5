//! Archives as other tools write them.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use mayfly_testing::tools::run;

use crate::common::{User, shell};

/// Makes `saved.tar` as `docker save` does, of a layer with one file.
const SAVED: &str = r#"
    cd "$1"
    mkdir -p root
    echo text >root/file
    tar -C root --format=posix --numeric-owner -cf layer.tar .
    printf '{"architecture":"amd64","OS":"linux","config":{"cmd":["/file"]},"rootfS":{"type":"layers","diff_ids":["sha256:%s"]}}' \
        "$(sha256sum <layer.tar | cut -d ' ' -f 1)" >config.json
    printf '[{"config":"config.json","REPOTAGS":["made:1"],"layers":["layer.tar"]}]' >manifest.json
    tar -cf saved.tar manifest.json config.json layer.tar
"#;

fn saved() -> tempfile::TempDir {
    let work = tempfile::tempdir().unwrap();
    shell(SAVED, &[work.path()]);
    work
}

fn command_of(user: &User, image: &str) -> serde_json::Value {
    let all: serde_json::Value = serde_json::from_str(&user.ok(&["inspect", image])).unwrap();
    all[0]["config"]["config"]["cmd"].clone()
}

#[test]
fn keys_are_read_in_any_case() {
    let (work, user) = (saved(), User::root());
    user.ok(&["load", &work.path().join("saved.tar").display().to_string()]);
    assert_eq!(command_of(&user, "made:1")[0], "/file");
    assert!(user.fingerprint("made:1").contains("./file f"));
}

#[test]
fn archives_come_in_all_compressions_and_from_pipes() {
    let (work, user) = (saved(), User::root());
    let path = |name: &str| work.path().join(name);
    let text = |name: &str| path(name).display().to_string();
    shell(
        r#"cd "$1"
        xz -k -0 saved.tar; bzip2 -k saved.tar; zstd -q saved.tar; gzip -k saved.tar
        head -c 10240 /dev/zero >>saved.tar.gz
        # As an outer archive with holes has its layers.
        truncate -s 10M layer.tar
        sum=$(sha256sum <layer.tar | cut -d ' ' -f 1)
        sed -i "s/sha256:[0-9a-f]*/sha256:$sum/" config.json
        tar -S -cf holes.tar manifest.json config.json layer.tar
        [ "$(stat -c %s holes.tar)" -lt 1000000 ]
        mkfifo pipe"#,
        &[work.path()],
    );
    let loaded = |told: String| {
        assert!(told.ends_with("named made:1\n"), "{told}");
        let removed = user.ok(&["rm", "made:1"]);
        assert!(removed.contains("removed sha256:"), "{removed}");
    };
    for name in [
        "saved.tar.xz",
        "saved.tar.bz2",
        "saved.tar.zst",
        "saved.tar.gz",
        "holes.tar",
    ] {
        loaded(user.ok(&["load", &text(name)]));
    }
    for name in ["saved.tar", "saved.tar.gz"] {
        loaded(user.piped(&["load"], &path(name)));
        loaded(user.piped(&["load", "-"], &path(name)));
        loaded(user.piped(&["load", "/dev/stdin"], &path(name)));
    }
    // From a file, where it was read up to.
    let script = r#"{ head -c 3 >/dev/null; "$2" image load; } <"$1/behind""#;
    shell(
        r#"cd "$1"; { printf abc; cat saved.tar; } >behind"#,
        &[work.path()],
    );
    let binary = user.mayfly(&[]).get_program().to_owned();
    let mut command = Command::new("bash");
    command.args([
        "-euc",
        &script.replace("head -c 3", "dd bs=3 count=1 status=none"),
        "-",
    ]);
    command
        .arg(work.path())
        .arg(&binary)
        .env("HOME", user.home.path());
    let output = command
        .env_remove("XDG_DATA_HOME")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    loaded(String::from_utf8(output.stdout).unwrap());
    // A named pipe, and a root file system.
    let mut writer = Command::new("cp")
        .args([path("saved.tar"), path("pipe")])
        .spawn()
        .unwrap();
    loaded(user.ok(&["load", "-i", &text("pipe")]));
    writer.wait().unwrap();
    let told = user.piped(&["import", "-", "made:1"], &path("layer.tar"));
    assert!(told.ends_with("named made:1\n"), "{told}");
    user.ok(&["rm", "made:1"]);
    let (code, text) = user.fails(&["load", "-"]);
    assert!(text.contains("standard input: is empty"), "{text}");
    assert_eq!(code, 2);
    user.assert_tidy();
    user.assert_empty();
}

/// Adds blobs and a manifest to a layout: `manifest FOLDER CONFIG TYPE LAYER TYPE MORE`
/// prints its descriptor, without the last brace.
const LAYOUT: &str = r#"
    blob() { sum=$(sha256sum <"$1" | cut -d ' ' -f 1); size=$(stat -c %s "$1"); cp "$1" "$layout/blobs/sha256/$sum"; }
    manifest() {
        blob "$1"; config="{\"mediaType\":\"$2\",\"digest\":\"sha256:$sum\",\"size\":$size}"
        blob "$3"; layer="{\"mediaType\":\"$4\",\"digest\":\"sha256:$sum\",\"size\":$size}"
        printf '{"schemaVersion":2,"config":%s,"layers":[%s]%s}' "$config" "$layer" "$5" >manifest
        blob manifest; printf '{"digest":"sha256:%s","size":%s' "$sum" "$size"
    }
    cd "$1"
    C=application/vnd.oci.image.config.v1+json
    L=application/vnd.oci.image.layer.v1.tar
    echo '{"critical":{}}' >text
    echo '{}' >empty
    sed 's/"amd64"/""/; s/"linux"/""/; s/sha256:[0-9a-f]*/sha256:'"$(sha256sum <text | cut -d ' ' -f 1)/" config.json >signature.json
    sed 's/amd64/arm64/' config.json >arm64.json
    start() { layout=$1; mkdir -p "$layout/blobs/sha256"; echo '{"imageLayoutVersion":"1.0.0"}' >"$layout/oci-layout"; }
    app() { manifest config.json $C layer.tar $L ''; echo ',"annotations":{"org.opencontainers.image.ref.name":"app:1"}}'; }
    signature() { manifest signature.json $C text application/vnd.dev.cosign.simplesigning.v1+json ''; echo '}'; }
    sbom() { manifest empty application/vnd.oci.empty.v1+json text application/spdx+json ',"artifactType":"application/spdx+json"'; echo '}'; }
    other() { manifest arm64.json $C layer.tar $L ''; echo '}'; }
    gone() { echo '{"digest":"sha256:'"$(printf '0%.0s' {1..64})"'","size":3}'; }
    index() { printf '{"schemaVersion":2,"manifests":['; printf '%s' "$1"; shift; printf ',%s' "$@"; printf ']}'; }
    start beside; index "$(signature)" "$(app)" "$(sbom)" "$(other)" "$(gone)" >beside/index.json
    start only; index "$(signature)" "$(other)" >only/index.json
    start nested; index "$(signature)" "$(app | sed 's/,"annotations.*/}/')" >inner; blob inner
    printf '{"manifests":[{"digest":"sha256:%s","size":%s,"annotations":{"io.containerd.image.name":"docker.io/library/app:1"}}]}' "$sum" "$size" >nested/index.json
    start silent
    index "$(app | sed 's/,"annotations.*/}/')" "$(sbom | sed 's/}$/,"platform":{"os":"unknown","architecture":"unknown"}}/')" >inner; blob inner
    printf '{"manifests":[{"digest":"sha256:%s","size":%s,"annotations":{"io.containerd.image.name":"docker.io/library/app:1"}}]}' "$sum" "$size" >silent/index.json
"#;

#[test]
fn what_lies_beside_an_image_is_passed_over() {
    let (work, user) = (saved(), User::root());
    shell(LAYOUT, &[work.path()]);
    let path = |name: &str| work.path().join(name).display().to_string();
    for name in ["beside", "silent", "nested"] {
        let told = user.ok(&["load", &path(name)]);
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(
            (lines.len(), lines[1]),
            (2, "named app:1"),
            "{name}: {told}"
        );
        user.ok(&["rm", "app:1"]);
    }
    let (code, text) = user.fails(&["load", &path("only")]);
    assert_eq!((code, text.lines().count()), (2, 1), "{text}");
    assert!(
        text.contains("simplesigning") && text.contains("linux/arm64"),
        "{text}"
    );
    user.assert_empty();
}

#[test]
fn what_is_run_from_an_archive_takes_no_name() {
    use mayfly_image::{PullOptions, Quiet, Store};

    let (work, user) = (saved(), User::root());
    let archive = work.path().join("saved.tar").display().to_string();
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("file"), "genuine").unwrap();
    user.ok(&["import", &other.path().display().to_string(), "made:1"]);
    let store = Store::open(&user.store()).unwrap();
    let before = store.find("made:1").unwrap().unwrap().id;
    let run = store
        .obtain(&archive, &PullOptions::default(), &Quiet)
        .unwrap();
    assert_ne!(run.id, before);
    assert!(run.names.is_empty(), "{:?}", run.names);
    assert_eq!(store.find("made:1").unwrap().unwrap().id, before);
}

#[test]
fn a_folder_with_holes_is_imported_without_them() {
    let (work, user) = (tempfile::tempdir().unwrap(), User::root());
    shell(
        r#"cd "$1"; mkdir -p root/log; echo x >root/x; truncate -s 200M root/log/lastlog
        printf end >>root/log/lastlog"#,
        &[work.path()],
    );
    let root = work.path().join("root").display().to_string();
    let limited = |size: &str| {
        let script = "ulimit -f 65536; exec \"$@\"";
        let mut command = user.mayfly(&["import", &root, "sparse"]);
        let program = command.get_program().to_owned();
        let words: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        shell(
            "truncate -s \"$1\" \"$2/log/lastlog\"",
            &[Path::new(size), Path::new(&root)],
        );
        let mut limited = Command::new("bash");
        limited.args(["-euc", script, "-"]).arg(program).args(words);
        limited
            .env("HOME", user.home.path())
            .env_remove("XDG_DATA_HOME");
        command.stdin(Stdio::null());
        limited
    };
    run(&mut limited("200M"));
    assert!(user.fingerprint("sparse").contains("lastlog f 644"));
    let output = limited("70G").output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.contains("lastlog") && text.contains("64 GiB"),
        "{text}"
    );
    user.assert_tidy();
}

/// As a layer has it whose image has a user with a large number.
#[test]
fn a_large_file_of_zeroes_is_no_bomb() {
    let (work, user) = (tempfile::tempdir().unwrap(), User::root());
    shell(
        r#"cd "$1"; truncate -s 1040M lastlog; tar -c lastlog | gzip -1 >root.tar.gz"#,
        &[work.path()],
    );
    let archive = work.path().join("root.tar.gz").display().to_string();
    user.ok(&["import", &archive, "zeroes"]);
    let layers = user.layers("zeroes");
    assert!(fs::metadata(&layers[0]).unwrap().len() < 1 << 20);
}

#[test]
fn an_image_has_no_more_than_the_user_allows() {
    let (work, user) = (saved(), User::root());
    let archive = work.path().join("saved.tar").display().to_string();
    let (code, text) = user.fails(&["load", "--max-size", "4", &archive]);
    assert_eq!((code, text.lines().count()), (2, 1), "{text}");
    assert!(text.contains("more than 4 bytes"), "{text}");
    user.assert_empty();
    user.ok(&["load", "--max-size", "5", &archive]);
    // One that is far larger than its archive, where the user trusts it.
    shell(
        r#"cd "$1"; yes | head -c 1100M >big; tar -c big | zstd -q -1 >big.tar.zst; rm big"#,
        &[work.path()],
    );
    let archive = work.path().join("big.tar.zst").display().to_string();
    let (_, text) = user.fails(&["import", &archive, "big"]);
    assert!(text.contains("--max-size 64G"), "{text}");
    user.ok(&["import", "--max-size", "64G", &archive, "big"]);
}

/// What terminals obey, in all that an image says of itself.
#[test]
fn what_an_image_says_does_not_reach_the_terminal() {
    let (work, user) = (saved(), User::root());
    let path = |name: &str| work.path().join(name).display().to_string();
    shell(
        r#"cd "$1"
        sed -i 's|"cmd"|"labels":{"a":"\\u009b31m\\u007f\\u001b[2J"},"cmd"|' config.json
        tar -cf said.tar manifest.json config.json layer.tar
        sed -i 's|"amd64"|"\\u001b[2J\\u009b"|' config.json
        tar -cf other.tar manifest.json config.json layer.tar
        sed -i 's|"layer.tar"|"\\u001b[2J"|' manifest.json
        sed -i 's|"architecture":"[^"]*"|"architecture":"amd64"|' config.json
        tar -cf missing.tar manifest.json config.json"#,
        &[work.path()],
    );
    let harmless = |text: &str| !text.chars().any(|it| it.is_control() && it != '\n');
    user.ok(&["load", &path("said.tar")]);
    let told = user.ok(&["inspect", "made:1"]);
    assert!(
        harmless(&told) && told.contains("\\u009b31m\\u007f\\u001b[2J"),
        "{told}"
    );
    for name in ["other.tar", "missing.tar"] {
        let (_, text) = user.fails(&["load", &path(name)]);
        assert!(harmless(&text) && text.contains("?[2J"), "{text}");
    }
}
