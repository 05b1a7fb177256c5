//! Registers of all small devices.
#![no_main]

use mayfly_fuzz::bus;

libfuzzer_sys::fuzz_target!(|accesses: Vec<bus::Access>| bus::small_devices(accesses));
