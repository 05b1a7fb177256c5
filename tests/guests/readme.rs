//! What the README shows is what happens: its commands, run as they are printed, one after the
//! other, print what is below them.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use mayfly_testing::text;
use mayfly_testing::user::User;

/// A command of the README.
#[derive(Debug)]
struct Shown {
    command: String,
    /// What it prints: blanks are any blanks, `…` is anything, on a line of its own any lines.
    output: Vec<String>,
}

/// This runs as part of it.
const ITSELF: &str = "scripts/test";
/// The command that writes to /usr/local, and what keeps that away from the host.
const INSTALLS: &str = "scripts/install";
const OWN_USR_LOCAL: &str = "unshare --mount bash -euc '
    memory=$(mktemp -d)
    mount -t tmpfs tmpfs $memory
    mkdir $memory/upper $memory/work
    mount -t overlay overlay -o lowerdir=/usr/local,upperdir=$memory/upper,workdir=$memory/work /usr/local
    exec \"$@\"' -";

/// The commands of a text, in its order: indented lines that begin with `$ `, and what is
/// indented below them.
fn commands(text: &str) -> Vec<Shown> {
    let mut all: Vec<Shown> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        let Some(line) = line.strip_prefix("    ") else {
            inside = false;
            continue;
        };
        if let Some(command) = line.strip_prefix("$ ") {
            // What is behind it for the reader.
            let command = command.split("    #").next().unwrap().trim();
            all.push(Shown {
                command: command.to_owned(),
                output: Vec::new(),
            });
            inside = true;
        } else if inside {
            all.last_mut().unwrap().output.push(line.to_owned());
        }
    }
    all
}

/// Whether a line is as shown.
fn line_is(line: &str, shown: &str) -> bool {
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (line, shown) = (words(line), words(shown));
    let mut parts = shown.split('…').map(str::trim);
    let Some(rest) = line.strip_prefix(parts.next().unwrap()) else {
        return false;
    };
    let (mut rest, mut open) = (rest, false);
    for part in parts {
        let Some(at) = rest.find(part) else {
            return false;
        };
        (rest, open) = (&rest[at + part.len()..], part.is_empty());
    }
    open || rest.trim().is_empty()
}

/// Whether an output is as shown.
fn output_is(lines: &[&str], shown: &[String]) -> bool {
    match (lines.split_first(), shown.split_first()) {
        (None, None) => true,
        (_, Some((shown, rest))) if shown.trim() == "…" => {
            (0..=lines.len()).any(|skipped| output_is(&lines[skipped..], rest))
        }
        (Some((line, lines)), Some((shown, rest))) => {
            line_is(line, shown) && output_is(lines, rest)
        }
        _ => false,
    }
}

/// Without what moves a terminal's cursor.
fn plain(output: &str) -> String {
    let mut plain = String::new();
    let mut parts = output.split("\u{1b}[");
    plain += parts.next().unwrap();
    for part in parts {
        let end = part.find(|it: char| it.is_ascii_alphabetic());
        plain += end.map_or("", |end| &part[end + 1..]);
    }
    plain.replace('\r', "")
}

/// Runs a command in a shell, with a terminal if it asks for one. What waits for its user is
/// told to exit.
fn run(user: &User, shown: &Shown) {
    let command = match shown.command == INSTALLS {
        true => format!("{OWN_USR_LOCAL} {INSTALLS}"),
        false => shown.command.clone(),
    };
    let merged = format!("exec 2>&1\n{command}");
    let terminal = shown.command.contains(" -it ");
    let (program, flags) = match terminal {
        true => ("script", ["-qec", &merged, "/dev/null"].to_vec()),
        false => ("bash", ["-c", &merged].to_vec()),
    };
    let mut child = user
        .program(program)
        .args(flags)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let user = thread::spawn(move || {
        // A guest that still starts does not hear it.
        while input.write_all(b"exit\n").is_ok() && !terminal {
            thread::sleep(Duration::from_secs(1));
        }
    });
    let output = child.wait_with_output().unwrap();
    user.join().unwrap();
    let printed = plain(&text(&output.stdout));
    let all = format!("$ {}\n{}\n{printed}", shown.command, output.status);
    assert!(output.status.success(), "{all}");
    let lines: Vec<&str> = printed.lines().collect();
    let is = shown.output.is_empty() || output_is(&lines, &shown.output);
    assert!(is, "{all}\nis not {:#?}", shown.output);
}

#[test]
fn commands_print_what_is_shown() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let user = User::root();
    let all = commands(&readme);
    assert!(all.len() >= 15, "{all:#?}");
    for shown in all {
        if shown.command != ITSELF {
            println!("$ {}", shown.command);
            run(&user, &shown);
        }
    }
}

#[test]
fn what_is_not_as_shown_is_noticed() {
    let text = "\n    $ a    # b\n    c\n    …\n\n    picture\n    $ d\n";
    let found = commands(text);
    let words: Vec<_> = found
        .iter()
        .map(|it| (&*it.command, it.output.len()))
        .collect();
    assert_eq!(words, [("a", 2), ("d", 0)]);
    for (line, shown, is) in [
        ("web", "web", true),
        ("web2", "web", false),
        ("web 2", "web …", true),
        ("a   1 b", "a … b", true),
        ("a   1 c", "a … b", false),
        ("x a", "a", false),
        ("demo-1f", "demo-…", true),
        ("other-1f", "demo-…", false),
    ] {
        assert_eq!(line_is(line, shown), is, "{line:?} {shown:?}");
    }
    let shown = ["a".to_owned(), "…".to_owned()];
    assert!(output_is(&["a", "b", "c"], &shown));
    assert!(output_is(&["a"], &shown));
    assert!(!output_is(&["b"], &shown));
    assert_eq!(plain("/ # \u{1b}[6nexit\r\n"), "/ # exit\n");
}
