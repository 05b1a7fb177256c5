//! The words that this process was started with, which everybody on the host can
//! read for as long as it lives.

#![allow(
    unsafe_code,
    reason = "words of the command line are overwritten in place"
)]

use std::ffi::{CStr, OsStr, OsString, c_char, c_int};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use rustix::fs::{MemfdFlags, memfd_create};

/// Where they are: the words themselves, not copies.
static WORDS: AtomicPtr<*mut c_char> = AtomicPtr::new(ptr::null_mut());

/// glibc calls what is listed here, before `main`, with what `main` gets.
#[used]
#[unsafe(link_section = ".init_array")]
static NOTE: extern "C" fn(c_int, *mut *mut c_char, *mut *mut c_char) = note;

extern "C" fn note(_: c_int, words: *mut *mut c_char, _: *mut *mut c_char) {
    WORDS.store(words, Ordering::Relaxed);
}

/// The verbs with values to hide.
const VERBS: [&str; 2] = ["run", "exec"];
/// What a process begins with that gets its words from another.
const HANDED_OVER: [&str; 2] = ["run", "--detached"];
/// What a process begins with that starts again in place of one that failed, before the file
/// with its words.
const AGAIN: [&str; 2] = ["run", "--again"];
/// Linux lets no program be started with more.
const WORDS_MAX: u64 = 8 << 20;

/// All words, before anything else is done: what may be secret in them is then no
/// longer to be seen from outside. There must be no other thread.
pub fn take() -> io::Result<Vec<OsString>> {
    let mut words: Vec<OsString> = std::env::args_os().collect();
    let begins = |index: usize, known: &str| words.get(index).is_some_and(|it| it == known);
    if VERBS.iter().any(|verb| begins(1, verb)) {
        hide_values();
    }
    let begin = |known: [&str; 2]| (1..).zip(known).all(|(at, known)| begins(at, known));
    if begin(HANDED_OVER) {
        // The name stays; the rest is what others may see.
        words.truncate(HANDED_OVER.len() + 2);
        words.extend(read_words(io::stdin().lock())?);
    } else if begin(AGAIN) {
        let number = words.get(AGAIN.len() + 1).and_then(|word| word.to_str());
        let file = number.and_then(|number| number.parse::<RawFd>().ok());
        let file = file.ok_or(io::ErrorKind::InvalidInput)?;
        // By its name: whoever wrote this number by hand loses nothing.
        let file = File::open(format!("/proc/self/fd/{file}"))?;
        words.truncate(AGAIN.len());
        words.extend(read_words(file)?);
    }
    Ok(words)
}

/// Reads what [`write_words`] wrote.
fn read_words(from: impl Read) -> io::Result<Vec<OsString>> {
    let mut all = Vec::new();
    from.take(WORDS_MAX).read_to_end(&mut all)?;
    let words = all.strip_suffix(b"\0");
    let words = words.map(|words| words.split(|&byte| byte == 0));
    let words = words.into_iter().flatten();
    Ok(words
        .map(|word| OsString::from_vec(word.to_vec()))
        .collect())
}

/// Executes this program again, in this process: `mayfly run` with these words behind it. It
/// returns only if that fails.
pub fn run_again(words: &[OsString]) -> io::Error {
    let execute = || {
        let mut file = File::from(memfd_create("words", MemfdFlags::empty())?);
        write_words(words, &mut file)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(AGAIN).arg(file.as_raw_fd().to_string());
        command.args(without_values(words));
        Ok(command.exec())
    };
    execute().unwrap_or_else(|error| error)
}

/// Whether these are few enough to be taken.
pub fn can_be_handed_over(words: &[OsString]) -> bool {
    let lens = words.iter().map(|word| word.len() as u64 + 1);
    lens.sum::<u64>() <= WORDS_MAX
}

/// Gives words to a process that was started with [`HANDED_OVER`].
pub fn write_words(words: &[OsString], mut to: impl Write) -> io::Result<()> {
    for word in words {
        to.write_all(word.as_bytes())?;
        to.write_all(b"\0")?;
    }
    to.flush()
}

/// Words as others may see them.
pub fn without_values(words: &[OsString]) -> Vec<OsString> {
    let mut is_value = false;
    let mut hide = |word: &OsString| {
        let mut bytes = word.as_bytes().to_vec();
        let hidden = value(&bytes, is_value);
        is_value = is_flag(&bytes);
        bytes.get_mut(hidden).unwrap_or_default().fill(HIDDEN);
        OsString::from_vec(bytes)
    };
    words.iter().map(&mut hide).collect()
}

