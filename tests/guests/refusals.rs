//! Bad input: one clear line, the right exit code, nothing touched.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};

use mayfly_testing::guest::prepared;
use mayfly_testing::tools::tool;
use mayfly_testing::{kernel, mayfly};

const CONFIG: i32 = 2;
const HOST: i32 = 3;

fn boot(args: &[&str]) -> Output {
    Command::new(mayfly())
        .arg("boot")
        .args(args)
        .env("MAYFLY_CACHE", "/nonexistent")
        .output()
        .unwrap()
}

/// Exactly one line, with all of the parts.
fn assert_refusal(output: &Output, code: i32, parts: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("mayfly: "), "{text}");
    for part in parts {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(output.stdout.is_empty(), "{output:?}");
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn file(&self, name: &str, data: &[u8]) -> String {
        fs::write(self.path(name), data).unwrap();
        self.path(name)
    }
}

#[test]
fn kernels_that_are_none() {
    let folder = Folder::new();
    let whole = fs::read(kernel("cloud-6.12", "vmlinux")).unwrap();
    let image = fs::read(kernel("cloud-6.12", "vmlinuz")).unwrap();
    for (file, code, part) in [
        (folder.file("empty", b""), CONFIG, "not a kernel"),
        (
            folder.file("text", &b"#!/bin/sh\n".repeat(1000)),
            CONFIG,
            "not a kernel",
        ),
        (
            folder.file("cut-elf", &whole[..1 << 20]),
            CONFIG,
            "truncated",
        ),
        (folder.file("cut-header", &whole[..40]), CONFIG, "truncated"),
        (
            folder.file("cut-bzimage", &image[..1 << 20]),
            CONFIG,
            "truncated",
        ),
        (folder.path("missing"), CONFIG, "no such file"),
        (folder.path("."), CONFIG, "is a directory"),
        ("/dev/null".to_owned(), CONFIG, "not a regular file"),
    ] {
        let flag = format!("--kernel {file}");
        assert_refusal(&boot(&["--kernel", &file]), code, &[&flag, part]);
    }
    assert_refusal(
        &boot(&["--kernel", "/bin/true"]),
        CONFIG,
        &["--kernel /bin/true", "ELF"],
    );
}

#[test]
fn initial_ram_disks_that_are_none() {
    let folder = Folder::new();
    let vmlinux = kernel("cloud-6.12", "vmlinux");
    let vmlinux = vmlinux.to_str().unwrap();
    let large = folder.path("large");
    fs::write(&large, [0x1f, 0x8b]).unwrap();
    let grow = File::options().write(true).open(&large).unwrap();
    grow.set_len(600 << 20).unwrap();
    for (file, part) in [
        (folder.file("empty", b""), "empty"),
        (folder.path("missing"), "no such file"),
        (folder.path("."), "is a directory"),
        (large, "more memory"),
        (
            folder.file("cut", &prepared("cloud-6.12.cpio")[..100_000]),
            "truncated",
        ),
        (
            folder.file("text", b"this is no archive"),
            "not an initial RAM disk",
        ),
    ] {
        let flag = format!("--initrd {file}");
        let output = boot(&["--kernel", vmlinux, "--initrd", &file]);
        assert_refusal(&output, CONFIG, &[&flag, part]);
    }
}

#[test]
fn numbers_that_cannot_be() {
    let vmlinux = kernel("cloud-6.12", "vmlinux");
    let vmlinux = vmlinux.to_str().unwrap();
    for (flag, value) in [
        ("--memory", "0"),
        ("--memory", "lots"),
        ("--memory", "16M"),
        ("--memory", "-1"),
        ("--memory", "1000T"),
        ("--memory", "99999999999999999999"),
        ("--cpus", "0"),
        ("--cpus", "33"),
        ("--cpus", "two"),
    ] {
        let output = boot(&["--kernel", vmlinux, flag, value]);
        assert_refusal(&output, CONFIG, &[&format!("{flag} {value}")]);
    }
    // Enough for a VM, too little for this kernel.
    let output = boot(&["--kernel", vmlinux, "--memory", "32M"]);
    assert_refusal(&output, CONFIG, &["--memory 32M", "more memory"]);
}

