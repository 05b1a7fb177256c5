//! What the host and the guest's agent say to each other, in both directions.
#![no_main]

use mayfly_fuzz::agent;

libfuzzer_sys::fuzz_target!(|wire: &[u8]| agent::both_ways(wire));
