//! Nothing is left behind, however it ends.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mayfly_testing::processes::{children, kill};
use mayfly_testing::until;

use crate::common::{
    Comparison, LONG, engine, instance, leftovers, mayfly, nothing_is_left, running, sleeper,
};

#[test]
fn an_interrupted_comparison_keeps_what_it_has() {
    let flags = ["--runs", "10000", "--measure", "start"];
    let mut comparison = Comparison::of("process,container", &flags);
    let mut child = comparison.start();
    // One has been tried, and warmed up.
    until("samples are taken", || {
        let seconds = children(child.id()).into_iter();
        let mut launchers = seconds.flat_map(children).filter_map(instance);
        launchers.any(|number| number > 5)
    });
    kill(child.id(), libc::SIGINT);
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    let report = comparison.record();
    assert!(report.interrupted);
    let taken = engine(&report, "process").samples.len();
    assert!((1..10_000).contains(&taken), "{taken}");
    nothing_is_left();
}

/// Nobody takes minutes for nothing.
#[test]
fn what_fails_at_the_end_takes_nothing_along() {
    let flags = ["--runs", "1", "--measure", "start", "--json", "/dev/full"];
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows");
    let mut command = mayfly();
    command.args(["--engines", "process"]).args(flags);
    let output = command.arg("--csv").arg(&rows).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("/dev/full"));
    assert!(String::from_utf8_lossy(&output.stdout).contains("process"));
    assert_eq!(fs::read_to_string(&rows).unwrap().lines().count(), 2);

    // An engine that is gone from its second run on.
    let own = sleeper(folder.path(), "own", false);
    let script = folder.path().join("own");
    let text = fs::read_to_string(&script).unwrap();
    let last = "[ ! -e $0.tried ] || rm $0\ntouch $0.tried\nexit 0";
    fs::write(&script, text.replace("exit 0", last)).unwrap();
    let flags = ["--runs", "3", "--warmup", "0", "--measure", "start"];
    let mut comparison = Comparison::of(&own, &flags);
    let output = comparison.command.output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("own"));
    let report = comparison.record();
    assert!(report.interrupted);
    assert_eq!(engine(&report, "own").samples.len(), 1);

    // What is never written is never made.
    let mut comparison = Comparison::of_image(Path::new("./no-such-image"), "process", &[]);
    assert_eq!(comparison.command.output().unwrap().status.code(), Some(2));
    assert!(!comparison.file("record.json").exists());
    nothing_is_left();
}

/// Docker's daemon may be stuck: nobody need wait for it.
#[test]
fn ctrl_c_ends_what_prepares() {
    let folder = tempfile::tempdir().unwrap();
    let docker = folder.path().join("docker");
    fs::write(&docker, format!("#!/bin/sh\nexec sleep {LONG}\n")).unwrap();
    fs::set_permissions(&docker, fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", folder.path().display());
    let mut comparison = Comparison::of("process,docker", &["--runs", "1"]);
    comparison.command.env("PATH", path);
    let mut child = comparison.start();
    running(1);
    let asked = Instant::now();
    kill(child.id(), libc::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(asked.elapsed() < Duration::from_secs(10));
    nothing_is_left();
}

/// Whoever is killed, the other cleans up.
#[test]
fn killed_it_leaves_nothing() {
    for second in [false, true] {
        for engine in ["container", "runc"] {
            let flags = ["--runs", "1", "--measure", "start", "--", "sleep", LONG];
            let mut comparison = Comparison::of(engine, &flags);
            let mut child = comparison.start();
            running(1);
            let victim = match second {
                false => child.id(),
                true => *children(child.id()).first().unwrap(),
            };
            kill(victim, libc::SIGKILL);
            let status = child.wait().unwrap();
            match second {
                false => assert_eq!(status.signal(), Some(libc::SIGKILL)),
                true => assert_eq!(status.code(), Some(128 + libc::SIGKILL)),
            }
            nothing_is_left();
        }
    }
}

/// It does not read for ever what is written for ever.
#[test]
fn a_flood_is_no_hang() {
    let flags = ["--runs", "1", "--measure", "start", "--"];
    let flags = [&flags[..], &["sh", "-c", "yes & exit 0"]].concat();
    let mut comparison = Comparison::of("process", &flags);
    let mut child = comparison.start();
    until("it ends", || child.try_wait().unwrap().is_some());
    let report = comparison.record();
    let missing = report.engines.first().unwrap().missing.clone();
    assert!(missing.unwrap().contains("did not end"));
    nothing_is_left();
}

#[test]
fn who_starts_it_may_ignore_the_ends_of_children() {
    let mut comparison = Comparison::of("process", &["--runs", "1", "--measure", "start"]);
    // SAFETY: a system call between fork and exec.
    unsafe {
        comparison.command.pre_exec(|| {
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            Ok(())
        });
    }
    let mut child = comparison.command.stdout(Stdio::null()).spawn().unwrap();
    until("it ends", || child.try_wait().unwrap().is_some());
    assert_eq!(engine(&comparison.record(), "process").samples.len(), 1);
    nothing_is_left();
}

/// What runc has begun with when it is killed, it does not know itself.
#[test]
fn groups_of_a_launcher_that_hangs_are_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = std::env::var_os("PATH").unwrap();
    let mut all = std::env::split_paths(&path).map(|it| it.join("runc"));
    let runc = all.find(|it| it.exists()).unwrap();
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *\" run \"*)\n\
         for id; do :; done\n\
         mkdir /sys/fs/cgroup/$id /sys/fs/cgroup/cpu/$id 2>/dev/null\n\
         exec sleep {LONG};;\n\
         esac\nexec {} \"$@\"\n",
        runc.display()
    );
    let own = folder.path().join("runc");
    fs::write(&own, script).unwrap();
    fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).unwrap();
    let flags = ["--runs", "1", "--measure", "start", "--timeout", "1"];
    let mut comparison = Comparison::of("runc", &flags);
    let folders = [folder.path().to_owned()];
    let folders = folders.into_iter().chain(std::env::split_paths(&path));
    comparison
        .command
        .env("PATH", std::env::join_paths(folders).unwrap());
    let (_, report) = comparison.fail(3);
    let missing = report.engines.first().unwrap().missing.clone();
    assert!(missing.unwrap().contains("does not work here"));
    nothing_is_left();
}

