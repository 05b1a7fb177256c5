//! What clients say to the control socket.
#![no_main]

use mayfly_fuzz::control;

libfuzzer_sys::fuzz_target!(|text: &[u8]| control::client(text));
