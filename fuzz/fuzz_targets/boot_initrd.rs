//! Initial RAM disks.
#![no_main]

use mayfly_fuzz::boot;

libfuzzer_sys::fuzz_target!(|file: &[u8]| boot::load_initrd(file));
