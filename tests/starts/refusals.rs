//! What is refused, and what the host lacks.

use std::fs;
use std::process::Command;

use mayfly_testing::tiny::{Does, kernel};

use crate::common::{CONFIG, FAILED, HOST, Host, VERBS, Verb};

#[test]
fn a_kernel_that_is_none_is_told_of() {
    let host = Host::new();
    let name = |name: &str| host.text(name);
    fs::write(host.path("short"), &kernel(Does::PowerOff)[..100]).unwrap();
    fs::write(host.path("empty"), "").unwrap();
    let far = [
        &kernel(Does::PowerOff)[..88],
        &(1u64 << 40).to_le_bytes(),
        &kernel(Does::PowerOff)[96..],
    ]
    .concat();
    fs::write(host.path("far"), far).unwrap();
    for (kernel, flags, class, words) in [
        ("/etc/passwd".into(), [].as_slice(), CONFIG, "not a kernel"),
        (
            "/etc/passwd".into(),
            &["--sandbox", "off"],
            CONFIG,
            "not a kernel",
        ),
        (name("empty"), &[], CONFIG, "not a kernel"),
        (name("short"), &[], CONFIG, "--kernel"),
        (name("far"), &[], CONFIG, "--kernel"),
        ("/bin/true".into(), &[], CONFIG, "--kernel /bin/true"),
        (name("none"), &[], CONFIG, "no such file"),
        (name("tmp"), &[], CONFIG, "is a directory"),
        ("/dev/null".into(), &[], CONFIG, "not a regular file"),
        (name("turns-off"), &["--memory", "64T"], HOST, "--memory"),
        (name("turns-off"), &["--memory", "1"], CONFIG, "--memory"),
        (name("turns-off"), &["--cpus", "999"], CONFIG, "--cpus"),
    ] {
        for verb in VERBS {
            let mut ended = host.run(host.command(verb, &kernel, flags));
            if flags.contains(&"off") {
                // Which is a line of its own.
                let (warning, rest) = ended.stderr.split_once('\n').unwrap();
                assert!(warning.contains("--sandbox=off"), "{ended:?}");
                ended.stderr = rest.to_owned();
            }
            let class = [class, if class == HOST { CONFIG } else { HOST }];
            let status = ended.status.code().unwrap();
            assert!(
                class.map(|class| verb.status(class)).contains(&status),
                "{ended:?}"
            );
            ended.assert_refused(status, words);
        }
    }
}

#[test]
fn what_run_refuses_late_leaves_nothing() {
    let host = Host::new();
    let cases: [(&[&str], &str); 6] = [
        (&["--disk-size", "0"], "--disk-size 0"),
        (&["--disk-size", "100000T"], "--disk-size 100000T"),
        (&["--memory", "1"], "--memory 1: too little"),
        (&["-v", "/nowhere/at/all:/x"], "/nowhere/at/all"),
        (
            &["--net", "tap=mayfly-none,ip=10.0.0.2/24"],
            "no such device",
        ),
        (&["--sandbox", "what"], "sandbox"),
    ];
    for (flags, words) in cases {
        for remove in [&["--rm"][..], &[]] {
            let flags = [remove, flags, &["--name", "same"]].concat();
            for verb in [Verb::Run, Verb::Detached] {
                let ended = host.run(host.command(verb, "turns-off", &flags));
                assert_eq!(ended.status.code(), Some(FAILED), "{ended:?}");
                assert!(ended.stderr.contains(words), "{ended:?}");
            }
        }
    }
    // The name is free.
    let ended = host.run(host.command(
        Verb::Run,
        "turns-off",
        &["--rm", "--net", "none", "--name", "same"],
    ));
    assert!(ended.is_off(Verb::Run), "{ended:?}");
}

