//! The entropy device's queue.
#![no_main]

use mayfly_fuzz::devices;
use mayfly_fuzz::guest::Action;

libfuzzer_sys::fuzz_target!(|program: Vec<Action<devices::Nothing>>| devices::rng(program));
