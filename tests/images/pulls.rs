//! Pulls from a real registry.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use mayfly_testing::tools::run;
use mayfly_testing::until;

use crate::common::{Made, Registry, User, assert_same};

#[test]
fn an_image_is_pulled_by_root_and_others_in_all_compressions() {
    let made = Made::image(1);
    let expected = made.fingerprint();
    let registry = Registry::open();
    registry.push(&made, "a/gzip:1", &[]);
    registry.push(&made, "a/zstd:1", &["--dest-compress-format", "zstd"]);
    for user in [User::root(), User::nobody()] {
        for name in ["a/gzip:1", "a/zstd:1"] {
            let name = registry.name(name);
            let id = user.ok(&["pull", &name]);
            assert!(id.starts_with("sha256:"), "{id}");
            assert_same(&user.fingerprint(&name), &expected);
            assert!(
                user.ok(&["inspect", &name])
                    .contains("\"WorkingDir\": \"/tmp\"")
            );
            user.ok(&["rm", &name]);
            user.assert_empty();
        }
    }
    let user = User::root();
    let (code, text) = user.fails(&["pull", &registry.name("a/gzip:2")]);
    assert_eq!(code, 3);
    assert!(text.contains("no such image there"), "{text}");
    user.assert_empty();
    // By its manifest's digest, and no second time.
    user.ok(&["pull", &registry.name("a/gzip:1")]);
    let all: serde_json::Value =
        serde_json::from_str(&user.ok(&["inspect", &registry.name("a/gzip:1")])).unwrap();
    let pinned = all[0]["manifests"][0].as_str().unwrap().to_owned();
    user.ok(&["rm", &registry.name("a/gzip:1")]);
    user.ok(&["pull", &pinned]);
    let pulled = registry.log().matches("/blobs/sha256:").count();
    user.ok(&["pull", &pinned]);
    // Its configuration only.
    assert_eq!(registry.log().matches("/blobs/sha256:").count() - pulled, 1);
}

