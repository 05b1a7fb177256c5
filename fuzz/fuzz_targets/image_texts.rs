//! Names of images, their configurations and manifests.
#![no_main]

use mayfly_fuzz::config;

libfuzzer_sys::fuzz_target!(|text: &[u8]| config::image_texts(text));
