//! Output that nobody takes: a reader that has gone is no news, a full disk is.

use std::fs::File;
use std::io;
use std::process::{Output, Stdio};

use crate::common::User;

const VERBS: [&[&str]; 12] = [
    &["--help"],
    &["--version"],
    &["run", "--help"],
    &["ps"],
    &["ps", "--json"],
    &["list"],
    &["stats", "--no-stream"],
    &["doctor"],
    &["image", "ls"],
    &["image", "prune"],
    &["volume", "ls"],
    &["volume", "create", "v"],
];

fn with_output(user: &User, words: &[&str], output: impl Into<Stdio>) -> Output {
    let (verb, words) = words.split_first().unwrap();
    let mut command = user.verb(verb);
    // No VM of anybody else's.
    command.env("MAYFLY_RUNTIME_DIR", user.home.path().join("run"));
    command.args(words).stdout(output).output().unwrap()
}

#[test]
fn a_reader_that_has_gone_is_no_news() {
    let user = User::root();
    for words in VERBS {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output = with_output(&user, words, writer);
        assert!(output.stderr.is_empty(), "{words:?}: {output:?}");
    }
}

#[test]
fn output_that_is_lost_is_no_success() {
    let user = User::root();
    for words in VERBS {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = with_output(&user, words, full);
        assert!(!output.status.success(), "{words:?}: {output:?}");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains("No space left"), "{words:?}: {errors}");
    }
}
