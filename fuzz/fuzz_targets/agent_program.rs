//! A program's file that Linux refused to execute.
#![no_main]

use mayfly_fuzz::agent;

libfuzzer_sys::fuzz_target!(|head: &[u8]| agent::program(head));
