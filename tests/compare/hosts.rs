//! What a host has and lacks, and what a hostile image would do to it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use crate::common::{Comparison, engine, image, mayfly, nothing_is_left, script};

/// Debian's `/run` executes nothing, and is small.
#[test]
fn what_the_host_has_in_memory_may_be_little() {
    let image = image(|root| fs::write(root.join("large"), vec![0x5a; 8 << 20]).unwrap());
    for options in ["noexec", "size=16m"] {
        let flags = ["--runs", "1", "--measure", "start"];
        let mut comparison = Comparison::of_image(image.path(), "process,container,runc", &flags);
        let script = "mount -t tmpfs -o $0 tmpfs /run && \"$@\"; status=$?; \
                      ls -A /run /var/tmp | grep ^mayfly-compare && exit 99; exit $status";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, options]);
        command.arg(comparison.command.get_program());
        command.args(comparison.command.get_args());
        comparison.command = command;
        let (_, report) = comparison.run();
        for name in ["process", "container", "runc"] {
            assert_eq!(engine(&report, name).samples.len(), 1, "{options}");
        }
        nothing_is_left();
    }
}

/// Links of an image lead nowhere on the host.
#[test]
fn an_image_cannot_have_files_of_the_host_written() {
    let host = tempfile::tempdir().unwrap();
    let victim = host.path().join("victim");
    fs::write(&victim, "safe").unwrap();
    let image = image(|root| {
        for name in [".mayfly-trial", ".mayfly-probe", ".mayfly-volume"] {
            symlink(&victim, root.join(name)).unwrap();
        }
    });
    let flags = ["--runs", "1", "--measure", "steady"];
    let (_, report) = Comparison::of_image(image.path(), "process", &flags).run();
    assert!(!engine(&report, "process").steady.is_empty());
    assert_eq!(fs::read_to_string(&victim).unwrap(), "safe");
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 1);
    nothing_is_left();
}

/// What a container writes, neither the host executes nor another one sees.
#[test]
fn a_container_cannot_change_the_image() {
    let host = tempfile::tempdir().unwrap();
    let proof = host.path().join("proof");
    let image = image(|_| {});
    let script = format!(
        "[ ! -e /spoilt ] && touch /spoilt && echo '#!/bin/sh' >/new && \
         echo 'touch {}' >>/new && chmod 755 /new && mv /new /.mayfly-probe",
        proof.display()
    );
    let flags = ["--runs", "2", "--measure", "start,isolation", "--"];
    let flags = [&flags[..], &["sh", "-c", &script]].concat();
    let engines = ["runc", "container"];
    let (_, report) = Comparison::of_image(image.path(), &engines.join(","), &flags).run();
    for name in engines {
        let engine = engine(&report, name);
        assert!(engine.isolation.is_some(), "{engine:?}");
        for sample in &engine.samples {
            assert_eq!((sample.status, &sample.error), (Some(0), &None), "{name}");
        }
    }
    assert!(!proof.exists());
    nothing_is_left();
}

/// An accident at the first start is no property of an engine.
#[test]
fn what_fails_once_is_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let been = folder.path().join("been").display().to_string();
    let once =
        format!("#!/bin/sh\n[ -e {been} ] || {{ touch {been}; exit 1; }}\nexec chroot \"$@\"\n");
    let engines = [("once", once.as_str()), ("never", "#!/bin/sh\nexit 1\n")];
    let engines = engines.map(|(name, text)| script(folder.path(), name, text));
    let flags = ["--runs", "2", "--measure", "start"];
    let (_, report) = Comparison::of(&engines.join(","), &flags).run();
    let once = engine(&report, "once");
    assert_eq!(once.start.unwrap().count, 2);
    assert!(!once.notes.iter().any(|it| it.contains("asked for less")));
    let never = report.engines.iter().find(|it| it.name == "never");
    let why = never.unwrap().missing.clone().unwrap();
    assert!(why.contains("it does not work here"), "{why}");
}

#[test]
fn who_is_not_here_is_missing() {
    let flags = ["--runs", "1", "--measure", "start"];
    let mut comparison = Comparison::of("process,runc,firecracker", &flags);
    comparison
        .command
        .env("PATH", "/usr/bin/nowhere:/bin/nowhere");
    let output = comparison.command.output().unwrap();
    // Without squashfs-tools there is no image.
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("squashfs-tools"));
    let folder = tempfile::tempdir().unwrap();
    for tool in ["unsquashfs", "sqfstar"] {
        let path = std::env::split_paths(&std::env::var_os("PATH").unwrap())
            .map(|folder| folder.join(tool))
            .find(|path| path.exists());
        symlink(path.unwrap(), folder.path().join(tool)).unwrap();
    }
    comparison.command.env("PATH", folder.path());
    let (output, report) = comparison.run();
    for name in ["runc", "firecracker"] {
        let engine = report
            .engines
            .iter()
            .find(|engine| engine.name == name)
            .unwrap();
        assert_eq!(
            engine.missing.as_deref(),
            Some(format!("{name} is not installed").as_str())
        );
        assert!(engine.samples.is_empty() && engine.total.is_none());
    }
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(table.contains("runc is not installed"), "{table}");
}

/// Where the host executes no probe, what others are is still found.
#[test]
fn a_host_that_cannot_be_looked_at_is_no_end() {
    let cache = PathBuf::from(std::env::var_os("MAYFLY_CACHE").unwrap());
    let own = tempfile::tempdir().unwrap();
    let probe = own.path().join("default/probe");
    fs::create_dir(probe.parent().unwrap()).unwrap();
    fs::copy(cache.join("default/probe"), &probe).unwrap();
    symlink(
        cache.join("default/vmlinux"),
        own.path().join("default/vmlinux"),
    )
    .unwrap();
    fs::set_permissions(&probe, fs::Permissions::from_mode(0o644)).unwrap();
    let flags = ["--runs", "1", "--measure", "start,isolation"];
    let mut comparison = Comparison::of("process,container", &flags);
    comparison.command.env("MAYFLY_CACHE", own.path());
    let (_, report) = comparison.run();
    assert_eq!(engine(&report, "container").samples.len(), 1);
    let told = report
        .warnings
        .iter()
        .any(|it| it.contains("the host could not be inspected"));
    assert!(told, "{report:?}");
    nothing_is_left();
}

/// What lies in memory cannot be forgotten.
#[test]
fn files_lie_on_a_disk_if_they_are_to_be_forgotten() {
    for drop in [false, true] {
        let flags = ["--runs", "1", "--measure", "start", "--drop-caches"];
        let flags = &flags[..flags.len() - usize::from(!drop)];
        let (_, report) = Comparison::of("process,container", flags).run();
        let container = engine(&report, "container");
        let program = &container.command_line[0];
        assert_eq!(program.starts_with("/var/tmp/"), drop, "{program}");
        assert!(container.start.is_some());
        nothing_is_left();
    }
}

#[test]
fn what_cannot_be_is_told() {
    for (args, status, said) in [
        (&["--engines", "vmware"][..], 2, "NAME=PROGRAM"),
        (&["--json", "/nowhere/record"][..], 2, "/nowhere/record"),
        (&["--memory", "much"][..], 2, "--memory much"),
        (&["./no-such-image"][..], 2, "no-such-image"),
        (&["--runs", "0"][..], 2, "--runs"),
    ] {
        let output = mayfly().args(args).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {errors}");
        assert!(errors.contains(said), "{args:?}: {errors}");
    }
    nothing_is_left();
}