#[test]
fn a_closed_registry_wants_what_docker_knows() {
    let made = Made::image(1);
    let registry = Registry::closed();
    registry.push(&made, "a:1", &["--dest-creds", "me:secret"]);
    let user = User::root();
    let name = registry.name("a:1");
    assert!(user.fails(&["pull", &name]).1.contains("docker login"));
    let config = user.home.path().join(".docker/config.json");
    fs::create_dir(config.parent().unwrap()).unwrap();
    let host = registry.name("");
    let host = host.trim_end_matches('/');
    // me:wrong, me:secret
    for (auth, good) in [("bWU6d3Jvbmc=", false), ("bWU6c2VjcmV0", true)] {
        fs::write(
            &config,
            format!(r#"{{"auths":{{"{host}":{{"auth":"{auth}"}}}}}}"#),
        )
        .unwrap();
        match good {
            true => drop(user.ok(&["pull", &name])),
            false => assert!(user.fails(&["pull", &name]).1.contains("access denied")),
        }
    }
    // A helper, as Docker has them.
    user.ok(&["rm", &name]);
    let helper = user.home.path().join("docker-credential-test");
    fs::write(
        &helper,
        format!("#!/bin/sh\nread -r host\n[ \"$1 $host\" = 'get {host}' ] || exit 1\necho '{{\"Username\":\"me\",\"Secret\":\"secret\"}}'\n"),
    )
    .unwrap();
    run(std::process::Command::new("chmod").arg("755").arg(&helper));
    fs::write(&config, r#"{"credsStore":"test"}"#).unwrap();
    let path = format!(
        "{}:{}",
        user.home.path().display(),
        std::env::var("PATH").unwrap()
    );
    run(user.mayfly(&["pull", &name]).env("PATH", path));
}

#[test]
fn half_a_blob_is_gone_on_with_and_a_broken_half_is_not() {
    let made = Made::image(4);
    let registry = Registry::open();
    registry.push(&made, "a:1", &[]);
    let user = User::root();
    user.ok(&["ls"]);
    let mut blobs = registry.blobs(1 << 20);
    assert_eq!(blobs.len(), 2);
    let digest = |path: &std::path::Path| path.parent().unwrap().file_name().unwrap().to_owned();
    let good = blobs.pop().unwrap();
    let half = fs::read(&good).unwrap();
    fs::write(
        user.store().join("partial").join(digest(&good)),
        &half[..half.len() / 2],
    )
    .unwrap();
    let broken = blobs.pop().unwrap();
    fs::write(
        user.store().join("partial").join(digest(&broken)),
        vec![7; 1 << 20],
    )
    .unwrap();
    user.ok(&["pull", &registry.name("a:1")]);
    assert_same(
        &user.fingerprint(&registry.name("a:1")),
        &made.fingerprint(),
    );
    user.assert_tidy();
    // One for each: what follows was asked for only.
    wait_for_log(&registry, "\" 206 ", 2);
    let rest = (half.len() - half.len() / 2).to_string();
    assert!(
        registry
            .log()
            .lines()
            .any(|line| line.contains(&format!("\" 206 {rest} "))),
        "{}",
        registry.log()
    );
}

fn wait_for_log(registry: &Registry, text: &str, count: usize) {
    until(text, || registry.log().matches(text).count() >= count);
}

#[test]
fn a_registry_that_sends_something_else_is_not_believed() {
    let made = Made::image(2);
    let registry = Registry::open();
    registry.push(&made, "a:1", &[]);
    for blob in registry.blobs(1 << 20) {
        let mut data = fs::read(&blob).unwrap();
        data[1000] ^= 1;
        fs::write(&blob, data).unwrap();
    }
    let user = User::root();
    let (code, text) = user.fails(&["pull", &registry.name("a:1")]);
    assert_eq!(code, 3);
    assert!(text.contains("the registry sent sha256:"), "{text}");
    user.assert_empty();
}

#[test]
fn pulls_at_once_do_not_disturb_one_another() {
    let made = Made::image(8);
    let registry = Registry::open();
    registry.push(&made, "a:1", &[]);
    registry.push(&made, "b:1", &[]);
    let user = User::root();
    let names = [registry.name("a:1"), registry.name("b:1")];
    let start = |name: &str| {
        user.mayfly(&["pull", name])
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut pulls: Vec<_> = names
        .iter()
        .cycle()
        .take(4)
        .map(|name| start(name))
        .collect();
    while pulls
        .iter_mut()
        .any(|pull| pull.try_wait().unwrap().is_none())
    {
        user.ok(&["prune"]);
        user.ok(&["ls"]);
    }
    for mut pull in pulls {
        assert!(pull.wait().unwrap().success());
    }
    for name in &names {
        assert_same(&user.fingerprint(name), &made.fingerprint());
    }
    assert_eq!(user.files(&["layers"]).len(), 2);
    user.assert_tidy();
}

#[test]
fn a_pull_that_is_killed_anywhere_breaks_nothing_and_goes_on() {
    let made = Made::image(6);
    let expected = made.fingerprint();
    let registry = Registry::open();
    registry.push(&made, "a:1", &[]);
    let name = registry.name("a:1");
    let user = User::root();
    let start = Instant::now();
    user.ok(&["pull", &name]);
    let mut whole = start.elapsed();
    user.ok(&["rm", &name]);
    let mut random = std::process::id();
    let (mut killed, mut tries) = (0, 0);
    while killed < 10 && start.elapsed() < Duration::from_secs(25) {
        random = random.wrapping_mul(1_103_515_245).wrapping_add(12345);
        let share = f64::from((random >> 16) & 0xff) / 256.0;
        let begun = Instant::now();
        let mut pull = user
            .mayfly(&["pull", &name])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(whole.mul_f64(share));
        pull.kill().unwrap();
        let status = pull.wait().unwrap();
        killed += i32::from(status.signal() == Some(9));
        if status.success() {
            // The machine is less busy than it was.
            whole = whole.min(begun.elapsed());
        }
        // None, or a whole one.
        tries += 1;
        for id in user.ok(&["ls", "-q"]).lines() {
            assert_same(&user.fingerprint(id), &expected);
            user.ok(&["rm", id]);
        }
        if tries % 4 == 0 {
            user.ok(&["pull", &name]);
            assert_same(&user.fingerprint(&name), &expected);
            user.assert_tidy();
            user.ok(&["rm", &name]);
            user.assert_empty();
        }
    }
    assert!(
        killed > 3,
        "{killed} of {tries} were killed: too few to tell anything"
    );
    user.ok(&["pull", &name]);
    assert_same(&user.fingerprint(&name), &expected);
    user.assert_tidy();
}

#[test]
fn certificates_are_checked() {
    let made = Made::image(1);
    let registry = Registry::secure();
    registry.push(&made, "a:1", &[]);
    let user = User::root();
    let name = registry.name("a:1");
    let (code, text) = user.fails(&["pull", &name]);
    assert_eq!(code, 3);
    assert!(text.contains("certificate"), "{text}");
    let trusted = registry.folder.path().join("cert.pem");
    run(user.mayfly(&["pull", &name]).env("SSL_CERT_FILE", trusted));
    assert_same(&user.fingerprint(&name), &made.fingerprint());
}

#[test]
fn a_pull_onto_a_full_disk_is_gone_on_with() {
    let made = Made::image(4);
    let registry = Registry::open();
    registry.push(&made, "a:1", &[]);
    let user = User::root();
    let command = user.mayfly(&["ls"]);
    let script = r#"
        mkdir -p "$1/.local/share"
        mount -t tmpfs -o size=6m tmpfs "$1/.local/share"
        export HOME=$1
        ! "$2" image pull "$3" 2>"$1/why" || exit 10
        grep -qi 'no space' "$1/why" || { cat "$1/why" >&2; exit 11; }
        [ -z "$("$2" image ls -q)" ] || exit 12
        [ -z "$(find "$1/.local/share/mayfly/tmp" -mindepth 1)" ] || exit 13
        mount -o remount,size=64m "$1/.local/share"
        "$2" image pull "$3" >/dev/null
        cp -r "$1/.local/share/mayfly" "$1/copied"
    "#;
    let mut unshare = std::process::Command::new("unshare");
    unshare
        .args(["-m", "bash", "-euc", script, "-"])
        .arg(user.home.path());
    let name = registry.name("a:1");
    run(unshare.arg(command.get_program()).arg(&name));
    fs::create_dir_all(user.store().parent().unwrap()).unwrap();
    fs::rename(user.home.path().join("copied"), user.store()).unwrap();
    assert_same(&user.fingerprint(&name), &made.fingerprint());
    user.assert_tidy();
}
