//! What is written behind flags.
#![no_main]

use mayfly_fuzz::config;

libfuzzer_sys::fuzz_target!(|text: &str| config::flags(text));
