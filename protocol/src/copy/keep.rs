//! What is kept of an entry where it is made.

/// What of an entry is kept beside its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Owners and groups; else all is whose process this is.
    pub owners: bool,
    /// Devices, named pipes, and the bits that lend a program its owner's rights.
    /// Where entries come from a party that is not to be trusted, they are left out.
    pub special: bool,
}
