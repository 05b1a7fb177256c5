//! Why mayfly ends without success, and the exit code for it.

use std::error::Error;
use std::fmt;
use std::io;

use mayfly_image::ErrorKind;
use mayfly_text::errors::with_causes;
use serde::{Deserialize, Serialize};

use mayfly_text::printable;

use mayfly_compare as compare;
use mayfly_sandbox as sandbox;

/// Whose fault it is; the value is the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Class {
    /// mayfly itself failed.
    Internal = 1,
    /// What the user asked for cannot be.
    Config = 2,
    /// The host refuses: KVM, a permission, a lock.
    Host = 3,
    /// The guest crashed, or hung.
    GuestCrash = 4,
    /// The guest's kernel panicked.
    GuestPanic = 5,
    /// Whoever read the output has gone: there is nobody to tell. The status is that of
    /// a process that SIGPIPE ended.
    ReaderGone = 141,
}

/// One line for the user, and its class.
#[derive(Debug)]
pub struct Failure {
    /// The class.
    pub class: Class,
    message: String,
    signal: Option<i32>,
}

/// What a shell adds to a signal's number.
const SIGNALLED: u8 = 128;

impl Failure {
    /// A failure with a message of its own. What it has of others' words, such as an
    /// image's, is harmless to a terminal.
    pub fn new(class: Class, message: impl Into<String>) -> Self {
        let message = printable::lines(message.into().as_bytes());
        Failure {
            class,
            message,
            signal: None,
        }
    }

    /// A signal ended what had not begun yet.
    pub fn signalled(signal: i32) -> Self {
        let message = format!("signal {signal} ended it while it started");
        Failure {
            signal: Some(signal),
            ..Failure::new(Class::Host, message)
        }
    }

    /// The signal that is why.
    pub fn signal(&self) -> Option<i32> {
        self.signal
    }

    /// The status to exit with, if a signal is why.
    pub fn signal_status(&self) -> Option<u8> {
        let signal = u8::try_from(self.signal?).ok()?;
        Some(SIGNALLED.saturating_add(signal))
    }

    /// The status to exit with.
    pub fn status(&self) -> u8 {
        self.signal_status().unwrap_or(self.class as u8)
    }

    /// What the user asked for cannot be.
    pub fn config(message: impl Into<String>) -> Self {
        Failure::new(Class::Config, message)
    }

