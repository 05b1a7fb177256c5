//! The registers of a virtio device.
#![no_main]

use mayfly_fuzz::bus;

libfuzzer_sys::fuzz_target!(|accesses: Vec<bus::Access>| bus::virtio_registers(accesses));
