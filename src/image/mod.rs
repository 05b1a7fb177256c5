//! Container images: names, the store on disk, and how they get there.

mod archive;
mod compression;
mod config;
mod digest;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod import;
mod json;
mod layers;
mod limits;
mod obtain;
mod progress;
mod pull;
mod records;
mod reference;
mod registry;
mod section;
mod source;
mod store;
pub(crate) mod tarball;
pub(crate) mod tree;
mod unpack;

pub use config::{ImageConfig, RootFs, RunConfig};
pub use digest::{Digest, NotADigest};
pub use layers::LAYER_ROOT;
pub use limits::Limits;
pub use progress::{Bars, Progress, Quiet, Task};
pub use pull::PullOptions;
pub use reference::{BadReference, Reference};
pub use store::{Image, Pruned, Store, data_folder};
