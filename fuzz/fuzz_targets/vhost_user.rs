//! A folder's device, and a backend that says what it likes.
#![no_main]

use mayfly_fuzz::guest::Action;
use mayfly_fuzz::{devices, folders};

libfuzzer_sys::fuzz_target!(
    |program: (Vec<folders::Answer>, Vec<Action<devices::Nothing>>)| folders::vhost_user(program)
);
