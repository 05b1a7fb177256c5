//! Why something about images failed.

use std::error::Error as StdError;
use std::fmt;

/// What kind of failure an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// What was asked for, or the image that was given, cannot be.
    Invalid,
    /// There is no such image in the store.
    NotFound,
    /// A VM or another command uses the image.
    InUse,
    /// A registry refuses, cannot be reached, or does not keep its promises.
    Registry,
    /// The host refuses: a file, or a tool.
    Host,
    /// A mistake in this crate.
    Internal,
}

/// What failed, of which kind that is, and its cause ([`source`](StdError::source)).
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Error {
    kind: ErrorKind,
    what: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// The kind of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// A failure without a cause.
    pub(crate) fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Error {
            kind,
            what: what.into(),
            source: None,
        }
    }

    /// What was asked for, or the image that was given, cannot be.
    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Error::new(ErrorKind::Invalid, what)
    }

    /// The host refuses.
    pub(crate) fn host(what: impl Into<String>) -> Self {
        Error::new(ErrorKind::Host, what)
    }

    /// A registry refuses.
    pub(crate) fn registry(what: impl Into<String>) -> Self {
        Error::new(ErrorKind::Registry, what)
    }

    /// The same, with the name of what it was found in.
    pub(crate) fn within(self, outer: &str) -> Self {
        Error {
            what: format!("{outer}: {}", self.what),
            ..self
        }
    }
}

/// Turns another error into an [`Error`] that says what was being done.
pub(crate) trait Context<T>: Sized {
    /// Fails with an error of a kind, of which this is the cause.
    fn context(self, kind: ErrorKind, what: impl fmt::Display) -> Result<T, Error>;

    /// The request or the image is at fault.
    fn or_invalid(self, what: impl fmt::Display) -> Result<T, Error> {
        self.context(ErrorKind::Invalid, what)
    }

    /// The host is at fault.
    fn or_host(self, what: impl fmt::Display) -> Result<T, Error> {
        self.context(ErrorKind::Host, what)
    }

    /// This crate is at fault.
    fn or_internal(self, what: impl fmt::Display) -> Result<T, Error> {
        self.context(ErrorKind::Internal, what)
    }
}

impl<T, E: StdError + Send + Sync + 'static> Context<T> for Result<T, E> {
    fn context(self, kind: ErrorKind, what: impl fmt::Display) -> Result<T, Error> {
        self.map_err(|error| Error {
            kind,
            what: what.to_string(),
            source: Some(Box::new(error)),
        })
    }
}
