//! A disk's queues.
#![no_main]

use mayfly_fuzz::devices;
use mayfly_fuzz::guest::Action;

libfuzzer_sys::fuzz_target!(
    |program: (bool, Vec<Action<devices::Request>>)| devices::block(program)
);
