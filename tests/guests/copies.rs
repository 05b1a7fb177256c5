//! `mayfly cp`: files between the host and a VM that runs.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use mayfly_testing::text;
use mayfly_testing::tools::{random_file, tool};
use mayfly_testing::user::{NOBODY, User};

fn start(user: &User) {
    user.text(&["run", "-d", "--name", "c", "demo", "sleep", "100000"]);
}

fn within(user: &User, script: &str) -> String {
    user.text(&["exec", "c", "sh", "-c", script])
}

/// Copies something, in a folder of the user's.
fn cp(user: &User, words: &[&str]) {
    let output = user
        .mayfly(&[&["cp"], words].concat())
        .current_dir(user.home.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    assert_eq!(text(&output.stderr), "", "{words:?}");
}

fn give(user: &User, path: &Path) {
    if user.plain {
        tool(
            "chown",
            &["-hR", &NOBODY.to_string(), path.to_str().unwrap()],
        );
    }
}

/// What `find` tells of a folder on either side: names, modes, sizes, what links lead to.
const LOOK: &str = "find . | sort | while read f; do \
                    if [ -L $f ]; then echo $f $(readlink $f); \
                    elif [ -d $f ]; then echo $f $(stat -c %a $f); \
                    else echo $f $(stat -c '%a %s %h %Y' $f) $(sha256sum < $f); fi; done";

fn go_both_ways(user: &User) {
    start(user);
    let home = user.home.path();
    let site = home.join("site");
    fs::create_dir_all(site.join("deep/er")).unwrap();
    random_file(&site.join("deep/random"), 3_000_001);
    fs::write(site.join("empty"), "").unwrap();
    fs::hard_link(site.join("empty"), site.join("deep/again")).unwrap();
    symlink("/etc/passwd", site.join("link")).unwrap();
    fs::set_permissions(site.join("empty"), Permissions::from_mode(0o640)).unwrap();
    fs::set_permissions(site.join("deep/er"), Permissions::from_mode(0o711)).unwrap();
    give(user, &site);
    let look = |folder: &Path| {
        let mut look = Command::new("sh");
        let output = look.args(["-c", LOOK]).current_dir(folder).output();
        text(&output.unwrap().stdout)
    };
    let expected = look(&site);
    assert_eq!(expected.lines().count(), 7, "{expected}");

    // A folder becomes DEST, goes into one that is there, or what is in it does.
    cp(user, &["site", "c:/srv"]);
    assert_eq!(within(user, &format!("cd /srv; {LOOK}")), expected);
    cp(user, &["site/", "c:srv/"]);
    assert_eq!(within(user, &format!("cd /srv/site; {LOOK}")), expected);
    within(user, "mkdir /www; chmod 700 /www");
    cp(user, &["./site/.", "c:/www"]);
    assert_eq!(
        within(user, &format!("cd /www; chmod 755 .; {LOOK}")),
        expected
    );
    // What is there in files' places goes; what is not stays.
    within(
        user,
        "cd /www; rm empty; ln -s /etc/passwd empty; echo more > more",
    );
    cp(user, &["./site/.", "c:/www"]);
    assert_eq!(
        within(
            user,
            "cat /www/more; wc -c < /www/empty; stat -c '%u %g' /www/deep"
        ),
        "more\n0\n0 0\n"
    );
    assert!(within(user, "cat /etc/passwd").starts_with("root:"));

    // And back.
    within(user, "rm /www/more");
    for (from, to, made) in [
        ("c:/www", "back", "back"),
        ("c:/www/.", "new", "new"),
        ("c:/www", "new", "new/www"),
    ] {
        cp(user, &[from, to]);
        let made = home.join(made);
        assert_eq!(look(&made), expected, "{to}");
        let owner = fs::symlink_metadata(made.join("link")).unwrap().uid();
        assert_eq!(owner, if user.plain { NOBODY } else { 0 });
    }

    // Files: into a folder, under another name, over another.
    within(
        user,
        "echo new > /one; chmod 4755 /one; chown 7:8 /one; ln -s one /two",
    );
    cp(user, &["c:/one", "back"]);
    cp(user, &["c:/one", "back/other"]);
    fs::write(home.join("target"), "precious").unwrap();
    symlink("../target", home.join("back/two")).unwrap();
    give(user, home);
    cp(user, &["-L", "c:/two", "back/fresh"]);
    cp(user, &["c:two", "back"]);
    for name in ["one", "other", "fresh"] {
        let path = home.join("back").join(name);
        assert_eq!(fs::read_to_string(&path).unwrap(), "new\n");
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o755);
    }
    assert_eq!(
        fs::read_link(home.join("back/two")).unwrap(),
        Path::new("one")
    );
    cp(user, &["-a", "c:/one", "owned"]);
    let meta = home.join("owned").metadata().unwrap();
    let expected = if user.plain { NOBODY } else { 7 };
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (expected, 0o755));
    cp(user, &["-a", "owned", "c:/owned"]);
    assert_eq!(within(user, "stat -c %u /owned"), format!("{expected}\n"));
    assert_eq!(fs::read_to_string(home.join("target")).unwrap(), "precious");
}

