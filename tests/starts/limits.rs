//! Limits of the user's: what they are too small for is told of.

use std::process::Command;

use crate::common::{Ended, FAILED, Host, VERBS, Verb};
use crate::refusals::net_none;

/// It ended as it should, or was refused, in one line.
fn assert_ends(host: &Host, limit: &str, verb: Verb, command: Command) -> Ended {
    let ended = host.run(command);
    // The dynamic linker's own words, where it can't even load the program.
    let loader = ended
        .stderr
        .contains("error while loading shared libraries");
    let one_line = ended.stderr.lines().count() == 1 && ended.stderr.starts_with("mayfly: ");
    let refused = one_line && !ended.status.success();
    assert!(
        loader || ended.is_off(verb) || refused,
        "{limit} {verb:?}: {ended:?}"
    );
    ended
}

#[test]
fn descriptors() {
    let host = Host::new();
    for number in 3..=60 {
        for verb in VERBS {
            let limit = format!("ulimit -n {number}");
            let command = host.after(&limit, verb, "turns-off", net_none(verb));
            assert_ends(&host, &limit, verb, command);
        }
    }
}

#[test]
fn the_size_of_files() {
    let host = Host::new();
    for blocks in [0, 1, 2, 8, 64] {
        for verb in VERBS {
            let limit = format!("ulimit -f {blocks}");
            // What is said is said, by who has no limit.
            let script = format!("exec 2> >(exec cat >&2); {limit}");
            let command = host.after(&script, verb, "turns-off", net_none(verb));
            assert_ends(&host, &limit, verb, command);
        }
    }
    let disk = [net_none(Verb::Run), &["--disk-size", "64M"]].concat();
    let ended = host.run(host.after("ulimit -f 1000", Verb::Run, "turns-off", &disk));
    ended.assert_refused(FAILED, "ulimit -f");
}

#[test]
fn all_others() {
    let host = Host::new();
    let memory = (4..=24).map(|number| format!("ulimit -v {}", number * 32 * 1024));
    let small = [
        "ulimit -l 0",
        "ulimit -c 0",
        "ulimit -s 1024",
        "ulimit -q 0",
        "ulimit -i 0",
    ];
    for limit in memory.chain(small.map(str::to_owned)) {
        for verb in VERBS {
            let command = host.after(&limit, verb, "turns-off", net_none(verb));
            assert_ends(&host, &limit, verb, command);
        }
    }
}

#[test]
fn processes() {
    let host = Host::new();
    // Root has no such limit. A user has a KVM of its own here, and an own count: nobody
    // else runs as this one.
    const USER: u32 = 0x7200_0001;
    let own = ["share", "cache", "tmp"]
        .map(|name| host.text(name))
        .join(" ");
    let prepare = format!(
        "chown -R {USER} {own}; mknod -m 666 {kvm} c 10 232; mount --bind {kvm} /dev/kvm; \
         mkdir -p -m 700 {runtime}; chown {USER} {runtime}; cp -L {mayfly} {copy}",
        kvm = host.text("kvm"),
        runtime = host.text("run"),
        mayfly = host.text("mayfly"),
        copy = host.text("copy"),
    );
    let script = format!(
        "test -e {} || {{ {prepare}; }}; mountpoint -q /dev/kvm || mount --bind {} /dev/kvm",
        host.text("kvm"),
        host.text("kvm")
    );
    for number in 0..=20 {
        for verb in [Verb::Run, Verb::Boot] {
            let limit = format!("ulimit -u {number}");
            let mut command = Command::new("unshare");
            command.args(["--mount", "bash", "-c"]);
            command.arg(format!(
                "{script}; exec setpriv --reuid {USER} --regid {USER} --clear-groups \
                 bash -c '{limit}; exec \"$0\" \"$@\"' {} \"$@\"",
                host.text("copy")
            ));
            command.arg("-");
            command.args(host.words(verb, "turns-off", net_none(verb)));
            host.surround(&mut command);
            assert_ends(&host, &limit, verb, command);
        }
    }
}
