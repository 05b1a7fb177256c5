//! What fails is said, and is no time.

use std::fs;
use std::process::Command;

use crate::common::{Comparison, engine, image, nothing_is_left, script, sleeper};

const START: [&str; 6] = ["--runs", "2", "--warmup", "0", "--measure", "start"];

fn missing(report: &mayfly_compare::model::Report, name: &str) -> String {
    let found = report.engines.iter().find(|it| it.name == name).unwrap();
    assert!(
        found.samples.is_empty() && found.start.is_none(),
        "{found:?}"
    );
    found.missing.clone().unwrap()
}

#[test]
fn a_command_that_fails_is_not_timed() {
    for (script, said) in [
        ("exit 3", "the command's exit status is 3: "),
        ("kill -9 $$", "the command's exit status is 137: "),
        ("exit 127", "the command's exit status is 127: "),
    ] {
        let flags = [&START[..], &["--", "sh", "-c", script]].concat();
        let (errors, report) = Comparison::of("process,container", &flags).fail(2);
        assert!(errors.contains(said), "{errors}");
        for name in ["process", "container"] {
            let why = missing(&report, name);
            assert!(why.starts_with("the command fails in it: "), "{why}");
        }
        assert!(report.warnings.iter().any(|it| it.contains(said)));
    }
    nothing_is_left();
}

/// Who fails at once would be the quickest.
#[test]
fn a_command_that_fails_in_one_engine_is_told() {
    let here = tempfile::tempdir().unwrap();
    let test = format!("test -d {} || exit 4", here.path().display());
    let flags = [&START[..], &["--", "sh", "-c", &test]].concat();
    let (errors, report) = Comparison::of("process,container", &flags).fail(2);
    let said = "the command's exit status differs between runs: 0 (process), 4 (container): ";
    assert!(errors.contains(said), "{errors}");
    assert_eq!(engine(&report, "process").start.unwrap().count, 2);
    missing(&report, "container");

    // Nor is it timed where it fails but now and then, or in runs that do not count.
    let count = here.path().join("count");
    let script = format!("echo >>{0}; test $(wc -l <{0}) -lt 3", count.display());
    let flags = [&START[..], &["--", "sh", "-c", &script]].concat();
    let (errors, report) = Comparison::of("process", &flags).fail(2);
    assert!(errors.contains("exit status is 0 or 1: "), "{errors}");
    let process = engine(&report, "process");
    let statuses: Vec<_> = process.samples.iter().map(|it| it.command_status).collect();
    assert_eq!(statuses, [Some(0), Some(1)]);
    assert_eq!(process.start.unwrap().count, 1);

    fs::remove_file(&count).unwrap();
    let script = format!("echo >>{0}; test $(wc -l <{0}) -ne 2", count.display());
    let flags = [
        "--runs",
        "1",
        "--measure",
        "start",
        "--",
        "sh",
        "-c",
        &script,
    ];
    let (output, report) = Comparison::of("process", &flags).run();
    assert_eq!(engine(&report, "process").start.unwrap().count, 1);
    let table = String::from_utf8(output.stdout).unwrap().replace('\n', " ");
    let said = "1 of 1 runs before those that count failed: the command's exit status is 1";
    assert!(table.contains(said), "{table}");
    nothing_is_left();
}

#[test]
fn nothing_to_compare_is_a_failure() {
    let flags = [&START[..], &["--", "no-such-program"]].concat();
    let (errors, _) = Comparison::of("process,container", &flags).fail(2);
    assert!(errors.contains("exit status is 127: "), "{errors}");
    let (errors, _) = Comparison::of("firecracker", &START).fail(3);
    assert!(errors.contains("nothing could be compared"), "{errors}");

    // It works when it is tried, and never again.
    let folder = tempfile::tempdir().unwrap();
    let once = "#!/bin/sh\n[ -e $0.tried ] && exit 1\ntouch $0.tried\nexec chroot \"$@\"\n";
    let once = script(folder.path(), "once", once);
    let (errors, report) = Comparison::of(&once, &START).fail(3);
    assert!(errors.contains("nothing could be compared"), "{errors}");
    assert_eq!(engine(&report, "once").start, None);
    nothing_is_left();
}

