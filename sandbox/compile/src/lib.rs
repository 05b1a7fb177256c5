//! Compiles lists of system calls to filters, for build scripts. Nothing of it runs later.

use std::collections::BTreeSet;
use std::env;
use std::error::Error;
use std::fs;
use std::path::PathBuf;

use seccompiler::TargetArch;
use serde_json::Value;

/// The folder for what a build script makes.
pub fn out() -> Result<PathBuf, Box<dyn Error>> {
    Ok(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?.into())
}

/// Compiles filters of a list to `NAME.bpf` in [`out`], as the kernel takes them.
pub fn compile(list: &str, filters: &[&str]) -> Result<(), Box<dyn Error>> {
    let text = read(list)?;
    compile_text(&text, list, filters)
}

/// Compiles the filter of a list that has all of another one's rules, too. Both are named as
/// their files.
pub fn compile_with(folder: &str, name: &str, base: &str) -> Result<(), Box<dyn Error>> {
    let (list, base_list) = (
        format!("{folder}/{name}.json"),
        format!("{folder}/{base}.json"),
    );
    let mut all: Value = serde_json::from_str(&read(&list)?)?;
    let base_rules: Value = serde_json::from_str(&read(&base_list)?)?;
    let rules = all
        .get_mut(name)
        .and_then(|it| it.get_mut("filter")?.as_array_mut());
    let more = base_rules
        .get(base)
        .and_then(|it| it.get("filter")?.as_array());
    match (rules, more) {
        (Some(rules), Some(more)) => rules.extend(more.iter().cloned()),
        _ => return Err(format!("{list}: no rules, or none in {base_list}").into()),
    }
    compile_text(&all.to_string(), &list, &[name])
}

fn read(list: &str) -> Result<String, Box<dyn Error>> {
    println!("cargo:rerun-if-changed={list}");
    Ok(fs::read_to_string(list)?)
}

fn compile_text(text: &str, list: &str, filters: &[&str]) -> Result<(), Box<dyn Error>> {
    let compiled = seccompiler::compile_from_json(text.as_bytes(), TargetArch::x86_64)
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
