//! Archives of layers: tar, gzip, zstd.
#![no_main]

use mayfly_fuzz::image;

libfuzzer_sys::fuzz_target!(|file: &[u8]| image::layer(file));