/// Figures of an instance that failed are none, whatever it said before.
#[test]
fn what_fails_at_the_end_has_no_figures() {
    let folder = tempfile::tempdir().unwrap();
    let fails = "#!/bin/sh\nchroot \"$@\"\ncase $4 in run) exit 0;; esac\nexit 9\n";
    let fails = script(folder.path(), "fails", fails);
    let flags = ["--runs", "1", "--measure", "start,steady,isolation"];
    let (_, report) = Comparison::of(&fails, &flags).run();
    let fails = engine(&report, "fails");
    assert!(
        fails.steady.is_empty() && fails.isolation.is_none(),
        "{fails:?}"
    );
    let told = |what: &str| fails.notes.iter().any(|it| it.contains(what));
    assert!(
        told("the steady state could not be measured: the launcher's status is 9"),
        "{:?}",
        fails.notes
    );
    assert!(
        told("could not be seen: the launcher's status is 9"),
        "{:?}",
        fails.notes
    );

    // Of many at once, those that fail are counted, and why is told.
    let good = sleeper(folder.path(), "good", false);
    let path = folder.path().join("good");
    let text = fs::read_to_string(&path).unwrap();
    let text = text.replace(
        "exit 0",
        "[ ! -e $0.tried ] || exit 7\ntouch $0.tried\nexit 0",
    );
    fs::write(&path, text).unwrap();
    let flags = ["--parallel", "3", "--measure", "load"];
    let (errors, report) = Comparison::of(&good, &flags).fail(3);
    assert!(errors.contains("nothing could be compared"), "{errors}");
    let good = engine(&report, "good");
    let load = good.load.clone().unwrap();
    assert_eq!(
        (load.failed, load.starts_ns.len(), load.start),
        (3, 0, None)
    );
    let told = "3 at once: 3 failed, the first as the launcher's status is 7";
    assert!(
        good.notes.iter().any(|it| it.contains(told)),
        "{:?}",
        good.notes
    );
    nothing_is_left();
}

/// An image as `docker save` writes it, with a program where only the default path leads, and
/// variables, but no path.
const NO_PATH: &str = r#"
    cd "$1"
    mkdir -p usr/local/bin
    printf '#!/bin/sh\ntest "$LANG" = "$1"\n' >usr/local/bin/tool
    chmod 755 usr/local/bin/tool
    tar -cf "$2/layer.tar" .
    cd "$2"
    sum=$(sha256sum layer.tar)
    printf '{"architecture":"amd64","os":"linux","config":{"Env":["LANG=A","LANG=C"]},
        "rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' "${sum%% *}" >config.json
    printf '[{"Config":"config.json","RepoTags":["nopath:1"],"Layers":["layer.tar"]}]' >manifest.json
    tar -cf image.tar manifest.json config.json layer.tar
"#;

#[test]
fn an_image_without_a_path_has_one_everywhere() {
    let image = image(|_| {});
    let place = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    command.args(["-ec", NO_PATH, "sh"]);
    let made = command
        .arg(image.path())
        .arg(place.path())
        .status()
        .unwrap();
    assert!(made.success());
    let archive = place.path().join("image.tar");
    let flags = [&START[..], &["--", "tool", "C"]].concat();
    let mut comparison = Comparison::of_image(&archive, "container,runc", &flags);
    comparison.command.env("XDG_DATA_HOME", place.path());
    let (_, report) = comparison.run();
    for name in ["container", "runc"] {
        assert_eq!(engine(&report, name).start.unwrap().count, 2, "{name}");
    }
    nothing_is_left();
}
