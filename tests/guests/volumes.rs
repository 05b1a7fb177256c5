//! Volumes of `mayfly run`: folders through a real virtiofsd, disks, named volumes.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use mayfly_testing::processes::{self, Process, descendants, kill};
use mayfly_testing::user::{NOBODY, User};
use mayfly_testing::{text, until};

/// A folder of the user's with a file in it.
fn folder(user: &User) -> PathBuf {
    let folder = user.home.path().join("a, folder");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("in"), "of the host\n").unwrap();
    for path in [&folder, &folder.join("in")] {
        if user.plain {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }
    folder
}

fn volume(source: &Path, rest: &str) -> String {
    format!("{}:{rest}", source.display())
}

/// What works for a VM is bounded with it: also what virtiofsd and passt start themselves.
fn share_a_group(supervisor: u32) {
    let name = format!("/mayfly-{supervisor}");
    let mut seen = String::new();
    for pid in descendants(supervisor).into_iter().skip(1) {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
        let (program, groups) = (read("comm"), read("cgroup"));
        let bounded = groups.lines().any(|line| line.ends_with(&name));
        assert!(bounded, "{program}: {groups}");
        seen += &program;
    }
    for program in ["virtiofsd", "passt", "mayfly"] {
        assert!(seen.contains(program), "{program}: {seen}");
    }
}