/// What is before the first byte of a kind, and what is behind it, if there is one.
pub fn split_at(text: &OsStr, byte: u8) -> (&[u8], Option<&[u8]>) {
    let bytes = text.as_bytes();
    let mut parts = bytes.splitn(2, |&it| it == byte);
    (parts.next().unwrap_or_default(), parts.next())
}

/// What stands where a value was.
const HIDDEN: u8 = b'*';

/// The next word is a variable.
fn is_flag(word: &[u8]) -> bool {
    match word {
        b"--env" => true,
        [b'-', b'-', ..] => false,
        // Short flags may come together: -ite NAME=VALUE.
        [b'-', .., last] => *last == b'e' && !word.contains(&b'='),
        _ => false,
    }
}

/// Overwrites the values of `-e NAME=VALUE` and `--env NAME=VALUE`. Copies must have
/// been taken before, and there must be no other thread.
fn hide_values() {
    let words = WORDS.swap(ptr::null_mut(), Ordering::Relaxed);
    if words.is_null() {
        return;
    }
    let mut is_value = false;
    for index in 0.. {
        // SAFETY: a list that ends with a null pointer, which stays where it is as
        // long as the process lives.
        let word = unsafe { *words.add(index) };
        if word.is_null() {
            return;
        }
        // SAFETY: a string in memory that the process may write to; nobody else does.
        let text = unsafe { CStr::from_ptr(word) }.to_bytes();
        let hidden = value(text, is_value);
        is_value = is_flag(text);
        for place in hidden {
            // SAFETY: within the string, whose end is not touched.
            unsafe { word.add(place).write(HIDDEN.cast_signed()) };
        }
    }
}

/// Where a word has something to hide; `is_value` if the one before it said so.
fn value(word: &[u8], is_value: bool) -> std::ops::Range<usize> {
    let start = match word {
        _ if is_value => 0,
        [b'-', b'-', b'e', b'n', b'v', b'=', ..] => b"--env=".len(),
        [b'-', b'-', ..] => return 0..0,
        // Short flags may come together: -ite NAME=VALUE, -ieNAME=VALUE.
        [b'-', flags @ ..] => match flags.iter().position(|&flag| flag == b'e') {
            Some(place) => place + 2,
            None => return 0..0,
        },
        _ => return 0..0,
    };
    let rest = word.get(start..).unwrap_or_default();
    match rest.iter().position(|&byte| byte == b'=') {
        Some(place) => start + place + 1..word.len(),
        None => 0..0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_and_nothing_else() {
        let left = |word: &str, is_value| {
            let mut bytes = word.as_bytes().to_vec();
            bytes[value(word.as_bytes(), is_value)].fill(b'*');
            String::from_utf8(bytes).unwrap()
        };
        assert_eq!(left("KEY=secret", true), "KEY=******");
        assert_eq!(left("KEY", true), "KEY");
        assert_eq!(left("--env=KEY=a=b", false), "--env=KEY=***");
        assert_eq!(left("-eKEY=ab", false), "-eKEY=**");
        assert_eq!(left("-iteKEY=ab", false), "-iteKEY=**");
        for other in [
            "KEY=b",
            "--entrypoint=a=b",
            "-it",
            "-w",
            "--env-file=a=b",
            "",
        ] {
            assert_eq!(left(other, false), other);
        }
    }

    #[test]
    fn words_are_handed_over_whole_and_shown_without_values() {
        let words = [
            "-it",
            "-ite",
            "KEY=secret",
            "--env",
            "A=b",
            "-eC=d",
            "img",
            "",
            "-e",
        ];
        let words = words.map(OsString::from);
        let shown = without_values(&words);
        let expected = [
            "-it",
            "-ite",
            "KEY=******",
            "--env",
            "A=*",
            "-eC=*",
            "img",
            "",
            "-e",
        ];
        assert_eq!(shown, expected);
        let mut wire = Vec::new();
        write_words(&words, &mut wire).unwrap();
        let all = wire.strip_suffix(b"\0").unwrap().split(|&byte| byte == 0);
        let all: Vec<_> = all.map(|word| OsString::from_vec(word.to_vec())).collect();
        assert_eq!(all, words);
    }

    #[test]
    fn the_words_are_where_they_are_looked_for() {
        let words = WORDS.load(Ordering::Relaxed);
        assert!(!words.is_null());
        // SAFETY: there is a first word.
        let first = unsafe { CStr::from_ptr(*words) };
        let copy = std::env::args_os().next().unwrap();
        assert_eq!(first.to_bytes(), copy.as_encoded_bytes());
    }
}
