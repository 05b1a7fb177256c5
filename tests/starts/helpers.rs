//! Programs beside a VM that hang, die or talk nonsense while it starts; and signals meanwhile.

use std::path::Path;
use std::process::Command;

use mayfly_testing::processes::{descendants, kill_if_there, name, with_variable};
use mayfly_testing::{eventually, tools};

use crate::common::{FAILED, HOST, Host, Start, VERBS, Verb};

/// A start whose passt is this script.
fn with_passt(host: &Host, verb: Verb, script: &str) -> Command {
    shell_script(&host.path("bin/passt"), script);
    let flags: &[&str] = match verb {
        Verb::Boot => &["--net", "user,publish=127.0.0.1:48123:80"],
        _ => &["--rm", "-p", "127.0.0.1:48123:80"],
    };
    with_programs(host, host.command(verb, "turns-off", flags))
}

/// A start whose virtiofsd is this script.
fn with_virtiofsd(host: &Host, verb: Verb, script: &str) -> Command {
    shell_script(&host.path("bin/virtiofsd"), script);
    let folder = format!("{}:/x", host.text("root"));
    let flags = ["--rm", "--net", "none", "-v", &folder];
    with_programs(host, host.command(verb, "turns-off", &flags))
}

fn shell_script(path: &Path, script: &str) {
    tools::program(path, &format!("#!/bin/sh\n{script}\n"));
}

fn with_programs(host: &Host, mut command: Command) -> Command {
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", host.text("bin")));
    command
}

const AND_HELLO: &str = "case $1 in --version) echo virtiofsd 1.0; exit;; esac";

#[test]
fn one_that_dies_is_told_of() {
    let host = Host::new();
    for verb in VERBS {
        let status = verb.status(HOST);
        let ended = host.run(with_passt(&host, verb, "echo it hurts >&2; exit 1"));
        ended.assert_refused(status, "passt: it hurts");
        let ended = host.run(with_passt(&host, verb, "kill -9 $$"));
        ended.assert_refused(status, "passt: ended without a word");
        // Its child has what it complains to, for longer.
        let ended = host.run(with_passt(&host, verb, "setsid sleep 5 & exit 1"));
        ended.assert_refused(status, "passt: ended without a word");
    }
    for verb in [Verb::Run, Verb::Detached] {
        let script = format!("{AND_HELLO}; echo it hurts >&2; exit 1");
        let ended = host.run(with_virtiofsd(&host, verb, &script));
        ended.assert_refused(FAILED, "virtiofsd: it hurts");
        let script = format!("{AND_HELLO}; kill -9 $$");
        let ended = host.run(with_virtiofsd(&host, verb, &script));
        ended.assert_refused(FAILED, "virtiofsd");
    }
}

#[test]
fn one_that_hangs_is_given_up() {
    let host = Host::new();
    let ended = host.run(with_passt(&host, Verb::Run, "exec sleep 1000"));
    ended.assert_refused(FAILED, "passt: does not answer");
    let script = format!("{AND_HELLO}; exec sleep 1000");
    let ended = host.run(with_virtiofsd(&host, Verb::Run, &script));
    ended.assert_refused(FAILED, "virtiofsd: the backend does not answer");
    let ended = host.run(with_virtiofsd(&host, Verb::Run, "exec sleep 1000"));
    ended.assert_refused(FAILED, "virtiofsd: says nothing");
}

/// Waits until a start has come to where a program beside it runs `sleep`, which does not have
/// its mark: such programs have nothing of the user's environment.
fn await_sleep(start: &Start) -> u32 {
    eventually("sleep", || {
        let mut all = descendants(start.child.id()).into_iter();
        all.find(|&pid| name(pid) == "sleep")
    })
}

#[test]
fn signals_end_a_start_that_waits() {
    let host = Host::new();
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        for verb in VERBS {
            let mut starts = vec![with_passt(&host, verb, "exec sleep 1000")];
            if verb != Verb::Boot {
                starts.push(with_virtiofsd(&host, verb, "exec sleep 1000"));
            }
            for command in starts {
                let start = host.start(command);
                await_sleep(&start);
                start.signal(signal);
                let ended = host.finish(start);
                ended.assert_refused(128 + signal, &format!("signal {signal} ended it"));
            }
        }
    }
    let start = host.start(with_virtiofsd(
        &host,
        Verb::Run,
        &format!("{AND_HELLO}; exec sleep 1000"),
    ));
    await_sleep(&start);
    start.signal(libc::SIGTERM);
    host.finish(start)
        .assert_refused(128 + libc::SIGTERM, "signal 15 ended it");
}

#[test]
fn a_supervisor_that_is_killed_while_it_starts_is_told_of() {
    let host = Host::new();
    let start = host.start(with_passt(&host, Verb::Detached, "exec sleep 1000"));
    let passt = await_sleep(&start);
    // All but the process that waits for it, and passt.
    let supervisor = |pid: &u32| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.windows(10).any(|it| it == b"--detached")
    };
    let supervisors = with_variable(&start.mark).into_iter().filter(supervisor);
    supervisors.for_each(|pid| kill_if_there(pid, libc::SIGKILL));
    // passt has a socket that nobody else has open, and would end by that.
    kill_if_there(passt, libc::SIGKILL);
    for pid in with_variable(&start.mark) {
        if pid != start.child.id() {
            kill_if_there(pid, libc::SIGKILL);
        }
    }
    let ended = host.finish(start);
    ended.assert_refused(
        FAILED,
        "its supervisor was ended by signal 9 while it started",
    );
}
