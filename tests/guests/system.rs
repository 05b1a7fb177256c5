//! What programs expect of the system that they run on: how they are executed, who their
//! users are, the kernel's settings, files of the system, and what is kept of theirs.

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Output;

use mayfly_testing::user::User;
use mayfly_testing::{text, until};

use rustix::fs::{XattrFlags, getxattr, setxattr};

/// `cap_dac_read_search+ep`, as Linux keeps it.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const CAPABILITY_S: &str = "security.capability";
const NOTE: &str = "user.mayfly.note";

fn put(path: &Path, content: &[u8], mode: u32) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// A root folder with what images have of odd things.
fn image(user: &User) -> PathBuf {
    let root = user.home.path().join("image");
    let busybox = fs::read("/bin/busybox").unwrap();
    put(&root.join("bin/busybox"), &busybox, 0o755);
    for applet in [
        "sh", "sleep", "cat", "id", "stat", "grep", "hostname", "readlink", "truncate",
    ] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    let mut arm = b"\x7fELF\x02\x01\x01".to_vec();
    arm.resize(16, 0);
    arm.extend([2, 0, 183, 0]);
    arm.resize(64, 0);
    put(&root.join("empty"), b"", 0o755);
    put(&root.join("arm"), &arm, 0o755);
    put(&root.join("plain"), b"echo from-sh\n", 0o755);
    put(&root.join("dos"), b"#!/bin/sh\r\necho\r\n", 0o755);
    put(&root.join("opt/closed/twice"), b"", 0o644);
    put(
        &root.join("opt/open/twice"),
        b"#!/bin/sh\necho found\n",
        0o755,
    );
    let passwd =
        b"# users\nroot:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\r\n12:x:7:8::/h:\n\
                   few:x:70";
    put(&root.join("etc/passwd"), passwd, 0o644);
    put(
        &root.join("etc/group"),
        b"#log:x:1:web\nlog:x:50: web , few",
        0o644,
    );
    symlink("/nowhere/hosts", root.join("etc/hosts")).unwrap();
    put(&root.join("secret"), b"open sesame\n", 0o600);
    fs::create_dir(root.join("tmp")).unwrap();
    // A folder that becomes a volume.
    let program = root.join("data/cat");
    put(&program, &busybox, 0o755);
    setxattr(&program, CAPABILITY_S, &CAPABILITY, XattrFlags::empty()).unwrap();
    setxattr(&program, NOTE, b"kept", XattrFlags::empty()).unwrap();
    let hole = File::create(root.join("data/hole")).unwrap();
    hole.set_len(64 << 20).unwrap();
    hole.write_all_at(b"x", 32 << 20).unwrap();
    root
}

fn exec(user: &User, words: &[&str]) -> Output {
    user.output(&[&["exec"], words].concat())
}

fn within(user: &User, script: &str) -> String {
    user.text(&["exec", "s", "sh", "-c", script])
}

fn programs_are_executed_by_the_kernel(user: &User) {
    for (words, status, why) in [
        (
            &["/empty"][..],
            126,
            "mayfly: s: /empty: it is empty: Exec format error\n",
        ),
        (
            &["/arm"],
            126,
            "mayfly: s: /arm: it is for another CPU: Exec format error\n",
        ),
        (&["/plain"], 126, "mayfly: s: /plain: Exec format error\n"),
        (
            &["/dos"],
            127,
            "mayfly: s: /dos: its interpreter /bin/sh\\r is not in the image\n",
        ),
        (&["/etc"], 126, "mayfly: s: /etc: is a directory\n"),
        (
            &["/etc/passwd"],
            126,
            "mayfly: s: /etc/passwd: Permission denied\n",
        ),
        (&["nothere"], 127, "mayfly: s: nothere: not found\n"),
    ] {
        let output = exec(user, &[&["s"], words].concat());
        assert_eq!(output.status.code(), Some(status), "{words:?} {output:?}");
        assert_eq!(text(&output.stderr), why);
        assert_eq!(text(&output.stdout), "");
    }
    let path = "PATH=/nowhere:/etc/passwd:/opt/closed:/opt/open:/bin";
    assert_eq!(user.text(&["exec", "-e", path, "s", "twice"]), "found\n");
    let output = exec(user, &["-w", "/etc/passwd", "s", "id"]);
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(
        text(&output.stderr),
        "mayfly: s: /etc/passwd is no folder\n"
    );
}

fn users_are_those_of_the_image(user: &User) {
    let script = "id -u; id -g; id -G; echo $HOME";
    for (name, expected) in [
        ("web", "33 34 34 50 /srv"),
        ("33", "33 34 34 50 /srv"),
        ("web:log", "33 50 50 /srv"),
        ("12", "12 0 0 /"),
        ("few", "70 0 0 50 /"),
        ("1000:1001", "1000 1001 1001 /"),
    ] {
        let said = user.text(&["exec", "-u", name, "s", "sh", "-c", script]);
        let said: Vec<&str> = said.split_whitespace().collect();
        assert_eq!(said.join(" "), expected, "{name}");
    }
    for (name, why) in [
        ("nobody", "no user nobody in the image's /etc/passwd"),
        ("web:nobody", "no group nobody in the image's /etc/group"),
        (
            "4294967295",
            "4294967295 is not the number of a user or a group",
        ),
    ] {
        let output = exec(user, &["-u", name, "s", "id"]);
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        assert!(text(&output.stderr).contains(why), "{output:?}");
    }
}

