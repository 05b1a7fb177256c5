//! What the guest's programs share with the host: the words they use, and the
//! copying of files.

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

pub mod copy;
pub mod facts;
pub mod init_words;
pub mod peer;
pub mod program;
pub mod protocol;
pub mod steady;
