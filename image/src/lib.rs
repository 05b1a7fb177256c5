//! Container images: names, the store on disk, and how they get there.

#![cfg_attr(
    not(test),
    deny(
        clippy::cast_lossless,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss
    )
)]

mod archive;
mod compression;
mod config;
mod digest;
mod error;
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
pub mod tarball;
mod tree;
mod unpack;

pub use config::{ImageConfig, RootFs, RunConfig};
pub use digest::{Digest, Hasher, NotADigest};
pub use error::{Error, ErrorKind};
pub use layers::LAYER_ROOT;
pub use limits::Limits;
pub use progress::{Progress, Quiet, Task};
pub use pull::PullOptions;
pub use reference::{BadReference, Reference};
pub use store::removal::Pruned;
pub use store::{Image, Store};
pub use tree::normalised;