/// A shell may have left it some.
#[test]
fn children_that_it_had_before_are_not_ended() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let script = r#"
        exec > >(cat >/dev/null; sleep 1; echo whole >"$1")
        shift
        exec "$@" compare --engines process --runs 1 --measure start"#;
    let mut command = Command::new("bash");
    command.args(["-c", script, "bash"]).arg(&log);
    command.arg(std::env::var_os("MAYFLY_BIN").unwrap());
    assert!(command.status().unwrap().success());
    until("its reader ends", || log.exists());
    assert_eq!(fs::read_to_string(&log).unwrap(), "whole\n");
    nothing_is_left();
}

/// Both are killed: what was launched ends, too, and the next comparison cleans up.
#[test]
fn the_next_one_removes_what_was_left() {
    let own = tempfile::tempdir().unwrap();
    let script = own.path().join("own");
    // Nothing ends with this one but itself.
    let text = format!("#!/bin/sh\nsetsid sleep {LONG} &\nsleep {LONG}\n");
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let own = format!("own={}", script.display());
    for engine in ["runc", "process", "container", &own] {
        let flags = ["--runs", "1", "--measure", "start", "--", "sleep", LONG];
        let mut comparison = Comparison::of(engine, &flags);
        let mut child = comparison.start();
        running(1);
        let second = *children(child.id()).first().unwrap();
        kill(child.id(), libc::SIGSTOP);
        kill(second, libc::SIGKILL);
        kill(child.id(), libc::SIGKILL);
        child.wait().unwrap();
        // Its lock is free when it has no files any more.
        let files = PathBuf::from(format!("/proc/{second}/fd"));
        until("the second is gone", || {
            fs::read_dir(&files).map_or(0, Iterator::count) == 0
        });
        assert!(!leftovers().is_empty());
        if ["process", "container"].contains(&engine) {
            // A group that a dying process is in cannot be removed.
            let has_processes = |group: &String| {
                fs::read(Path::new(group).join("cgroup.procs")).is_ok_and(|it| !it.is_empty())
            };
            until("the command ends", || {
                let left = leftovers();
                !left.iter().any(|it| it.contains(LONG) || has_processes(it))
            });
        }
        Comparison::of("process", &["--runs", "1", "--measure", "start"]).run();
        nothing_is_left();
    }
}

/// Where its folder was, anybody may have made one by the time the last half ends.
#[test]
fn a_folder_in_its_place_is_left_alone() {
    let proof = tempfile::tempdir().unwrap();
    let flags = ["--runs", "1", "--measure", "start"];
    let mut comparison = Comparison::of("process", &flags);
    // It cannot end until its table is read.
    let (mut reader, writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while (&writer).write(&[0; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    comparison.command.stdout(writer).stderr(Stdio::null());
    let mut child = comparison.command.spawn().unwrap();
    drop(comparison.command);
    let folder = || leftovers().into_iter().find(|it| it.starts_with('/'));
    until("its folder appears", || folder().is_some());
    let place = folder().unwrap();
    until("its folder is removed", || folder().is_none());

    let elsewhere = proof.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::set_permissions(&elsewhere, fs::Permissions::from_mode(0o755)).unwrap();
    let evil = serde_json::json!([["touch", proof.path().join("proof")]]);
    fs::create_dir(&place).unwrap();
    fs::write(Path::new(&place).join("undo.json"), evil.to_string()).unwrap();
    symlink(&elsewhere, Path::new(&place).join("link")).unwrap();
    std::io::copy(&mut reader, &mut std::io::sink()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(fs::read_dir(&place).unwrap().count(), 2);
    assert!(!proof.path().join("proof").exists());
    fs::remove_dir_all(place).unwrap();
    nothing_is_left();
}
