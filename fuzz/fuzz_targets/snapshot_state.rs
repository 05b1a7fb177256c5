//! State files, and what KVM is to hold by them.
#![no_main]

use mayfly_fuzz::snapshot;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| snapshot::state_file(bytes));
