//! Where templates and snapshots are kept: a folder each, with the guest's memory (`memory`),
//! the rest of its state (`state`), and what they are (`manifest.json`).
//!
//! [`Templates`] are in the user's cache folder: they make starts warm, and can be made
//! again. [`Snapshots`] are in the user's data folder, and have their disks beside
//! (`disk-0` and so on). Nobody but their user may read either, as they hold a guest's memory.
//!
//! A folder comes into place by a rename, when all of it is written and synchronized; its
//! maker has it locked until then, and what a killed maker left goes with the next. Whoever
//! uses one has a shared lock on it, so that nothing in use is removed.

mod build;
mod entry;
mod export;
mod file_digest;
mod host;
mod key;
mod manifest;
mod parts;
mod snapshots;
mod templates;

#[cfg(test)]
mod snapshot_tests;
#[cfg(test)]
mod tests;

pub use entry::{ManifestError, parse_manifest};
pub use export::{ExportError, parse as parse_export};
pub use file_digest::FileDigests;
pub use host::Host;
pub use key::{FORMAT, TemplateKey};
pub use manifest::{DiskPart, Part, SnapshotManifest, TemplateManifest};
pub use snapshots::{ListedSnapshot, NewSnapshot, Snapshot, Snapshots, Source};
pub use templates::{BUDGET, Listed, Miss, NewTemplate, Template, Templates};