#[test]
fn files_go_both_ways() {
    go_both_ways(&User::root());
}

#[test]
fn an_ordinary_user_s_files_too() {
    go_both_ways(&User::plain());
}

#[test]
fn archives_go_through_pipes() {
    let user = User::root();
    start(&user);
    let home = user.home.path();
    within(
        &user,
        "mkdir -p /srv/a; cd /srv/a; echo in > file; chown 3:4 file; chmod 4755 file; mkfifo ../pipe",
    );
    let archive = home.join("out.tar");
    let mut command = user.mayfly(&["cp", "c:/srv", "-"]);
    let output = command
        .stdout(File::create(&archive).unwrap())
        .stderr(Stdio::piped())
        .output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
    let told = text(&output.stderr);
    assert!(told.contains("1 devices and named pipes"), "{output:?}");
    let archive = archive.to_str().unwrap();
    let mut listed: Vec<String> = tool("tar", &["--numeric-owner", "-tvf", archive])
        .lines()
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let name = words[words.len() - 1].trim_end_matches('/');
            format!("{} {} {name}", words[0], words[1])
        })
        .collect();
    listed.sort();
    let expected = [
        "-rwxr-xr-x 3/4 srv/a/file",
        "drwxr-xr-x 0/0 srv",
        "drwxr-xr-x 0/0 srv/a",
    ];
    assert_eq!(listed, expected);

    // The same again, and a pipe of the host's, plain and by gzip, with owners and without.
    let srv = home.join("srv");
    fs::create_dir(&srv).unwrap();
    tool("mkfifo", &[srv.join("pipe").to_str().unwrap()]);
    let folder = home.to_str().unwrap();
    tool("tar", &["-C", folder, "-rf", archive, "srv/pipe"]);
    tool("gzip", &["-k", archive]);
    let zipped = format!("{archive}.gz");
    within(&user, "mkdir /x /y");
    for (words, archive) in [
        (&["cp", "-a", "-", "c:/x"][..], archive),
        (&["cp", "-", "c:/y/"], zipped.as_str()),
    ] {
        let mut command = user.mayfly(words);
        let output = command
            .stdin(File::open(archive).unwrap())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    let script = "stat -c '%u %g' /x/srv/a/file /y/srv/a/file; cat /x/srv/a/file; [ -p /y/srv/pipe ] && echo pipe";
    assert_eq!(within(&user, script), "3 4\n0 0\nin\npipe\n");

    // More than the guest has room for ends soon.
    within(
        &user,
        "mkdir /small; mount -t tmpfs -o size=1M small /small",
    );
    let mut tar = Command::new("sh")
        .args([
            "-c",
            "truncate -s 64G \"$0/large\" && tar -C \"$0\" -c large",
        ])
        .arg(home)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = user
        .mayfly(&["cp", "-", "c:/small"])
        .stdin(tar.stdout.take().unwrap())
        .output();
    // The archive's other end is closed, too.
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(text(&output.stderr).contains("No space left"), "{output:?}");
    assert!(!tar.wait().unwrap().success());
    assert_eq!(within(&user, "ls /small"), "");
}

