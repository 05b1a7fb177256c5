//! Templates and snapshots whose makers are killed, or have no room, at any moment: nothing
//! broken is ever seen, and nothing is left.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use mayfly::snapshot::store::{
    FORMAT, Host, NewTemplate, Snapshots, Source, Template, TemplateKey, Templates, parse_export,
};
use mayfly::spec::MachineSpec;
use mayfly_testing::tools::run;
use mayfly_testing::{eventually, mayfly, until};

const MEMORY: u64 = 32 << 20;
/// What is not zero of it.
const USED: usize = 1 << 20;
/// Where a maker is to make a template.
const MAKE_IN: &str = "MAYFLY_TEST_MAKE_IN";

fn machine() -> MachineSpec {
    serde_json::from_value(serde_json::json!({
        "version": 1,
        "cpus": 1,
        "memory": { "size": MEMORY, "hugepages": null, "prefault": false, "shared": false },
        "cmdline": "quiet",
        "boot_protocol": "auto",
        "nested": false,
        "watchdog": null,
        "devices": [{ "name": "rng", "kind": "rng" }],
    }))
    .unwrap()
}

fn key() -> TemplateKey {
    let digest: serde_json::Value = format!("sha256:{}", "0".repeat(64)).into();
    serde_json::from_value(serde_json::json!({
        "format": FORMAT,
        "mayfly": "build",
        "kernel": digest,
        "agent": digest,
        "machine": machine(),
        "host": { "kernel": "6", "cpu": "x", "microcode": "1", "cpuid": digest, "msrs": digest },
    }))
    .unwrap()
}

fn host() -> Host {
    key().host
}

/// An export, made in a store of its own.
fn export(folder: &Path) -> Vec<u8> {
    let snapshots = Snapshots::open(folder).unwrap();
    let new = snapshots.create("a").unwrap();
    new.memory.set_len(MEMORY).unwrap();
    new.memory.write_all_at(&[7; USED], 1 << 20).unwrap();
    new.state.write_all_at(&[1; 5000], 0).unwrap();
    let source = Source {
        name: "vm".into(),
        machine: machine(),
        host: host(),
    };
    let made = new.publish(source).unwrap();
    let mut file = Vec::new();
    snapshots.export(&made, &mut file).unwrap();
    file
}

/// A folder of a user's data.
struct Data(tempfile::TempDir);

impl Data {
    fn new() -> Self {
        Data(tempfile::tempdir().unwrap())
    }

    fn snapshot(&self, words: &[&str]) -> Command {
        let mut command = Command::new(mayfly());
        command.arg("snapshot").args(words);
        command.env("XDG_DATA_HOME", self.0.path());
        command
    }

    fn store(&self) -> PathBuf {
        self.0.path().join("mayfly/snapshots")
    }

    /// What there is by name, when the next command has removed what was left; all of it
    /// must be whole.
    fn whole(&self, export: &[u8]) -> Vec<String> {
        let names = run(&mut self.snapshot(&["ls", "-q"]));
        assert_eq!(count(&self.store().join("tmp")), 0);
        let names: Vec<_> = names.lines().map(str::to_owned).collect();
        assert_eq!(count(&self.store().join("named")), names.len());
        for name in &names {
            let output = self.snapshot(&["export", name, "-"]).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            let ours = parse_export(&output.stdout).unwrap();
            let theirs = parse_export(export).unwrap();
            assert_eq!((ours.memory, ours.state), (theirs.memory, theirs.state));
        }
        names
    }
}

fn count(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

fn kill(mut child: Child) {
    // It may have ended before.
    let _ = child.kill();
    child.wait().unwrap();
}

#[test]
fn an_import_that_is_killed_at_any_moment_leaves_nothing() {
    let export = export(&Data::new().0.path().join("made"));
    let data = Data::new();
    let start = || {
        let mut command = data.snapshot(&["import", "-"]);
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::null());
        pipes.stderr(Stdio::null()).spawn().unwrap()
    };
    // While it reads: at the start, within the manifest, the memory, the state.
    let lens = (0..2000)
        .step_by(400)
        .chain((2000..export.len()).step_by(90_001));
    for len in lens.chain([export.len() - 1]) {
        let mut child = start();
        let mut input = child.stdin.take().unwrap();
        input.write_all(&export[..len]).unwrap();
        thread::sleep(Duration::from_millis(3));
        kill(child);
        assert!(data.whole(&export).is_empty(), "{len}");
    }
    // While it synchronizes and publishes: later by a little each time, until it is too late.
    let mut completed = 0;
    for attempt in 0..2000 {
        let mut child = start();
        let mut input = child.stdin.take().unwrap();
        input.write_all(&export).unwrap();
        drop(input);
        thread::sleep(Duration::from_micros(200 * attempt));
        kill(child);
        if data.whole(&export).pop().is_some() {
            completed += 1;
            run(&mut data.snapshot(&["rm", "a"]));
        }
        if completed == 3 {
            return;
        }
    }
    panic!("no import is ever complete");
}

