//! A folder's device, and a backend that says what it likes.
#![no_main]

use mayfly_fuzz::devices;
use mayfly_fuzz::guest::Action;

libfuzzer_sys::fuzz_target!(
    |program: (Vec<devices::Answer>, Vec<Action<devices::Nothing>>)| devices::vhost_user(program)
);
