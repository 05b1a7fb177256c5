//! What a guest is told of its machine: ACPI tables, command line, memory map.
#![no_main]

use mayfly_fuzz::boot;

libfuzzer_sys::fuzz_target!(|machine: boot::Machine| boot::describe(machine));
