//! Compiles lists of system calls to filters, for build scripts. Nothing of it runs later.

use std::collections::BTreeSet;
use std::env;
use std::error::Error;
use std::fs;
use std::path::PathBuf;

use seccompiler::TargetArch;

/// The folder for what a build script makes.
pub fn out() -> Result<PathBuf, Box<dyn Error>> {
    Ok(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?.into())
}

/// Compiles filters of a list to `NAME.bpf` in [`out`], as the kernel takes them.
pub fn compile(list: &str, filters: &[&str]) -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={list}");
    let text = fs::read(list)?;
    let compiled = seccompiler::compile_from_json(text.as_slice(), TargetArch::x86_64)
        .map_err(|error| format!("{list}: {error}"))?;
    for name in filters {
        let filter = compiled.get(*name);
        let filter = filter.ok_or_else(|| format!("{list}: no filter is called {name}"))?;
        let mut bytes = Vec::new();
        for instruction in filter {
            bytes.extend(instruction.code.to_ne_bytes());
            bytes.extend([instruction.jt, instruction.jf]);
            bytes.extend(instruction.k.to_ne_bytes());
        }
        fs::write(out()?.join(format!("{name}.bpf")), bytes)?;
    }
    Ok(())
}

/// How many system calls a list names.
pub fn calls(list: &str) -> Result<usize, Box<dyn Error>> {
    let text = fs::read_to_string(list)?;
    // It has one for each rule.
    let rules = text.split("\"syscall\"").skip(1);
    let names: BTreeSet<&str> = rules.filter_map(|rule| rule.split('"').nth(1)).collect();
    Ok(names.len())
}