fn the_kernel_is_set_for_one_image(user: &User) {
    let script = "cd /proc/sys; cat vm/max_map_count vm/swappiness net/ipv4/conf/lo/forwarding \
                  net/core/somaxconn fs/aio-max-nr kernel/pid_max; ulimit -n; ulimit -u; umask; \
                  grep -E '^Sig(Blk|Ign)' /proc/self/status; hostname; cat /etc/hosts; \
                  readlink /etc/mtab; cat /proc/self/fd/0 </dev/fd/0; echo x >/dev/stderr";
    let output = exec(user, &["s", "sh", "-c", script]);
    let expected = "1048576\n7\n1\n4096\n1048576\n4194304\n1048576\nunlimited\n0022\n\
                    SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\nbox.example\n\
                    127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
                    fe00::0\tip6-localnet\nff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\n\
                    ff02::2\tip6-allrouters\n127.0.1.1\tbox.example box\n/proc/mounts\n";
    assert_eq!(text(&output.stdout), expected);
    assert_eq!(text(&output.stderr), "x\n");
}

/// A volume that the image filled, and copies both ways, keep what a file has.
fn files_keep_what_they_have(user: &User) {
    let home = user.home.path();
    let sesame = "open sesame\n";
    let read = |program| user.text(&["exec", "-u", "1000", "s", program, "/secret"]);
    assert_eq!(read("/data/cat"), sesame);
    let blocks: u64 = within(user, "stat -c %b /data/hole")
        .trim()
        .parse()
        .unwrap();
    assert!(blocks < 1024, "{blocks}");

    let program = home.join("image/data/cat");
    user.text(&["cp", program.to_str().unwrap(), "s:/cat"]);
    assert_eq!(read("/cat"), sesame);
    let back = home.join("cat");
    user.text(&["cp", "s:/data/cat", back.to_str().unwrap()]);
    let mut value = [0; 64];
    let len = getxattr(&back, NOTE, &mut value).unwrap();
    assert_eq!(&value[..len], b"kept");
    // What lends rights stays with the guest.
    assert!(getxattr(&back, CAPABILITY_S, &mut value).is_err());

    let large = home.join("large");
    within(user, "truncate -s 8G /tmp/large; echo end >> /tmp/large");
    user.text(&["cp", "s:/tmp/large", large.to_str().unwrap()]);
    let meta = fs::metadata(&large).unwrap();
    assert_eq!(meta.len(), (8 << 30) + 4);
    assert!(meta.blocks() < 1024, "{}", meta.blocks());
    within(user, "truncate -s 0 /tmp/large");
    user.text(&["cp", large.to_str().unwrap(), "s:/tmp/again"]);
    let script = "stat -c %s /tmp/again; test $(stat -c %b /tmp/again) -lt 1024 && echo sparse";
    assert_eq!(
        within(user, script),
        format!("{}\nsparse\n", (8_u64 << 30) + 4)
    );

    // Files that do not say how long they are.
    let version = within(user, "cat /proc/version");
    let copy = home.join("version");
    user.text(&["cp", "s:/proc/version", copy.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(&copy).unwrap(), version);
    let archive = user.output(&["cp", "s:/proc/version", "-"]).stdout;
    let mut entries = tar::Archive::new(archive.as_slice());
    let mut entry = entries.entries().unwrap().next().unwrap().unwrap();
    let mut content = String::new();
    entry.read_to_string(&mut content).unwrap();
    assert_eq!(content, version);
}

#[test]
fn a_system_is_what_programs_expect() {
    let user = User::root();
    let image = image(&user);
    let main = "trap 'exit 3' 37; echo ready; while :; do sleep 1; done";
    let words = [
        "run",
        "-d",
        "--name",
        "s",
        "--net",
        "none",
        "-H",
        "box.example",
        "-v",
        "vol:/data",
        "--stop-signal",
        "SIGRTMIN+3",
        "--sysctl",
        "vm.swappiness=7",
        "--sysctl",
        "net/ipv4/conf/lo/forwarding=1",
    ];
    let rest = [image.to_str().unwrap(), "sh", "-c", main];
    user.text(&[&words[..], &rest].concat());
    programs_are_executed_by_the_kernel(&user);
    users_are_those_of_the_image(&user);
    the_kernel_is_set_for_one_image(&user);
    files_keep_what_they_have(&user);

    // What an exec leaves behind outlives it, and may write.
    let script = "(until [ -e /tmp/go ]; do sleep 0.1; done; echo late; echo later >&2; \
                  echo alive >/tmp/state) & echo started";
    assert!(within(&user, script).starts_with("started\n"));
    within(&user, "echo >/tmp/go");
    until("the one left behind writes", || {
        within(&user, "cat /tmp/state 2>/dev/null; true") == "alive\n"
    });

    until("the command has its trap", || {
        user.text(&["logs", "s"]) == "ready\n"
    });
    user.text(&["stop", "s"]);
    assert_eq!(user.output(&["wait", "s"]).stdout, b"3\n");
}

#[test]
fn a_start_takes_many_words_and_tells_what_it_refuses() {
    let user = User::root();
    let numbers: Vec<String> = (0..100_000).map(|number: u32| number.to_string()).collect();
    let mut words = vec![
        "run", "--rm", "--net", "none", "demo", "sh", "-c", "echo $#", "x",
    ];
    words.extend(numbers.iter().map(String::as_str));
    assert_eq!(user.text(&words), "100000\n");

    for (setting, why) in [
        (
            "vm.nothere=1",
            "--sysctl vm.nothere=1: the guest's kernel has no such setting\n",
        ),
        (
            "vm.swappiness=x",
            "--sysctl vm.swappiness=x: the guest's kernel refuses it: Invalid argument\n",
        ),
    ] {
        let words = [
            "run", "--rm", "--name", "s", "--net", "none", "--sysctl", setting, "demo", "true",
        ];
        let output = user.output(&words);
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        assert_eq!(text(&output.stderr), format!("mayfly: s: {why}"));
    }
}