#[test]
fn devices_that_are_not_there() {
    let folder = Folder::new();
    let vmlinux = kernel("cloud-6.12", "vmlinux");
    let vmlinux = vmlinux.to_str().unwrap();
    let image = folder.file("image", &[0; 1024]);
    for (flag, value, code, part) in [
        (
            "--disk",
            format!("path={}", folder.path("missing")),
            CONFIG,
            "no such file",
        ),
        (
            "--disk",
            format!("path={}", folder.path(".")),
            CONFIG,
            "is a directory",
        ),
        ("--disk", "path=/dev/null".to_owned(), CONFIG, "neither"),
        (
            "--disk",
            format!("path={}", folder.file("tiny", b"x")),
            CONFIG,
            "sector",
        ),
        (
            "--disk",
            format!("path={image},cache=none"),
            CONFIG,
            "cache",
        ),
        ("--disk", image.clone(), CONFIG, "path=F"),
        (
            "--net",
            "tap=mayfly-none".to_owned(),
            CONFIG,
            "no such device",
        ),
        ("--net", "tap=lo".to_owned(), CONFIG, "not a TAP"),
        ("--net", "bridge=br0".to_owned(), CONFIG, "tap=NAME"),
        ("--console", "tty".to_owned(), CONFIG, "stdio"),
        (
            "--console",
            format!("file={}", folder.path("no/log")),
            CONFIG,
            "does not exist",
        ),
        (
            "--console",
            format!("unix={image}"),
            CONFIG,
            "exists already",
        ),
        ("--console", "none,virtio".to_owned(), CONFIG, "no device"),
        ("--channel", "name=a".to_owned(), CONFIG, "unix=S"),
        ("--channel", "name=a/b,pty".to_owned(), CONFIG, "letters"),
        (
            "--channel",
            format!("name=a,unix={}", folder.path("no/s")),
            CONFIG,
            "does not exist",
        ),
        ("--balloon", "on".to_owned(), CONFIG, "write 512M"),
        ("--balloon", "512M".to_owned(), CONFIG, "not smaller"),
        ("--pidfile", folder.path("."), CONFIG, "is a directory"),
    ] {
        let output = boot(&["--kernel", vmlinux, flag, &value]);
        assert_refusal(&output, code, &[flag, part]);
    }
    let output = boot(&[
        "--kernel",
        vmlinux,
        "--disk",
        &format!("path={image}"),
        "--disk",
        &format!("path={image}"),
    ]);
    assert_refusal(&output, CONFIG, &["--disk", "given twice"]);
    assert_eq!(fs::read(&image).unwrap(), [0; 1024]);
}

#[test]
fn unknown_flags_and_no_kernel() {
    let output = boot(&["--colour", "blue"]);
    assert_eq!(output.status.code(), Some(CONFIG));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--colour"));
    // In a namespace where the host's own kernel is out of sight, and the tools that would
    // fetch one.
    let script = "mount -t tmpfs none /boot && \
                  { [ ! -d /lib/modules ] || mount -t tmpfs none /lib/modules; } && \
                  PATH=/nowhere exec \"$0\" boot";
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(mayfly())
        .env("MAYFLY_CACHE", "/nonexistent")
        .output()
        .unwrap();
    assert_refusal(&output, CONFIG, &["--kernel", "mayfly guest make"]);
    assert!(!Path::new("/nonexistent").exists());
}

/// Runs mayfly in a mount namespace that a shell has prepared, as an ordinary user.
fn boot_in(prepare: &str, user: bool, args: &[&str]) -> Output {
    let become_user = if user {
        "exec setpriv --reuid 65534 --regid 65534 --clear-groups"
    } else {
        "exec"
    };
    Command::new("unshare")
        .args([
            "--mount",
            "sh",
            "-c",
            &format!("set -e; {prepare}; {become_user} \"$@\""),
        ])
        .arg("sh")
        .arg(mayfly())
        .arg("boot")
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn a_host_that_refuses() {
    let folder = Folder::new();
    tool("chmod", &["755", &folder.path(".")]);
    let vmlinux = kernel("cloud-6.12", "vmlinux");
    let own = folder.path("vmlinux");
    fs::copy(&vmlinux, &own).unwrap();
    tool("chmod", &["644", &own]);
    let node = folder.path("kvm");
    let secret = folder.file("secret", &[0; 1024]);
    tool("chmod", &["600", &secret]);
    let pidfile = folder.path("pid");
    let disk = format!("path={secret}");

    let missing = "mount -t tmpfs none /dev && mknod -m 666 /dev/urandom c 1 9";
    let output = boot_in(missing, false, &["--kernel", &own, "--pidfile", &pidfile]);
    assert_refusal(
        &output,
        HOST,
        &["/dev/kvm does not exist", "load the module"],
    );

    let forbidden = format!("mknod -m 600 {node} c 10 232; mount --bind {node} /dev/kvm");
    let output = boot_in(&forbidden, true, &["--kernel", &own]);
    assert_refusal(&output, HOST, &["no permission on /dev/kvm", "group"]);

    let other = "mount --bind /dev/null /dev/kvm";
    let output = boot_in(other, false, &["--kernel", &own]);
    assert_eq!(output.status.code(), Some(HOST), "{output:?}");

    let output = boot_in("true", true, &["--kernel", &own, "--disk", &disk]);
    assert_refusal(&output, HOST, &["--disk", "no permission"]);
    let output = boot_in("true", true, &["--kernel", &secret]);
    assert_refusal(&output, HOST, &["--kernel", "no permission"]);
    let output = boot_in("true", true, &["--kernel", &own, "--pidfile", "/root-pid"]);
    assert_refusal(&output, HOST, &["--pidfile", "no permission"]);

    assert!(!Path::new(&pidfile).exists());
}

#[test]
fn a_failed_start_touches_nothing() {
    let folder = Folder::new();
    let log = folder.path("log");
    let pidfile = folder.path("pid");
    let kept = folder.file("kept", b"of before");
    for console in [
        format!("file={log}"),
        format!("file={kept}"),
        format!("unix={log}"),
    ] {
        let output = boot(&[
            "--kernel",
            "/bin/true",
            "--console",
            &console,
            "--pidfile",
            &pidfile,
        ]);
        assert_eq!(output.status.code(), Some(CONFIG), "{output:?}");
    }
    assert!(!Path::new(&log).exists() && !Path::new(&pidfile).exists());
    assert_eq!(fs::read(&kept).unwrap(), b"of before");
}

#[test]
fn a_pidfile_of_a_vm_that_runs() {
    let folder = Folder::new();
    let pidfile = folder.path("pid");
    let mut first = mayfly_testing::guest::Guest::new("echo ready; sleep 1000")
        .args(["--pidfile", &pidfile])
        .start();
    first.expect("ready");
    let vmlinux = kernel("cloud-6.12", "vmlinux");
    let output = boot(&["--kernel", vmlinux.to_str().unwrap(), "--pidfile", &pidfile]);
    assert_refusal(&output, HOST, &["--pidfile", "another VM"]);
    let pid = fs::read_to_string(&pidfile).unwrap();
    assert_eq!(pid.trim(), first.child.id().to_string());
}

#[test]
fn doctor_tells_what_this_host_can_do() {
    let run = |args: &[&str]| {
        let output = Command::new(mayfly())
            .arg("doctor")
            .args(args)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let checks: serde_json::Value = serde_json::from_str(&run(&["--json"])).unwrap();
    let names: Vec<&str> = checks
        .as_array()
        .unwrap()
        .iter()
        .map(|check| check["name"].as_str().unwrap())
        .collect();
    for name in [
        "/dev/kvm",
        "KVM backend",
        "io_uring",
        "TAP",
        "user namespace",
        "seccomp",
        "cgroup",
        "memory",
        "guest kernel",
    ] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
        assert!(run(&[]).contains(name));
    }
    assert_eq!(run(&["--can-boot"]), "");
    let output = Command::new("unshare")
        .args([
            "--mount",
            "sh",
            "-c",
            "mount -t tmpfs none /dev; exec \"$0\" doctor --json",
        ])
        .arg(mayfly())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(HOST), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("fatal") && text.contains("TAP"), "{text}");
}

