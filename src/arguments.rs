//! The words that this process was started with, which everybody on the host can
//! read for as long as it lives.

#![allow(
    unsafe_code,
    reason = "words of the command line are overwritten in place"
)]

use std::ffi::{CStr, c_char, c_int};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Where they are: the words themselves, not copies.
static WORDS: AtomicPtr<*mut c_char> = AtomicPtr::new(ptr::null_mut());

/// glibc calls what is listed here, before `main`, with what `main` gets.
#[used]
#[unsafe(link_section = ".init_array")]
static NOTE: extern "C" fn(c_int, *mut *mut c_char, *mut *mut c_char) = note;

extern "C" fn note(_: c_int, words: *mut *mut c_char, _: *mut *mut c_char) {
    WORDS.store(words, Ordering::Relaxed);
}

/// Overwrites the values of `-e NAME=VALUE` and `--env NAME=VALUE`. Copies must have
/// been taken before, and there must be no other thread.
pub fn hide_values() {
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
        is_value = matches!(text, b"-e" | b"--env");
        for place in hidden {
            // SAFETY: within the string, whose end is not touched.
            unsafe { word.add(place).write(b'*'.cast_signed()) };
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
    fn the_words_are_where_they_are_looked_for() {
        let words = WORDS.load(Ordering::Relaxed);
        assert!(!words.is_null());
        // SAFETY: there is a first word.
        let first = unsafe { CStr::from_ptr(*words) };
        let copy = std::env::args_os().next().unwrap();
        assert_eq!(first.to_bytes(), copy.as_encoded_bytes());
    }
}
