//! The store: who uses an image, names, removal, a full disk.

use std::path::Path;
use std::process::Command;

use mayfly::failure::Failure;
use mayfly_image::{PullOptions, Quiet, Store};

use mayfly_testing::tools::run;

use crate::common::{Made, User, assert_same, shell};

fn import(user: &User, name: &str, text: &str) -> String {
    let source = tempfile::tempdir().unwrap();
    std::fs::write(source.path().join("file"), text).unwrap();
    let id = user.ok(&["import", &source.path().display().to_string(), name]);
    id.lines().next().unwrap().to_owned()
}

#[test]
fn images_go_with_their_last_name_and_layers_with_their_last_image() {
    let user = User::root();
    let one = import(&user, "one", "1");
    import(&user, "two:2", "2");
    assert_eq!(user.files(&["layers"]).len(), 2);
    let listed = user.ok(&["ls"]);
    assert!(
        listed.contains("one:latest") && listed.contains("two:2"),
        "{listed}"
    );
    // By a unique start of its ID.
    let inspected = user.ok(&["inspect", &one["sha256:".len()..][..12]]);
    assert!(inspected.contains(&one), "{inspected}");
    assert!(user.ok(&["rm", "one"]).contains("removed sha256:"));
    assert_eq!(user.files(&["layers"]).len(), 1);
    assert!(user.fails(&["rm", "one"]).1.contains("no such image"));
    // A name that moves on leaves an image without one.
    import(&user, "two:2", "3");
    assert_eq!(user.ok(&["ls", "-q"]).lines().count(), 2);
    assert!(user.ok(&["prune"]).contains("removed sha256:"));
    assert_eq!(user.ok(&["ls", "-q"]).lines().count(), 1);
    assert_eq!(user.files(&["layers"]).len(), 1);
    user.assert_tidy();
}

#[test]
fn what_is_in_use_stays() {
    let user = User::root();
    import(&user, "used", "1");
    let store = Store::open(&user.store()).unwrap();
    let image = store.find("used").unwrap().unwrap();
    let (code, text) = user.fails(&["rm", "used"]);
    assert_eq!(code, 3);
    assert!(text.contains("uses the image"), "{text}");
    import(&user, "used", "2");
    user.ok(&["prune"]);
    assert!(image.layers.iter().all(|layer| layer.exists()));
    assert_eq!(user.ok(&["ls", "-q"]).lines().count(), 2);
    drop(image);
    user.ok(&["prune"]);
    assert_eq!(user.ok(&["ls", "-q"]).lines().count(), 1);
}

#[test]
fn a_folder_that_others_may_write_to_is_no_store() {
    let user = User::root();
    user.ok(&["ls"]);
    let mode = shell("stat -c %a \"$1\" \"$1\"/*/", &[&user.store()]);
    assert!(mode.lines().all(|mode| mode == "700"), "{mode}");
    run(Command::new("chmod").arg("777").arg(user.store()));
    assert!(user.fails(&["ls"]).1.contains("nobody else may write"));
}

#[test]
fn a_missing_tool_is_named() {
    let user = User::root();
    let source = tempfile::tempdir().unwrap();
    std::fs::write(source.path().join("x"), "x").unwrap();
    let source = source.path().display().to_string();
    let output = user
        .mayfly(&["import", &source, "x"])
        .env("PATH", "/nowhere")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("squashfs-tools"), "{text}");
    user.assert_empty();
}

#[test]
fn a_full_disk_leaves_nothing_half_made() {
    let user = User::root();
    let source = tempfile::tempdir().unwrap();
    let tar = source.path().join("big.tar");
    shell(
        "head -c 12M /dev/urandom >\"$1/big\"; tar -C \"$1\" -cf \"$2\" big",
        &[source.path(), &tar],
    );
    let command = user.mayfly(&["ls"]);
    let binary = Path::new(command.get_program()).to_owned();
    let script = r#"
        mkdir -p "$1/.local/share"
        mount -t tmpfs -o size=4m tmpfs "$1/.local/share"
        export HOME=$1
        mayfly=$2
        ! "$mayfly" image import "$3" big 2>"$1/why" || exit 10
        grep -qi 'no space' "$1/why" || { cat "$1/why" >&2; exit 11; }
        [ -z "$("$mayfly" image ls -q)" ] || exit 12
        [ -z "$(find "$1/.local/share/mayfly/tmp" "$1/.local/share/mayfly/layers" -mindepth 1)" ] || exit 13
        # Not a byte is left.
        head -c 100M /dev/zero >"$1/.local/share/fill" 2>/dev/null || true
        ! "$mayfly" image import "$4" small 2>"$1/why" || exit 14
        [ -z "$("$mayfly" image ls -q)" ] || exit 15
        rm "$1/.local/share/fill"
        mount -o remount,size=64m "$1/.local/share"
        "$mayfly" image import "$3" big >/dev/null
        [ "$("$mayfly" image ls -q | wc -l)" = 1 ] || exit 16
    "#;
    let small = source.path().join("small");
    std::fs::create_dir(&small).unwrap();
    std::fs::write(small.join("x"), "x").unwrap();
    let mut command = Command::new("unshare");
    command.args(["-m", "bash", "-euc", script, "-"]);
    run(command
        .arg(user.home.path())
        .arg(binary)
        .arg(tar)
        .arg(small));
}

#[test]
fn an_image_is_obtained_from_wherever_it_is() {
    let user = User::root();
    let store = Store::open(&user.store()).unwrap();
    let obtain = |text: &str| store.obtain(text, &PullOptions::default(), &Quiet);
    let id = import(&user, "here", "1");
    assert_eq!(obtain("here").unwrap().id.to_string(), id);
    let made = Made::image(1);
    made.copy(
        &[],
        &format!("docker-archive:{}:a:1", made.path("a.tar").display()),
    );
    let layout = obtain(&made.path("oci").display().to_string()).unwrap();
    let archive = obtain(&made.path("a.tar").display().to_string()).unwrap();
    assert_eq!(layout.id, archive.id);
    assert_same(
        &user.fingerprint(&layout.id.to_string()),
        &made.fingerprint(),
    );
    let folder = obtain(&made.path("bundle/rootfs").display().to_string()).unwrap();
    assert_eq!(folder.layers.len(), 1);
    assert_same(
        &user.fingerprint(&folder.id.to_string()),
        &made.fingerprint(),
    );
    let refused = Failure::from(obtain("/nowhere/at/all").unwrap_err()).to_string();
    assert!(refused.contains("No such file"), "{refused}");
}

#[test]
fn what_a_killed_process_left_is_swept() {
    let user = User::root();
    user.ok(&["ls"]);
    let left = ["scratch-a1b2c3", "tmp/.tmpa1b2c3"].map(|name| user.store().join(name));
    for path in &left {
        std::fs::write(path, "left").unwrap();
    }
    user.ok(&["ls"]);
    assert!(left.iter().all(|path| !path.exists()));
}
