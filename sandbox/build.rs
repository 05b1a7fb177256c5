//! Compiles the lists of system calls, by kind of thread.

use std::error::Error;
use std::fs;

use mayfly_seccomp::{calls, compile, out};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    let mut most = 0;
    for role in ["event-loop", "vcpu", "io"] {
        let list = format!("../resources/seccomp/{role}.json");
        compile(&list, &[role])?;
        most = most.max(calls(&list)?);
    }
    // A number for those who compare.
    fs::write(out()?.join("system_calls_max"), most.to_string())?;
    Ok(())
}
