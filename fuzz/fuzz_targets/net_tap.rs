//! A network card's queues, on a TAP.
#![no_main]

use mayfly_fuzz::devices;
use mayfly_fuzz::guest::Action;

libfuzzer_sys::fuzz_target!(|program: Vec<Action<devices::Traffic>>| devices::net_tap(program));