#[test]
fn an_import_and_an_export_without_room_leave_nothing() {
    let made = Data::new();
    let export = export(&made.0.path().join("made"));
    let file = made.0.path().join("file");
    fs::write(&file, &export).unwrap();
    // Room for one, growing until it is enough: the disk is full at each step once.
    let script = r#"
        mount -t tmpfs -o size=64k,mode=700 tmpfs "$1"
        export XDG_DATA_HOME=$1 mayfly=$2 store=$1/mayfly/snapshots
        for ((size = 16; ; size += 40)); do
            mount -o "remount,size=${size}k" "$1"
            [ $size -lt 4000 ] || exit 10
            if "$mayfly" snapshot import "$3" >/dev/null 2>"$4"; then break; fi
            grep -qi 'no space' "$4" || { cat "$4" >&2; exit 11; }
            [ ! -e "$store/tmp" ] || [ -z "$(ls "$store/tmp")" ] || exit 12
            [ ! -e "$store/named" ] || [ -z "$(ls "$store/named")" ] || exit 13
        done
        [ $size -gt 1000 ] || exit 14
        "$mayfly" snapshot export a - | cmp - "$3"
        # As full as it is, nothing more goes in, and what is there goes out.
        ! "$mayfly" snapshot export a "$1/out" 2>"$4" || exit 15
        grep -qi 'no space' "$4" || exit 16
        [ ! -e "$1/out" ] && [ -z "$(find "$1" -mindepth 1 -maxdepth 1 -name '.tmp*')" ] || exit 17
        ! "$mayfly" snapshot import "$3" b 2>"$4" || exit 18
        [ "$("$mayfly" snapshot ls -q)" = a ] || exit 19
        "$mayfly" snapshot rm a >/dev/null
        [ -z "$(ls "$store/named" "$store/tmp" | grep -v :)" ] || exit 20
    "#;
    let data = Data::new();
    let mut command = Command::new("unshare");
    command.args(["-m", "bash", "-euc", script, "-"]);
    let words = [data.0.path(), &mayfly(), &file, &made.0.path().join("why")];
    run(command.args(words));
}

#[test]
fn an_export_makes_a_file_for_its_user_alone_and_replaces_none() {
    let made = Data::new();
    let export = export(&made.0.path().join("made"));
    let file = made.0.path().join("file");
    fs::write(&file, &export).unwrap();
    let words = ["import", file.to_str().unwrap(), "b"];
    assert_eq!(run(&mut made.snapshot(&words)), "b\n");
    let output = made.snapshot(&words).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let words = ["export", "b", file.to_str().unwrap()];
    let output = made.snapshot(&words).output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("there is a file of that name"), "{told}");
    assert_eq!(fs::read(&file).unwrap(), export);
    let other = made.0.path().join("other");
    run(&mut made.snapshot(&["export", "b", other.to_str().unwrap()]));
    assert_eq!(parse_export(&fs::read(&other).unwrap()).unwrap().name, "b");
    let mode = run(Command::new("stat").args(["-c", "%a"]).arg(&other));
    assert_eq!(mode, "600\n");
    let shown = run(&mut made.snapshot(&["inspect", "b"]));
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown[0]["manifest"]["source"], "vm");
    let listed = run(&mut made.snapshot(&["ls"]));
    assert!(listed.contains("ready"), "{listed}");
}

/// Makes a template step by step. The test below runs it in a process of its own.
#[test]
fn a_template_is_made() {
    let own = tempfile::tempdir().unwrap();
    let folder = std::env::var_os(MAKE_IN).map_or(own.path().join("t"), PathBuf::from);
    let templates = Templates::open(&folder).unwrap();
    let new = begin(&templates);
    println!("begun");
    new.memory.set_len(MEMORY).unwrap();
    for at in (0..USED).step_by(USED / 16) {
        new.memory.write_all_at(&[7; USED / 16], at as u64).unwrap();
    }
    new.state.write_all_at(&[1; 5000], 0).unwrap();
    check(&new.publish().unwrap());
}

/// What other tests fork has this process's locks until it executes something.
fn begin(templates: &Templates) -> NewTemplate<'_> {
    let make = || templates.make(&key()).unwrap();
    eventually("to be the one that makes a template", make)
}

fn check(template: &Template) {
    let mut memory = vec![0; USED];
    template.memory.read_exact_at(&mut memory, 0).unwrap();
    assert!(memory.iter().all(|byte| *byte == 7));
    let mut state = vec![0; 5000];
    template.state.read_exact_at(&mut state, 0).unwrap();
    assert!(state.iter().all(|byte| *byte == 1));
}

#[test]
fn a_template_whose_maker_is_killed_at_any_moment_is_whole_or_not_there() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("templates");
    let templates = Templates::open(&folder).unwrap();
    let name = key().digest().unwrap().hex();
    let mut completed = 0;
    for attempt in 0..2000 {
        let mut maker = Command::new(std::env::current_exe().unwrap());
        maker.args(["--exact", "snapshots::a_template_is_made", "--nocapture"]);
        let pipes = maker.env(MAKE_IN, &folder).stdout(Stdio::piped());
        let mut child = pipes.stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        while !lines.next().unwrap().unwrap().contains("begun") {}
        thread::sleep(Duration::from_micros(150 * attempt));
        kill(child);
        if let Ok(template) = templates.find(&key()) {
            check(&template);
            drop(template);
            until("nothing to use it", || templates.remove(&name).is_ok());
            completed += 1;
        }
        // Nobody but the killed one was making it, and the next removes what is left.
        until("what is left to be removed", || {
            let _new = begin(&templates);
            count(&folder.join("tmp")) == 1
        });
        assert_eq!(count(&folder.join("tmp")) + count(&folder.join("ready")), 0);
        if completed == 3 {
            return;
        }
    }
    panic!("no template is ever complete");
}
