//! Kernels: ELF files and bzImages.
#![no_main]

use mayfly_fuzz::boot;

libfuzzer_sys::fuzz_target!(|file: &[u8]| boot::load_kernel(file));