#[test]
fn what_the_host_lacks_is_told_of() {
    let host = Host::new();
    let scripts = [
        (
            "mount -t tmpfs none /dev && mknod -m 666 /dev/urandom c 1 9",
            "/dev/kvm does not exist",
        ),
        ("mount --bind /dev/null /dev/kvm", "/dev/kvm"),
        ("mount -t tmpfs none /dev", "/dev/"),
        ("mount -t tmpfs none /proc", ""),
    ];
    for (script, words) in scripts {
        for verb in VERBS {
            let script = format!("{script}; true");
            let inner = host.after(&script, verb, "turns-off", net_none(verb));
            let mut command = Command::new("unshare");
            command.args(["--mount", "bash"]);
            command.args(inner.get_args());
            host.surround(&mut command);
            let ended = host.run(command);
            assert!(
                !ended.status.success() && !ended.stderr.is_empty(),
                "{script}: {ended:?}"
            );
            assert_eq!(ended.stderr.lines().count(), 1, "{script}: {ended:?}");
            assert!(ended.stderr.contains(words), "{script}: {ended:?}");
        }
    }
}

#[test]
fn folders_that_are_none_are_told_of() {
    let host = Host::new();
    for (variable, value) in [
        ("MAYFLY_RUNTIME_DIR", "/dev/null/x"),
        ("MAYFLY_RUNTIME_DIR", "/proc/x"),
        ("MAYFLY_CACHE", "/dev/null/x"),
        ("XDG_DATA_HOME", "/dev/null/x"),
    ] {
        for verb in [Verb::Run, Verb::Detached] {
            let mut command = host.command(verb, "turns-off", net_none(verb));
            command.env(variable, value);
            let ended = host.run(command);
            assert_eq!(ended.status.code(), Some(FAILED), "{ended:?}");
            assert!(ended.stderr.starts_with("mayfly: "), "{ended:?}");
        }
    }
}

#[test]
fn a_runtime_folder_may_be_deep() {
    let host = Host::new();
    let deep = host.path("tmp").join("d".repeat(150));
    for verb in [Verb::Run, Verb::Detached] {
        let mut command = host.command(verb, "turns-off", net_none(verb));
        command.env("MAYFLY_RUNTIME_DIR", deep.join("runtime"));
        fs::create_dir(&deep).unwrap();
        let start = host.start(command);
        let ended = start.wait();
        fs::remove_dir_all(&deep).unwrap();
        assert!(ended.is_off(verb), "{ended:?}");
    }
}

/// In `/tmp` anybody can make a folder of a user's, with VMs of their own.
#[test]
fn a_runtime_folder_of_another_s_is_not_followed() {
    let host = Host::new();
    let runtime = host.path("run");
    fs::create_dir_all(runtime.join("vm")).unwrap();
    fs::write(runtime.join("vm/vm.json"), "{}").unwrap();
    std::os::unix::fs::chown(&runtime, Some(65534), None).unwrap();
    for words in [
        &["ps"][..],
        &["list"],
        &["stop", "vm"],
        &["kill", "vm"],
        &["rm", "-f", "vm"],
        &["wait", "vm"],
        &["logs", "vm"],
        &["inspect", "vm"],
        &["stats", "--no-stream"],
        &["exec", "vm", "true"],
        &["attach", "vm"],
        &["cp", "vm:/x", "."],
        &["ctl", "vm", "info"],
    ] {
        let mut command = host.mayfly();
        command.args(words);
        let ended = host.start(command).wait();
        assert!(!ended.status.success(), "{words:?}: {ended:?}");
        assert!(
            ended.stderr.contains("must be a folder of yours"),
            "{words:?}: {ended:?}"
        );
        assert_eq!(ended.stdout, "", "{words:?}");
    }
    fs::remove_dir_all(&runtime).unwrap();
}

/// Images need no network here, and others have none.
pub fn net_none(verb: Verb) -> &'static [&'static str] {
    match verb {
        Verb::Boot => &[],
        _ => &["--rm", "--net", "none"],
    }
}
