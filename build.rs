//! Compiles the lists of system calls to filters.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use seccompiler::TargetArch;

const LISTS: &str = "resources/seccomp";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={LISTS}");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    for role in ["event-loop", "vcpu", "io"] {
        let path = Path::new(LISTS).join(format!("{role}.json"));
        let text = fs::read(&path)?;
        let filters = seccompiler::compile_from_json(text.as_slice(), TargetArch::x86_64)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let filter = filters.get(role).ok_or("a list is named as its file is")?;
        let mut bytes = Vec::new();
        for instruction in filter {
            bytes.extend(instruction.code.to_ne_bytes());
            bytes.extend([instruction.jt, instruction.jf]);
            bytes.extend(instruction.k.to_ne_bytes());
        }
        fs::write(out.join(format!("{role}.bpf")), bytes)?;
    }
    Ok(())
}
