//! Indexes, manifests and configurations of images, whose digests are right.
#![no_main]

use mayfly_fuzz::image;

libfuzzer_sys::fuzz_target!(|documents: &[u8]| image::documents(documents));
