//! Images of QEMU's format, and a disk on one.
#![no_main]

use mayfly_fuzz::devices;

libfuzzer_sys::fuzz_target!(|image: &[u8]| devices::qcow2(image));
