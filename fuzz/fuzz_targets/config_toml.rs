//! Files of --config.
#![no_main]

use mayfly_fuzz::config;

libfuzzer_sys::fuzz_target!(|text: &str| config::toml(text));
