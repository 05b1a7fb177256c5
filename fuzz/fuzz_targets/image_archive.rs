//! Archives of images, as `docker save` makes them.
#![no_main]

use mayfly_fuzz::image;

libfuzzer_sys::fuzz_target!(|file: &[u8]| image::archive(file));
