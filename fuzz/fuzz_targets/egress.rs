//! What a user network lets pass: frames, and answers of DNS.
#![no_main]

use mayfly_fuzz::egress;

libfuzzer_sys::fuzz_target!(|steps: Vec<egress::Step>| egress::run(steps));
