//! Why a comparison, or a container, failed.

use std::error::Error as StdError;
use std::fmt;

use mayfly_text::errors::with_causes;
use mayfly_text::printable;

/// Whose fault an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// What was asked for cannot be, or its command failed.
    Invalid,
    /// The host refuses, or lacks something.
    Host,
    /// A mistake in this crate.
    Internal,
}

/// What failed, whose fault that is, and its cause ([`source`](StdError::source)).
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Error {
    kind: ErrorKind,
    what: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// It, with its causes, harmless to a terminal.
    pub fn text(&self) -> String {
        printable::lines(with_causes(self.to_string(), self).as_bytes())
    }

    fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Error {
            kind,
            what: what.into(),
            source: None,
        }
    }

    /// An error of what the user asked for.
    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Error::new(ErrorKind::Invalid, what)
    }

    /// The host refuses.
    pub(crate) fn host(what: impl Into<String>) -> Self {
        Error::new(ErrorKind::Host, what)
    }
}

impl From<mayfly_image::Error> for Error {
    fn from(error: mayfly_image::Error) -> Self {
        use mayfly_image::ErrorKind as Image;
        let kind = match error.kind() {
            Image::Invalid | Image::NotFound => ErrorKind::Invalid,
            Image::InUse | Image::Registry | Image::Host => ErrorKind::Host,
            Image::Internal => ErrorKind::Internal,
        };
        Error::new(kind, with_causes(error.to_string(), &error))
    }
}

/// Turns another error into an [`Error`] that says what was being done.
pub(crate) trait Context<T>: Sized {
    /// Fails with an error of a kind, of which this is the cause.
    fn context(self, kind: ErrorKind, what: impl fmt::Display) -> Result<T, Error>;

    /// Blames what the user asked for.
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
