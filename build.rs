//! Compiles the lists of system calls to filters.

use std::collections::BTreeSet;
use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use seccompiler::TargetArch;

/// Files, and the filters that they hold.
const LISTS: [(&str, &[&str]); 5] = [
    ("resources/seccomp/event-loop.json", &["event-loop"]),
    ("resources/seccomp/vcpu.json", &["vcpu"]),
    ("resources/seccomp/io.json", &["io"]),
    (
        "resources/helpers/virtiofsd.json",
        &["virtiofsd-files", "virtiofsd-unseen", "virtiofsd-groups"],
    ),
    (
        "resources/compare/docker-seccomp.json",
        &["docker", "docker-clone3"],
    ),
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let mut most = 0;
    for (path, names) in LISTS {
        println!("cargo:rerun-if-changed={path}");
        let text = fs::read(path)?;
        if path.starts_with("resources/seccomp/") {
            most = most.max(calls(std::str::from_utf8(&text)?).len());
        }
        let filters = seccompiler::compile_from_json(text.as_slice(), TargetArch::x86_64)
            .map_err(|error| format!("{path}: {error}"))?;
        for name in names {
            let filter = filters.get(*name);
            let filter = filter.ok_or_else(|| format!("{path}: no filter is called {name}"))?;
            let mut bytes = Vec::new();
            for instruction in filter {
                bytes.extend(instruction.code.to_ne_bytes());
                bytes.extend([instruction.jt, instruction.jf]);
                bytes.extend(instruction.k.to_ne_bytes());
            }
            fs::write(out.join(format!("{name}.bpf")), bytes)?;
        }
    }
    // A number for those who compare.
    fs::write(out.join("system_calls_max"), most.to_string())?;
    Ok(())
}

/// The names in a list, which has one for each rule.
fn calls(list: &str) -> BTreeSet<&str> {
    let rules = list.split("\"syscall\"").skip(1);
    rules.filter_map(|rule| rule.split('"').nth(1)).collect()
}
