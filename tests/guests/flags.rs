//! Words of the command line on their way to the program, and flags as Docker has them.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use mayfly_testing::text;
use mayfly_testing::user::User;
use serde_json::json;

const LATIN: &[u8] = b"gr\xfcn";

fn with<'a>(mut command: Command, words: impl IntoIterator<Item = &'a [u8]>) -> Command {
    command.args(words.into_iter().map(OsStr::from_bytes));
    command
}

/// What a command that succeeds printed.
fn printed(mut command: Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    output.stdout
}

#[test]
fn words_pass_as_they_are() {
    let user = User::root();
    let folder = user.home.path().join(OsStr::from_bytes(b"f\xfc"));
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("in"), "it").unwrap();
    let file = user.home.path().join("env");
    fs::write(&file, b"FILE=\xfc\n").unwrap();
    let volume = [folder.as_os_str().as_bytes(), b":/v\xfc"].concat();
    let env_file = file.as_os_str().as_bytes();
    let script = b"cat /v\xfc/in; pwd; echo $FILE$OWN$HOSTS; printf '%s\\n' \"$@\"";
    let words = [
        &b"--rm"[..],
        b"--net",
        b"none",
        b"-v",
        &volume,
        b"-w",
        b"/w\xfc",
        b"--env-file",
        env_file,
        b"-e",
        b"OWN=\xfd",
        b"-e",
        b"HOSTS",
        b"demo",
        b"sh",
        b"-c",
        script,
        b"sh",
    ];
    let behind = [
        &b"--help"[..],
        b"-h",
        b"--rm",
        b"-v",
        b"-e",
        b"A=b",
        b"--",
        b"a",
        b"--",
        b"",
        LATIN,
    ];
    let mut command = with(user.mayfly(&["run"]), words.into_iter().chain(behind));
    command.env("HOSTS", OsStr::from_bytes(b"\xfe"));
    let lines = behind.join(&b"\n"[..]);
    let expected = [b"it/w\xfc\n\xfc\xfd\xfe\n", &lines[..], b"\n"].concat();
    assert_eq!(printed(command), expected);
}

#[test]
fn flags_are_docker_s() {
    let user = User::root();
    let home = user.home.path();
    let folder = home.join("d");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("in"), "it").unwrap();
    let (shared, bound) = (folder.display(), home.join("id"));
    let script = "trap 'echo got INT; exit 3' INT; while :; do sleep 0.1; done";
    let words = format!(
        "run -d --name f --network none --init --privileged --cap-add ALL --restart no \
         --pull never -q --platform linux/amd64 --ulimit nofile=64:128 --add-host db:192.0.2.7 \
         --add-host six=2001:db8::7 --mount type=bind,src={shared},dst=/b,readonly \
         --mount type=tmpfs,dst=/m,tmpfs-size=1m -v {shared}:/z:ro,z --shm-size 4m \
         --security-opt no-new-privileges -u nobody --group-add 1234 --stop-signal INT \
         --stop-timeout 60 --label a=b -l c --cidfile {} -e SECRET=hidden demo sh -c",
        bound.display()
    );
    let words: Vec<_> = words.split_whitespace().chain([script]).collect();
    assert_eq!(user.text(&words), "f\n");
    assert_eq!(fs::read(&bound).unwrap(), b"f");
    let again = user.output(&["run", "--cidfile", bound.to_str().unwrap(), "demo", "true"]);
    assert!(
        text(&again.stderr).contains("is there already"),
        "{again:?}"
    );

    // What others see of the VM's processes has no values.
    let inspect: serde_json::Value = serde_json::from_str(&user.text(&["inspect", "f"])).unwrap();
    let pid = inspect[0]["pid"].as_u64().unwrap();
    let shown = text(&fs::read(format!("/proc/{pid}/cmdline")).unwrap());
    assert!(
        shown.contains("SECRET=******") && !shown.contains("hidden"),
        "{shown}"
    );
    assert_eq!(inspect[0]["labels"], json!({"a": "b", "c": ""}));
    assert_eq!(inspect[0]["stop_signal"], libc::SIGINT);
    assert_eq!(inspect[0]["groups"], json!(["1234"]));

    // All of it holds for the processes of exec, too.
    let script = "ulimit -n; ulimit -Hn; cat /b/in /z/in; echo; id -G; grep NoNewPrivs /proc/self/status; \
                  touch /b/x 2>/dev/null || echo ro; df /m /dev/shm | awk '/tmpfs/{print $2}'; \
                  grep -c -e '192.0.2.7.db$' -e '2001:db8::7.six$' /etc/hosts; echo $SECRET";
    let expected = "64\n128\nitit\n65534 1234\nNoNewPrivs:\t1\nro\n1024\n4096\n2\nhidden\n";
    assert_eq!(user.text(&["exec", "f", "sh", "-c", script]), expected);

    // exec: words, variables of files, and what goes on by itself.
    let file = home.join("env");
    fs::write(&file, "A=1\n").unwrap();
    let env_file = file.to_str().unwrap();
    let words = [
        &b"--env-file"[..],
        env_file.as_bytes(),
        b"-e",
        b"B=\xfd",
        b"f",
        b"sh",
        b"-c",
        b"echo $A$B; printf '%s\\n' \"$@\"",
        b"sh",
        b"--help",
        b"--",
        b"-e",
        LATIN,
    ];
    let exec = with(user.mayfly(&["exec"]), words);
    assert_eq!(printed(exec), b"1\xfd\n--help\n--\n-e\ngr\xfcn\n");
    let script = "echo lost; sleep 1; echo done >/m/state";
    assert_eq!(user.text(&["exec", "-d", "f", "sh", "-c", script]), "");
    mayfly_testing::until("it goes on", || {
        user.output(&["exec", "f", "cat", "/m/state"]).stdout == b"done\n"
    });
    assert_eq!(
        user.output(&["exec", "-d", "f", "nothere"]).status.code(),
        Some(127)
    );
    assert_eq!(user.output(&["exec", "f"]).status.code(), Some(125));
    // A terminal needs none on the host's side, unless something is typed there.
    assert_eq!(user.text(&["exec", "-t", "f", "tty"]), "/dev/pts/0\r\n");
    let refused = user.output(&["exec", "-it", "f", "tty"]);
    assert_eq!(refused.status.code(), Some(125), "{refused:?}");

    assert_eq!(user.text(&["stop", "f"]), "f\n");
    assert_eq!(user.text(&["logs", "f"]), "got INT\n");
    assert_eq!(user.text(&["wait", "f"]), "3\n");
}

#[test]
fn a_terminal_needs_none_on_the_host() {
    let user = User::root();
    let output = user.text(&["run", "--rm", "-t", "--net", "none", "demo", "stty", "size"]);
    assert_eq!(output, "24 80\r\n");
    let refused = user.output(&["run", "--rm", "-it", "demo", "true"]);
    assert_eq!(refused.status.code(), Some(125), "{refused:?}");
}

#[test]
fn a_record_that_is_lost_is_no_success() {
    let user = User::root();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let words = ["run", "--rm", "--json", "--net", "none", "demo", "true"].map(OsString::from);
    let output = user.mayfly(&words).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(text(&output.stderr).contains("No space left"), "{output:?}");
}
