//! Why a sandbox could not be closed.

use std::fmt::Display;
use std::io;
use std::os::fd::RawFd;

use super::layers::Layer;

/// Why a sandbox could not be closed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host lacks a layer, and all are required.
    #[error("{0}")]
    Refused(String),
    /// The host refuses something that every sandbox needs.
    #[error("{what}: {source}")]
    Host {
        /// The operation.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// A call failed that cannot.
    #[error("{what}: {source}")]
    Internal {
        /// The operation.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// A directory is open: from it, all of the host's file system can be reached.
    #[error("the sandbox would have a directory, descriptor {0}")]
    Directory(RawFd),
    /// Threads that wait for the sandbox were told that there will be none.
    #[error("a device was taken apart before the sandbox was closed")]
    GivenUp,
}

impl Error {
    /// True if the host is not to blame.
    pub fn is_internal(&self) -> bool {
        match self {
            Error::Refused(_) | Error::Host { .. } => false,
            Error::Internal { .. } | Error::Directory(_) | Error::GivenUp => true,
        }
    }
}

/// Turns an error of the host into an [`Error`] that says what was being done.
pub(crate) trait Context<T> {
    /// The host is at fault.
    fn or_host(self, what: impl Display) -> Result<T, Error>;

    /// This crate is at fault.
    fn or_internal(self, what: impl Display) -> Result<T, Error>;
}

impl<T> Context<T> for io::Result<T> {
    fn or_host(self, what: impl Display) -> Result<T, Error> {
        let what = what.to_string();
        self.map_err(|source| Error::Host { what, source })
    }

    fn or_internal(self, what: impl Display) -> Result<T, Error> {
        let what = what.to_string();
        self.map_err(|source| Error::Internal { what, source })
    }
}

/// What is said where a layer is required, and missing.
pub(crate) fn refusal(layer: Layer, why: &dyn Display) -> String {
    format!(
        "--sandbox=require: {layer}: {why}; {}, or use --sandbox=on",
        layer.remedy()
    )
}