    /// The host refuses.
    pub fn host(message: impl Into<String>) -> Self {
        Failure::new(Class::Host, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Failure {}

/// Turns an error into a [`Failure`] that says what was being done.
pub trait OrFail<T> {
    /// Fails with `WHAT: ERROR: CAUSE…`.
    fn or_fail(self, class: Class, what: impl fmt::Display) -> Result<T, Failure>;

    /// The user's fault.
    fn or_config(self, what: impl fmt::Display) -> Result<T, Failure>
    where
        Self: Sized,
    {
        self.or_fail(Class::Config, what)
    }

    /// The host's fault.
    fn or_host(self, what: impl fmt::Display) -> Result<T, Failure>
    where
        Self: Sized,
    {
        self.or_fail(Class::Host, what)
    }

    /// Our fault.
    fn or_internal(self, what: impl fmt::Display) -> Result<T, Failure>
    where
        Self: Sized,
    {
        self.or_fail(Class::Internal, what)
    }
}

impl From<mayfly_image::Error> for Failure {
    fn from(error: mayfly_image::Error) -> Self {
        let class = match error.kind() {
            ErrorKind::Invalid | ErrorKind::NotFound => Class::Config,
            ErrorKind::InUse | ErrorKind::Registry | ErrorKind::Host => Class::Host,
            ErrorKind::Internal => Class::Internal,
        };
        Failure::new(class, with_causes(error.to_string(), &error))
    }
}

impl From<sandbox::Error> for Failure {
    fn from(error: sandbox::Error) -> Self {
        let class = match error.is_internal() {
            true => Class::Internal,
            false => Class::Host,
        };
        Failure::new(class, error.to_string())
    }
}

impl From<compare::Error> for Failure {
    fn from(error: compare::Error) -> Self {
        let class = match error.kind() {
            compare::ErrorKind::Invalid => Class::Config,
            compare::ErrorKind::Host => Class::Host,
            compare::ErrorKind::Internal => Class::Internal,
        };
        Failure::new(class, error.text())
    }
}

impl<T, E: Error> OrFail<T> for Result<T, E> {
    fn or_fail(self, class: Class, what: impl fmt::Display) -> Result<T, Failure> {
        self.map_err(|error| {
            let message = with_causes(format!("{what}: {error}"), &error);
            Failure::new(class, message)
        })
    }
}

/// An error and its causes, each of them told once.
pub fn chain(error: &dyn Error) -> String {
    with_causes(error.to_string(), error)
}

/// Why a file of the host cannot be had: a missing one is the user's fault, a forbidden one
/// the host's refusal.
pub fn file_refusal(error: &io::Error, flag: &str) -> Failure {
    let (class, message) = match error.kind() {
        io::ErrorKind::NotFound => (Class::Config, "no such file".to_owned()),
        io::ErrorKind::IsADirectory => (Class::Config, "is a directory, not a file".to_owned()),
        io::ErrorKind::NotADirectory => (Class::Config, "a part of the path is no folder".into()),
        io::ErrorKind::PermissionDenied => (
            Class::Host,
            "no permission; see its owner and mode with ls -l".to_owned(),
        ),
        _ => (Class::Host, error.to_string()),
    };
    Failure::new(class, format!("{flag}: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_say_is_harmless_and_told_once() {
        let failure = Failure::config("the image's STOPSIGNAL \x1b[2J\u{9b}K is no signal");
        let expected = "the image's STOPSIGNAL ?[2J?K is no signal";
        assert_eq!(failure.to_string(), expected);
        let error = || io::Error::other("a\x1bb");
        let failure = Err::<(), _>(error()).or_host("\x1b]0;x\x07").unwrap_err();
        assert_eq!(failure.to_string(), "?]0;x?: a?b");
        #[derive(Debug, thiserror::Error)]
        #[error("{0}")]
        struct Twice(#[source] io::Error);
        let failure = Err::<(), _>(Twice(error())).or_host("x").unwrap_err();
        assert_eq!(failure.to_string(), "x: a?b");
    }

    #[derive(Debug, thiserror::Error)]
    enum Outer {
        #[error("reading it: {0}")]
        Told(#[source] io::Error),
        #[error("reading it")]
        Untold(#[source] io::Error),
        #[error("{0}")]
        Same(#[source] io::Error),
    }

    #[test]
    fn what_images_fail_with_is_told_with_its_cause() {
        let error = mayfly_image::Store::open("/proc/nothing".as_ref())
            .err()
            .unwrap();
        let failure = Failure::from(error);
        let expected = "image store /proc/nothing: No such file or directory (os error 2)";
        assert_eq!(failure.to_string(), expected);
        assert_eq!(failure.class, Class::Host);
        let folder = tempfile::tempdir().unwrap();
        let store = mayfly_image::Store::open(&folder.path().join("store")).unwrap();
        let failure = Failure::from(store.remove("a:1").unwrap_err());
        assert_eq!(failure.to_string(), "a:1: no such image");
        assert_eq!(failure.class, Class::Config);
    }

    #[test]
    fn a_cause_is_told_once() {
        let error = || io::Error::other("no space");
        for (outer, told) in [
            (Outer::Told(error()), "x: reading it: no space"),
            (Outer::Untold(error()), "x: reading it: no space"),
            (Outer::Same(error()), "x: no space"),
        ] {
            let failure = Err::<(), _>(outer).or_host("x").unwrap_err();
            assert_eq!(failure.to_string(), told);
        }
    }
}
