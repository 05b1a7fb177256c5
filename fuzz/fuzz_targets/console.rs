//! A console's queues.
#![no_main]

use mayfly_fuzz::devices;
use mayfly_fuzz::guest::Action;

libfuzzer_sys::fuzz_target!(|program: Vec<Action<devices::Typing>>| devices::console(program));
