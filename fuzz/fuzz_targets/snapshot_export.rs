//! Exported snapshots, and manifests.
#![no_main]

use mayfly_fuzz::snapshot;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| snapshot::export(bytes));