#[test]
fn what_cannot_be_copied_is_refused_or_stays() {
    let user = User::root();
    start(&user);
    let home = user.home.path();
    let out = home.join("out");
    fs::create_dir(&out).unwrap();
    let out = out.to_str().unwrap();
    for (from, to, reason) in [
        ("c:/none", out, "No such file"),
        ("c:/etc", "/etc/passwd", "is no folder"),
        ("c:/etc/passwd", "/dev/null", "neither a file nor a folder"),
        ("c:/etc/passwd", "/nowhere/x", "No such file"),
        ("c:/etc/passwd/", out, "Not a directory"),
        (out, "c:/etc/passwd", "is no folder"),
        ("/etc/passwd", "c:/none/", "no such folder"),
        ("/none", "c:/", "No such file"),
        ("c:/a", "d:/b", "to the host first"),
        ("/a", "/b", "VM:PATH"),
        ("d:/a", "/b", "no such VM"),
    ] {
        let output = user.output(&["cp", from, to]);
        assert!(!output.status.success(), "{from} {to}");
        assert!(
            text(&output.stderr).contains(reason),
            "{from} {to} {output:?}"
        );
    }
    // What a guest has that is nothing for a host, and links that lead out of it.
    let script = "mkdir -p /evil/dir; cd /evil; mknod null c 1 3; mkfifo pipe; ln -s /etc etc; \
                  echo x > suid; chmod 6755 suid; chmod 7777 dir; i=0; p=.; \
                  while [ $i -lt 40 ]; do p=$p/d; i=$((i+1)); done; mkdir -p $p";
    within(&user, script);
    let output = user.output(&["cp", "c:/evil", out]);
    assert!(output.status.success(), "{output:?}");
    assert!(
        text(&output.stderr).contains("2 devices and named pipes were left out"),
        "{output:?}"
    );
    let evil = Path::new(out).join("evil");
    let mode = |name: &str| evil.join(name).metadata().unwrap().mode() & 0o7777;
    assert_eq!((mode("suid"), mode("dir")), (0o755, 0o1777));
    assert!(!evil.join("null").exists() && !evil.join("pipe").exists());
    // A link of the host's own is not followed either.
    let within_home = home.join("own/evil");
    fs::create_dir_all(&within_home).unwrap();
    symlink(out, within_home.join("dir")).unwrap();
    let output = user.output(&["cp", "c:/evil", home.join("own").to_str().unwrap()]);
    assert!(text(&output.stderr).contains("no folder"), "{output:?}");
    // All of a guest's root: without what its kernel makes up.
    let status = user
        .mayfly(&["cp", "c:/", "-"])
        .stdout(File::create(home.join("root.tar")).unwrap())
        .status();
    assert!(status.unwrap().success());
    let listed = tool("tar", &["-tf", home.join("root.tar").to_str().unwrap()]);
    assert!(
        listed.contains("\netc/passwd\n") && listed.contains("\nproc\n"),
        "{listed}"
    );
    assert!(
        !listed.contains("\nproc/") && !listed.contains("\nsys/"),
        "{listed}"
    );

    user.text(&["stop", "-t", "0", "c"]);
    let ended = user.output(&["cp", "c:/etc/passwd", out]);
    assert_eq!(ended.status.code(), Some(2));
    assert!(text(&ended.stderr).contains("has ended"), "{ended:?}");
}
