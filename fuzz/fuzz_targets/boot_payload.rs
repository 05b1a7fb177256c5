//! The kernel in a bzImage, which is compressed.
#![no_main]

use mayfly_fuzz::boot;

libfuzzer_sys::fuzz_target!(|file: &[u8]| boot::extract(file));
