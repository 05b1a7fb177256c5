//! Telling a user how far long work is.

/// A listener to the progress of a long operation.
pub trait Progress: Sync {
    /// Some work begins: what it is, and how many bytes there are if that is known.
    fn begin(&self, what: &str, total: Option<u64>) -> Box<dyn Task>;
}

/// Work that goes on. It ends when this is dropped.
pub trait Task: Send + Sync {
    /// This number of bytes more is done.
    fn advance(&self, bytes: u64);
}

/// Tells nothing.
pub struct Quiet;

impl Progress for Quiet {
    fn begin(&self, _what: &str, _total: Option<u64>) -> Box<dyn Task> {
        Box::new(Quiet)
    }
}

impl Task for Quiet {
    fn advance(&self, _bytes: u64) {}
}
