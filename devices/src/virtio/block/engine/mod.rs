//! Doing I/O without blocking: raw images by io_uring, or by threads where it
//! is refused; other formats by threads.

mod concat;
mod image;
mod inline;
mod operation;
mod page_cache;
mod plain_clusters;
mod qcow2;
mod submission;
mod threads;
mod uring;

pub use self::concat::Concat;
pub use self::image::Image;
pub use self::operation::{Completion, DEPTH, Kind, Operation, Submitted};
pub use self::qcow2::{Backing, ImageError, Qcow2, qcow2_size};
pub use self::submission::Engine;
#[cfg(test)]
pub use self::threads::Worker;
pub use self::threads::{Prepare, unprepared};
pub use self::uring::{restricted_ring, try_ring};
