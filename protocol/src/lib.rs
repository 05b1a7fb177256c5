//! What the host and the programs in a guest say to each other: both ends use it, and it
//! knows neither.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::string_slice))]
#![cfg_attr(
    not(test),
    deny(
        clippy::cast_lossless,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss
    )
)]

pub mod agent;
pub mod copy;
pub mod facts;
pub mod init_words;
pub mod mailbox;
pub mod peer;
pub mod steady;
