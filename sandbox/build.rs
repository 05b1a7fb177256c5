//! Compiles the lists of system calls, by kind of thread.

use std::error::Error;
use std::fs;

use mayfly_seccomp::{calls, compile, compile_with, out};

const LISTS: &str = "../resources/seccomp";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    let mut most = 0;
    for role in ["event-loop", "vcpu", "io"] {
        let list = format!("{LISTS}/{role}.json");
        compile(&list, &[role])?;
        most = most.max(calls(&list)?);
    }
    for base in ["event-loop", "vcpu"] {
        compile_with(LISTS, &format!("saving-{base}"), base)?;
    }
    // A number for those who compare.
    fs::write(out()?.join("system_calls_max"), most.to_string())?;
    Ok(())
}