#[test]
fn images_that_are_not_what_is_said() {
    let folder = Folder::new();
    let kernel = kernel("cloud-6.12", "vmlinux");
    let kernel = kernel.to_str().unwrap();
    let (raw, base, overlay) = (
        folder.path("raw"),
        folder.path("base"),
        folder.path("overlay"),
    );
    let (luks, data, chain) = (
        folder.path("luks"),
        folder.path("data"),
        folder.path("chain"),
    );
    let img = |args: &[&str]| drop(tool("qemu-img", args));
    let create = |args: &[&str]| img(&[&["create", "-q", "-f", "qcow2"], args].concat());
    File::create(&raw).unwrap().set_len(1 << 20).unwrap();
    create(&[&base, "1M"]);
    create(&["-b", &raw, "-F", "raw", &overlay]);
    create(&["-b", &overlay, "-F", "qcow2", &chain]);
    create(&[
        "-o",
        &format!("data_file={}", folder.path("data.raw")),
        &data,
        "1M",
    ]);
    create(&[
        "--object",
        "secret,id=key,data=secret",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
        &luks,
        "1M",
    ]);
    let before = fs::read(&base).unwrap();
    for (disk, code, part) in [
        (
            format!("{raw},format=qcow2"),
            CONFIG,
            "is not a qcow2 image",
        ),
        (format!("{overlay},format=qcow2"), CONFIG, "backing=FILE"),
        (
            format!("{base},format=qcow2,backing={raw}"),
            CONFIG,
            "leave backing= out",
        ),
        (
            format!("{chain},format=qcow2,backing={overlay},backing-format=qcow2"),
            CONFIG,
            "backing=FILE",
        ),
        (
            format!("{overlay},format=qcow2,backing={raw}x"),
            CONFIG,
            "no such file",
        ),
        (
            format!("{overlay},format=raw,backing={raw}"),
            CONFIG,
            "needs format=qcow2",
        ),
        (
            format!("{data},format=qcow2"),
            CONFIG,
            "keeps its data in another file",
        ),
        (format!("{luks},format=qcow2"), CONFIG, "is encrypted"),
        (
            format!("{base},format=qcow2,queues=2"),
            CONFIG,
            "queues=2 are more",
        ),
        (format!("{base},format=qcow2,bw=0"), CONFIG, "would stop"),
    ] {
        let output = boot(&["--kernel", kernel, "--disk", &format!("path={disk}")]);
        assert_refusal(&output, code, &["--disk", part]);
    }
    assert_eq!(fs::read(&base).unwrap(), before);
}