fn shared_by(user: &User) {
    let folder = folder(user);
    let script = "cat /in/it/in && stat -c %u /in/it/in && echo of the guest > /in/it/out && \
                  mkdir /in/it/more && mv /in/it/out /in/it/more/out && echo waiting > /in/it/ready; \
                  until [ -e /in/it/go ]; do sleep 0.2; done; cat /in/it/go; \
                  dd if=/dev/urandom of=/in/it/big bs=64k count=64 2>/dev/null; \
                  sha256sum < /in/it/big; test -e /tmp/own";
    let words = ["run", "--rm", "--tmpfs", "/tmp", "--tmpfs", "/in"];
    let wish = volume(&folder, "/in/it");
    let rest = ["-v", &wish, "demo", "sh", "-c", script];
    let child = user.mayfly(&[&words[..], &rest].concat()).spawn().unwrap();
    until("the guest writes", || folder.join("ready").exists());
    let written = folder.join("more/out");
    assert_eq!(fs::read_to_string(&written).unwrap(), "of the guest\n");
    if !user.plain {
        share_a_group(child.id());
    }
    // The guest's root is the user.
    let owner = if user.plain { NOBODY } else { 0 };
    assert_eq!(fs::metadata(&written).unwrap().uid(), owner);
    fs::write(folder.join(".go"), "of the host, later\n").unwrap();
    if user.plain {
        chown(folder.join(".go"), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    fs::rename(folder.join(".go"), folder.join("go")).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let sum = Command::new("sha256sum")
        .stdin(fs::File::open(folder.join("big")).unwrap())
        .output()
        .unwrap();
    assert_eq!(
        text(&output.stdout),
        format!("of the host\n0\nof the host, later\n{}", text(&sum.stdout))
    );
    assert_eq!(text(&output.stderr), "");
    assert_eq!(fs::metadata(folder.join("big")).unwrap().len(), 4 << 20);
}

#[test]
fn a_folder_is_written_on_both_sides() {
    shared_by(&User::root());
}

#[test]
fn an_ordinary_user_s_folder_too() {
    shared_by(&User::plain());
}

#[test]
fn read_only_is_so_for_a_guest_that_remounts() {
    for user in [User::root(), User::plain()] {
        let folder = folder(&user);
        let script = "cd /it; touch x 2>/dev/null || echo refused; \
                      mount -o remount,rw /it && grep -c ' /it virtiofs rw' /proc/mounts; \
                      touch x 2>/dev/null || echo refused; echo x 2>/dev/null > in || echo refused; \
                      rm -f in 2>/dev/null || echo refused; chmod 0 in 2>/dev/null || echo refused; \
                      mkdir /other; mount -t virtiofs v0 /other; \
                      touch /other/x 2>/dev/null || echo refused; cat in";
        let wish = volume(&folder, "/it:ro");
        let output = user.text(&["run", "--rm", "-v", &wish, "demo", "sh", "-c", script]);
        let refused = "refused\n";
        let expected = format!("{refused}1\n{}of the host\n", refused.repeat(5));
        assert_eq!(output, expected);
        let names = fs::read_dir(&folder).unwrap().count();
        assert_eq!(names, 1);
        assert_eq!(
            fs::read_to_string(folder.join("in")).unwrap(),
            "of the host\n"
        );
    }
}

/// Nothing that a guest makes in a folder gives others on the host its owner's rights.
fn is_harmless(user: &User) {
    let folder = folder(user);
    let tool = folder.join("tool");
    fs::write(&tool, "of the host\n").unwrap();
    if user.plain {
        chown(&tool, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o6755)).unwrap();
    // A name, a way to make it dangerous, and what is said of that.
    let script = r#"
        cd /it
        try() { "$@" 2>/dev/null && echo "made: $*"; }
        cp /bin/busybox a && try chmod 4755 a; try chmod u+s a; try chmod 2755 a; try chmod 7777 a
        cp /bin/busybox /tmp/suid && chmod 4755 /tmp/suid && cp -p /tmp/suid b 2>/dev/null
        try mknod zero c 1 5; try mknod disk b 254 0
        mkdir dir && try chmod 2775 dir
        mkfifo pipe && echo a pipe; ln -s /etc link && echo a link
        chmod 1777 dir && chmod 755 a && chown 12:34 a 2>/dev/null
        echo of the guest >tool; echo done"#;
    let wish = volume(&folder, "/it");
    let words = [
        "run", "--rm", "--net", "none", "-v", &wish, "demo", "sh", "-c", script,
    ];
    let output = user.mayfly(&words).output().unwrap();
    assert_eq!(text(&output.stdout), "a pipe\na link\ndone\n", "{output:?}");
    assert_eq!(fs::read_to_string(&tool).unwrap(), "of the guest\n");
    let mut seen = 0;
    for entry in fs::read_dir(&folder).unwrap().flatten() {
        let about = fs::symlink_metadata(entry.path()).unwrap();
        let (mode, kind) = (about.mode(), about.file_type());
        assert_eq!(mode & 0o6000, 0, "{:?}: {mode:o}", entry.path());
        assert!(
            !kind.is_char_device() && !kind.is_block_device(),
            "{:?}",
            entry.path()
        );
        seen += 1;
    }
    // What was there, a program, a folder, a pipe and a link. The copy with a set-user-ID bit
    // was not begun.
    assert_eq!(seen, 6);
    let owner = fs::metadata(folder.join("a")).unwrap().uid();
    assert_eq!(owner, if user.plain { NOBODY } else { 12 });
}

#[test]
fn nothing_dangerous_lands_in_a_folder() {
    is_harmless(&User::root());
}

#[test]
fn nor_in_an_ordinary_user_s() {
    is_harmless(&User::plain());
}

#[test]
fn a_file_is_a_disk() {
    let user = User::root();
    let disk = user.home.path().join("disk.img");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let e2fs = |words: &[&str]| {
        let output = Command::new(words[0])
            .args(&words[1..])
            .arg(&disk)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output()
            .unwrap();
        assert!(output.status.success(), "{words:?} {output:?}");
        text(&output.stdout)
    };
    e2fs(&["mkfs.ext4", "-q", "-F"]);
    let wish = volume(&disk, "/data");
    let script = "dd if=/dev/zero of=/data/big bs=1M count=20 2>/dev/null; echo kept > /data/it; \
                  exec sleep 1000 < /data/it &";
    user.text(&[
        "run",
        "--rm",
        "--disk-size",
        "64M",
        "-v",
        &wish,
        "demo",
        "sh",
        "-c",
        script,
    ]);
    // It was unmounted.
    e2fs(&["e2fsck", "-f", "-n"]);
    assert!(!e2fs(&["dumpe2fs", "-h"]).contains("needs_recovery"));
    assert_eq!(e2fs(&["debugfs", "-R", "cat /it"]), "kept\n");
    let script = "cat /data/it; touch /data/x 2>/dev/null || echo refused; \
                  mount -o remount,rw /data 2>/dev/null || echo refused";
    let wish = volume(&disk, "/data:ro");
    let output = user.text(&["run", "--rm", "-v", &wish, "demo", "sh", "-c", script]);
    assert_eq!(output, "kept\nrefused\nrefused\n");
}

#[test]
fn a_named_volume_outlives_its_machines() {
    let user = User::plain();
    let run = |script: &str| {
        user.text(&[
            "run",
            "--rm",
            "-v",
            "data:/data",
            "demo",
            "sh",
            "-c",
            script,
        ])
    };
    assert_eq!(run("ls -a /data | wc -l; echo one > /data/it"), "2\n");
    assert_eq!(run("cat /data/it; echo two >> /data/it"), "one\n");
    assert_eq!(
        user.text(&["volume", "create", "more", "--size", "64M"]),
        "more\n"
    );
    assert_eq!(user.text(&["volume", "ls", "-q"]), "data\nmore\n");
    let script = "cat /data/it; df -m /more | tail -n 1";
    let words = [
        "run",
        "--rm",
        "-v",
        "more:/more",
        "-v",
        "data:/data:ro",
        "demo",
        "sh",
        "-c",
        script,
    ];
    let output = user.text(&words);
    assert!(output.starts_with("one\ntwo\n/dev/vdb "), "{output}");

    let mut child = user.mayfly(&["run", "--rm", "-i", "-v", "data:/data", "demo", "cat"]);
    let mut child = child.stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    writeln!(input, "runs").unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "runs\n");
    for (words, status, reason) in [
        (&["volume", "rm", "data"][..], 2, "a VM uses it"),
        (
            &["run", "--rm", "-v", "data:/x", "demo", "true"],
            125,
            "is locked",
        ),
        (&["volume", "create", "more"], 2, "there is one"),
    ] {
        let output = user.output(words);
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        assert!(text(&output.stderr).contains(reason), "{output:?}");
    }
    drop(input);
    assert!(child.wait().unwrap().success());
    user.text(&["volume", "rm", "data", "more"]);
    assert_eq!(user.text(&["volume", "ls", "-q"]), "");
}

#[test]
fn volumes_begin_with_what_the_image_has() {
    let user = User::root();
    let root = user.home.path().join("root");
    for folder in ["bin", "data/deep", "proc", "dev", "sys", "tmp"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    let busybox = ["/usr/bin/busybox", "/bin/busybox"]
        .into_iter()
        .find(|it| Path::new(it).exists());
    fs::copy(busybox.unwrap(), root.join("bin/sh")).unwrap();
    for name in ["cat", "ls", "rm", "stat", "touch"] {
        symlink("sh", root.join("bin").join(name)).unwrap();
    }
    fs::write(root.join("data/deep/file"), "of the image\n").unwrap();
    chown(root.join("data/deep/file"), Some(33), Some(34)).unwrap();
    chown(root.join("data"), Some(33), None).unwrap();
    fs::set_permissions(root.join("data"), fs::Permissions::from_mode(0o750)).unwrap();
    let root = root.to_str().unwrap();
    user.text(&[
        "image",
        "import",
        root,
        "own",
        "--volume",
        "/data",
        "--entrypoint",
        "[\"/bin/sh\", \"-c\"]",
    ]);
    let run = |words: &[&str], script: &str| {
        user.text(&[&["run", "--rm"], words, &["own", script]].concat())
    };

    // A named one: filled once, and as it was left from then on.
    let look = "cat /data/deep/file; stat -c '%u %g' /data/deep/file; stat -c '%u %a' /data";
    let expected = "of the image\n33 34\n33 750\n";
    let script = format!("{look}; rm -r /data/deep; echo kept > /data/it");
    assert_eq!(run(&["-v", "named:/data"], &script), expected);
    assert_eq!(
        run(&["-v", "named:/data"], "ls /data; cat /data/it"),
        "it\nkept\n"
    );

    // The image's own and one without a name are fresh ones each time, and can be
    // written to though nothing else can.
    let script = format!(
        "{look}; echo x > /data/it; echo y > /more/it; ls /data /more; touch /z 2>/dev/null || echo refused"
    );
    let words = ["--read-only", "-v", "/more"];
    for _ in 0..2 {
        let expected = format!("{expected}/data:\ndeep\nit\n\n/more:\nit\nrefused\n");
        assert_eq!(run(&words, &script), expected);
    }
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let user = User::root();
    let missing = user.home.path().join("missing");
    let (missing_wish, file) = (volume(&missing, "/x"), "/etc/passwd:/x");
    for (wish, reason) in [
        (missing_wish.as_str(), "mkdir -p"),
        (file, "share its folder"),
        ("a/b:/x", "begins with / or ./"),
        ("data", "FOLDER:DIR"),
        ("/tmp:/", "below /"),
    ] {
        let output = user.output(&["run", "-v", wish, "demo", "true"]);
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        assert!(text(&output.stderr).contains(reason), "{output:?}");
    }
    assert!(!missing.exists());
    assert_eq!(user.text(&["ps", "-a", "-q"]), "");
}

/// The virtiofsds that run, of those with a parent or in a group.
fn virtiofsds(is: impl Fn(&Process) -> bool) -> Vec<u32> {
    let all = processes::all().into_iter();
    all.filter(|it| !it.zombie && it.name.contains("virtiofsd") && is(it))
        .map(|it| it.pid)
        .collect()
}

/// A machine with a folder whose command answers lines, and its virtiofsd.
fn answering(user: &User) -> (Child, BufReader<std::process::ChildStdout>, u32) {
    let wish = volume(&folder(user), "/it");
    // Nothing is asked of virtiofsd any more when it has said so.
    let script = "cat /it/in; echo ready; while read line; do echo $line; done";
    let words = [
        "run", "--rm", "-i", "--name", "it", "-v", &wish, "demo", "sh", "-c", script,
    ];
    let mut child = user.mayfly(&words).stdin(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    for said in ["of the host\n", "ready\n"] {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        if line != said {
            let ended = child.wait_with_output().unwrap();
            panic!("{line:?} instead of {said:?}: {ended:?}");
        }
    }
    let own = child.id();
    let all = virtiofsds(|it| it.parent == own);
    let [virtiofsd] = all[..] else {
        panic!("{all:?}")
    };
    (child, output, virtiofsd)
}

#[test]
fn a_machine_goes_on_without_its_virtiofsd() {
    let user = User::root();
    let (mut child, mut output, virtiofsd) = answering(&user);
    kill(virtiofsd, libc::SIGKILL);
    until("all of it ends", || {
        virtiofsds(|it| it.group == virtiofsd).is_empty()
    });
    let mut input = child.stdin.take().unwrap();
    writeln!(input, "still here").unwrap();
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "still here\n");
    assert_eq!(
        user.text(&["exec", "it", "echo", "reachable"]),
        "reachable\n"
    );
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let errors = text(&output.stderr);
    assert_eq!(
        errors.matches("the backend has ended").count(),
        1,
        "{errors}"
    );
}

#[test]
fn no_virtiofsd_outlives_its_machine() {
    let user = User::root();
    let (mut child, _output, virtiofsd) = answering(&user);
    assert!(!virtiofsds(|it| it.group == virtiofsd).is_empty());
    kill(child.id(), libc::SIGKILL);
    child.wait().unwrap();
    until("virtiofsd ends", || {
        virtiofsds(|it| it.group == virtiofsd).is_empty()
    });
}
